"""The host's tokenizer, and what stands before and after a document."""

from __future__ import annotations

from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer, build_hf_tokenizer
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger
from transformers import PreTrainedConfig

from flame_ext.errors import ConfigError


def build_tokenizer(job_config: JobConfig) -> HuggingFaceTokenizer:
    """The host's, which knows no EOS where one token is both BOS and EOS (GPT-2, GPT-NeoX): here it is known."""
    tokenizer = build_hf_tokenizer(job_config)
    if tokenizer.eos_id is None and tokenizer.config:
        token = tokenizer._get_token_from_config(tokenizer.config, "eos_token")
        if token is not None:
            tokenizer.eos_token, tokenizer.eos_id = token, tokenizer.tokenizer.token_to_id(token)
    return tokenizer


def around_a_document(tokenizer: BaseTokenizer) -> tuple[list[int], list[int]]:
    """The ids to put before and after what the tokenizer makes of a document's text.

    EOS follows every document, whatever ``add_eos_token`` says, which is about prompts. BOS, where the tokenizer has one, comes
    before it, unless ``add_bos_token`` is false, or it is the same token as EOS, which then stands between documents alone.
    Neither is put where the tokenizer has put it already.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return [], []
    bos_id, eos_id = tokenizer.bos_id, tokenizer.eos_id
    asked = (tokenizer.config or {}).get("add_bos_token")
    with_bos = bos_id is not None and not tokenizer.hf_adds_bos and (bos_id != eos_id if asked is None else asked)
    with_eos = eos_id is not None and not tokenizer.hf_adds_eos
    return [bos_id] if with_bos else [], [eos_id] if with_eos else []


def require_of_model(tokenizer: BaseTokenizer, config: PreTrainedConfig, folder: str) -> None:
    """Check that a tokenizer can be the model's; warn where its EOS is not the one that the model's configuration names.

    Args:
        tokenizer: of ``folder``.
        config: of the model.
        folder: ``model.hf_assets_path``, for messages.

    Raises:
        ConfigError: the tokenizer has ids beyond the model's vocabulary.
    """
    text = config.get_text_config()
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= text.vocab_size:
        raise ConfigError(
            f"{folder}: the tokenizer's id {largest} ({token!r}) is beyond the model's vocab_size {text.vocab_size}: it belongs "
            "to another model"
        )
    named = getattr(text, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    eos_id = getattr(tokenizer, "eos_id", None)
    if eos_id is not None and named != [None] and eos_id not in named:
        logger.warning(
            f"{folder}: documents end with the tokenizer's EOS, {eos_id}, and config.json has eos_token_id {named}: does this "
            "tokenizer belong to this model?"
        )
