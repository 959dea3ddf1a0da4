"""The configuration of a job's model: ``config.json``, with the vocabulary that the job lets grow."""

from transformers import PreTrainedConfig

from flame_ext.config.sections import FlameJobConfig
from flame_ext.hf_config import load_hf_config
from flame_ext.hf_tokenizer import load_auto_tokenizer, number_of_ids


def load_model_config(config: FlameJobConfig) -> PreTrainedConfig:
    """Read ``config.json`` at ``model.hf_assets_path``; with ``seed.resize_vocabulary``, ``vocab_size`` is at least the tokenizer's
    ids, rounded up to the multiple that is asked for. It depends on that folder alone, since a resumed run need not see its source.

    Raises ConfigError if the configuration or the tokenizer cannot be read.
    """
    folder, seed = config.model.hf_assets_path, config.seed
    found = load_hf_config(folder, seed.trust_remote_code)
    if seed.resize_vocabulary:
        text, multiple = found.get_text_config(), seed.pad_vocabulary_to_multiple_of
        rows = max(text.vocab_size, number_of_ids(load_auto_tokenizer(folder, seed.trust_remote_code)))
        text.vocab_size = -(-rows // multiple) * multiple
    return found


def grown_vocabulary(config: FlameJobConfig) -> int | None:
    """Return the rows of the model's embedding if ``seed.resize_vocabulary`` is on; None = as in ``config.json``."""
    return load_model_config(config).get_text_config().vocab_size if config.seed.resize_vocabulary else None
