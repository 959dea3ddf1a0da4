"""AutoTokenizer's ids behind torchtitan's interface, the tokens before and after a document, checks against the model's vocabulary."""

from typing import Any, NamedTuple

from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger
from transformers import PreTrainedConfig, TokenizersBackend

from flame_ext.config.sections import FlameJobConfig
from flame_ext.data.documents import Tokens
from flame_ext.distributed import failing_together
from flame_ext.errors import ConfigError
from flame_ext.hf_tokenizer import load_auto_tokenizer
from flame_ext.host.names import HuggingFaceTokenizer

_TO_GROW = "set seed.resize_vocabulary = true"


def build_tokenizer(job_config: FlameJobConfig) -> HuggingFaceTokenizer:
    """Builds the tokenizer of ``model.hf_assets_path``. Collective; raises ConfigError if AutoTokenizer cannot read it."""
    with failing_together(ConfigError):
        return AutoHuggingFaceTokenizer(job_config.model.hf_assets_path, job_config.seed.trust_remote_code)


class AutoHuggingFaceTokenizer(HuggingFaceTokenizer):
    """torchtitan's tokenizer with ids, BOS and EOS as AutoTokenizer has them; torchtitan's own reader knows fewer files."""

    vocab_limit: int | None = None
    """The model's vocabulary size if the tokenizer has ids beyond it (:func:`require_of_model`)."""

    def __init__(self, folder: str, trust_remote_code: bool = False) -> None:
        self._auto = load_auto_tokenizer(folder, trust_remote_code)
        super().__init__(folder)

    def _load_tokenizer_from_path(self, tokenizer_path: str) -> Any:
        if not isinstance(self._auto, TokenizersBackend):
            return _PythonTokenizer(self._auto)
        tokenizer = self._auto.backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _infer_special_tokens(self) -> None:
        auto = self._auto
        self.eos_token, self.eos_id = auto.eos_token, auto.eos_token_id
        # Of GPT-NeoX and others the class has a BOS that is EOS, which begins no document unless the folder names it.
        if auto.bos_token != auto.eos_token or (self.config or {}).get("bos_token"):
            self.bos_token, self.bos_id = auto.bos_token, auto.bos_token_id

    def _infer_should_add_bos_eos(self) -> None:
        """Looks at both ends of a text, since torchtitan takes an EOS before the text, such as OPT's, for one after it."""
        super()._infer_should_add_bos_eos()
        ids = self.tokenizer.encode("a").ids
        self.hf_adds_bos = len(ids) > 1 and ids[0] in (self.bos_id, self.eos_id)
        self.hf_adds_eos = len(ids) > 1 and ids[-1] == self.eos_id

    def ids(self, text: str) -> list[int]:
        """Returns the ids of a text with those that the tokenizer itself adds; ConfigError for an id beyond the model's vocabulary."""
        # Without the offset of each token in the text, which takes time.
        return self._known(self.tokenizer.encode_batch_fast([text])[0].ids)

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        return self._known(super().encode(*args, **kwargs))

    def _known(self, ids: list[int]) -> list[int]:
        if self.vocab_limit is not None and (largest := max(ids, default=0)) >= self.vocab_limit:
            raise ConfigError(
                f"a text has the tokenizer's id {largest} ({self.id_to_token(largest)!r}), beyond the model's vocab_size "
                f"{self.vocab_limit}: take it out of the text, or give the model its own tokenizer ({self.tokenizer_path}); if the model "
                f"is to learn it, {_TO_GROW}, in a run of its own"
            )
        return ids


class _Encoding(NamedTuple):
    ids: list[int]


class _PythonTokenizer:
    """A tokenizer that is written in Python, with the methods of ``tokenizers.Tokenizer`` that torchtitan's class calls."""

    def __init__(self, auto: Any) -> None:
        self._auto = auto
        self.get_vocab, self.decode, self.id_to_token = auto.get_vocab, auto.decode, auto.convert_ids_to_tokens

    def encode(self, text: str) -> _Encoding:
        return _Encoding(self._auto(text, verbose=False)["input_ids"])

    def encode_batch_fast(self, texts: list[str]) -> list[_Encoding]:
        return [self.encode(text) for text in texts]

    def get_vocab_size(self) -> int:
        return len(self._auto)

    def token_to_id(self, token: str) -> int | None:
        return self.get_vocab().get(token)


