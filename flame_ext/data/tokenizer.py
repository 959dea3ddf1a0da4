"""torchtitan's tokenizer, the tokens before and after a document, and checks against the model's vocabulary."""

from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer, build_hf_tokenizer
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger
from transformers import PreTrainedConfig

from flame_ext.data.documents import Tokens
from flame_ext.errors import ConfigError


def build_tokenizer(job_config: JobConfig) -> HuggingFaceTokenizer:
    """Builds torchtitan's tokenizer, which has no EOS where one token is BOS and EOS (GPT-2, GPT-NeoX), and adds that EOS."""
    try:
        tokenizer = build_hf_tokenizer(job_config)
        if tokenizer.eos_id is None and tokenizer.config:
            token = tokenizer._get_token_from_config(tokenizer.config, "eos_token")
            if token is not None:
                tokenizer.eos_token, tokenizer.eos_id = token, tokenizer.tokenizer.token_to_id(token)
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # files may hold anything, and the tokenizers library panics with a BaseException
        folder, reason = job_config.model.hf_assets_path, " ".join(str(e).split())[:300]
        raise ConfigError(
            f"{folder}: the tokenizer cannot be read ({type(e).__name__}: {reason}); copy its files there again"
        ) from e


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
    """Raise ConfigError if the tokenizer in ``folder`` has ids beyond the model's vocabulary; warn if ``config`` has another EOS."""
    text = config.get_text_config()
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= text.vocab_size:
        raise ConfigError(
            f"{folder}: the tokenizer's id {largest} ({token!r}) is beyond the model's vocab_size {text.vocab_size}: it belongs "
            "to another model"
        )
    named, eos_id = getattr(text, "eos_token_id", None), getattr(tokenizer, "eos_id", None)
    named = named if isinstance(named, list) else [named]
    if eos_id is not None and named != [None] and eos_id not in named:
        logger.warning(
            f"{folder}: documents end with the tokenizer's EOS, {eos_id}, and config.json has eos_token_id {named}: does this "
            "tokenizer belong to this model?"
        )


def require_in_vocabulary(tokens: Tokens, vocab_size: int, where: str) -> Tokens:
    """Returns the tokens; raises ConfigError if an id is not in 0..vocab_size - 1."""
    for token in (tokens.max(), tokens.min()) if len(tokens) else ():
        if not 0 <= token < vocab_size:
            raise ConfigError(
                f"{where}: token id {token} is not in the model's vocabulary of {vocab_size}: another tokenizer made it"
            )
    return tokens
