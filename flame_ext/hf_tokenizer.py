"""Reads a tokenizer by AutoTokenizer, and refuses what it cannot read or reads as another one."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedConfig, TokenizersBackend
from transformers.models.auto.tokenization_auto import MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS

from flame_ext.errors import ConfigError

logger = logging.getLogger()  # torchtitan's: importing torchtitan for it would take seconds

# Compared between tokenizer.json and a tokenizer that AutoTokenizer rebuilt from its vocabulary.
_SAMPLE = "The 12345 words, it'll do.\n\ndef f(x):\n    return x;\n\tné, 東京 😀 <s></s>"


def number_of_ids(tokenizer: Any) -> int:
    """Return the largest id of a tokenizer plus one: the rows that an embedding needs for it."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def load_auto_tokenizer(folder: str, trust_remote_code: bool) -> Any:
    """Return AutoTokenizer's reading of a folder; raise ConfigError if it cannot read it or finds no vocabulary."""
    file = Path(folder, "tokenizer.json")
    as_it_is = 'if tokenizer.json is right, set "tokenizer_class": "TokenizersBackend" in tokenizer_config.json'
    with suppress(Exception):  # whatever is wrong with config.json is said by those who need it
        # Of some models AutoTokenizer does not read tokenizer_class.
        if PreTrainedConfig.get_config_dict(folder)[0]["model_type"] in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS:
            as_it_is = "if tokenizer.json is right, make the data's input_ids with tokenizers.Tokenizer.from_file"
    try:
        auto = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        state = auto.backend_tokenizer if isinstance(auto, TokenizersBackend) else None
        ignored = [name for name in ("truncation", "padding") if getattr(state, name, None)]
        ids = auto(_SAMPLE, verbose=False)["input_ids"]  # which resets both
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # the tokenizers library panics with a BaseException
        reason = " ".join(str(e).split())[:300]
        if "trust_remote_code" in reason:
            remedy = "to run the tokenizer's code in the folder, set seed.trust_remote_code = true"
        elif file.exists():
            remedy = f"copy the model's tokenizer files there again; or, {as_it_is}"
        else:
            remedy = (
                "install what it needs (a .model file: pip install sentencepiece protobuf), or save a tokenizer.json where "
                "it can be read: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        problem = f"AutoTokenizer cannot read the tokenizer ({type(e).__name__}: {reason})"
        raise ConfigError(f"{folder}: {problem}; {remedy}") from e
    kind, names = type(auto).__name__, {*auto.vocab_files_names.values(), "tekken.json", "tiktoken.model"}
    if isinstance(auto, TokenizersBackend):
        names.add(file.name)
    if auto.vocab_files_names and not any(Path(folder, name).is_file() for name in names):
        raise ConfigError(
            f"{folder}: AutoTokenizer reads a {kind}, and none of its files is there ({', '.join(sorted(names))}); "
            "copy the model's tokenizer.json there"
        )
    if not auto(_SAMPLE, add_special_tokens=False, verbose=False)["input_ids"]:
        raise ConfigError(f"{folder}: AutoTokenizer reads a {kind} that finds no token in any text; {as_it_is}")
    if ignored:
        logger.warning(
            f"{file}: saved with {' and '.join(ignored)} of an earlier call, which are not applied, as by AutoTokenizer"
        )
    # Some classes take the vocabulary alone from tokenizer.json, and build the rest anew.
    if isinstance(auto, TokenizersBackend) and type(auto) is not TokenizersBackend and file.is_file():
        saved = Tokenizer.from_file(str(file))
        saved.no_truncation()
        saved.no_padding()
        if saved.encode(_SAMPLE).ids != ids:
            logger.warning(
                f"{file}: AutoTokenizer builds a {kind} from it, which gives other ids than the file itself, and its ids are "
                f"taken; {as_it_is}"
            )
    return auto