def around_a_document(tokenizer: BaseTokenizer) -> tuple[list[int], list[int]]:
    """Returns the ids to add before and after the tokens of a document's text: none that the tokenizer adds itself.

    EOS follows every document, whatever ``add_eos_token`` says, which is meant for prompts. BOS comes first if ``add_bos_token`` is
    true or, where that is absent, if BOS is not EOS.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return [], []
    bos_id, eos_id = tokenizer.bos_id, tokenizer.eos_id
    asked = (tokenizer.config or {}).get("add_bos_token")
    with_bos = bos_id is not None and not tokenizer.hf_adds_bos and (bos_id != eos_id if asked is None else asked)
    with_eos = eos_id is not None and not tokenizer.hf_adds_eos
    return [bos_id] if with_bos else [], [eos_id] if with_eos else []


def require_of_model(tokenizer: BaseTokenizer, config: PreTrainedConfig, folder: str) -> None:
    """Warns if the tokenizer in ``folder`` and the model's ``config`` have other EOS, BOS, or vocabularies.

    Ids beyond the model's vocabulary do no harm while no text has them; from here on the tokenizer refuses a text that does.
    Raises ConfigError if BOS or EOS, which every document has, is such an id.
    """
    text = config.get_text_config()
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= text.vocab_size:
        beyond = f"is beyond the model's vocab_size {text.vocab_size}"
        for around, name in zip(around_a_document(tokenizer), ("BOS", "EOS"), strict=True):
            if around and around[0] >= text.vocab_size:
                raise ConfigError(
                    f"{folder}: the tokenizer's {name}, id {around[0]}, {beyond}: it belongs to another model, or "
                    f"tokenizer_config.json has to name {name.lower()}_token; if the model is to learn it, {_TO_GROW}"
                )
        logger.warning(
            f"{folder}: the tokenizer's id {largest} ({token!r}) {beyond}: a text that has such an id will be refused; does "
            f"this tokenizer belong to another model? If the model is to learn its new tokens, {_TO_GROW}"
        )
        tokenizer.vocab_limit = text.vocab_size
    _warn_of_special_tokens(tokenizer, text, folder)


def _warn_of_special_tokens(tokenizer: BaseTokenizer, text: PreTrainedConfig, folder: str) -> None:
    def named(key: str) -> list[int]:
        value = getattr(text, key, None)
        return value if isinstance(value, list) else [] if value is None else [value]

    eos_id, eos_ids, bos_ids = getattr(tokenizer, "eos_id", None), named("eos_token_id"), named("bos_token_id")
    belongs = "does this tokenizer belong to this model?"
    if eos_id is None:
        has = f"config.json has eos_token_id {eos_ids}: " if eos_ids else ""
        logger.warning(
            f"{folder}: the tokenizer has no EOS, so documents of text follow each other without one; {has}name eos_token in "
            "tokenizer_config.json"
        )
    elif eos_ids and eos_id not in eos_ids:
        logger.warning(
            f"{folder}: documents end with the tokenizer's EOS, {eos_id}, and config.json has eos_token_id {eos_ids}: {belongs}"
        )
    before, _ = around_a_document(tokenizer)
    if before and bos_ids and before[0] not in bos_ids:
        logger.warning(
            f"{folder}: documents begin with the tokenizer's BOS, {before[0]}, and config.json has bos_token_id {bos_ids}: {belongs}"
        )


def require_in_vocabulary(tokens: Tokens, vocab_size: int) -> Tokens:
    """Returns the tokens; raises ConfigError if an id is not in 0..vocab_size - 1."""
    for token in (tokens.max(), tokens.min()) if len(tokens) else ():
        if not 0 <= token < vocab_size:
            raise ConfigError(
                f"token id {token} is not in the model's vocabulary of {vocab_size}: another tokenizer made it"
            )
    return tokens
