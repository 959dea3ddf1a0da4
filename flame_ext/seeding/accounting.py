"""Checks, before a weight is read, that a source fits the model: names, shapes, dtypes and ``config.json``."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from flame_ext.errors import SeedError
from flame_ext.hf_config import REVERSE_FIELD, STORAGE_FIELDS, is_part_of_transformers
from flame_ext.seeding.sources.source import Source, TensorEntry, dtype_name

# Numbers that mean themselves; quantised ones mean something only with their scales.
SOURCE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Fields that do not change the function of given weights on given tokens; all others are compared. The vocabulary's size is
# compared by shape, with its own message.
_HARMLESS = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "return_dict", "transformers_version",
    "use_cache", "vocab_size",
    # of a loss that is added in training
    "output_router_logits", "router_aux_loss_coef",
    # of classifiers
    "id2label", "label2id", "num_labels", "problem_type",
    # of how weights are stored, which are read only if they are not quantised
    *STORAGE_FIELDS,
    # of the text that the weights were trained on
    REVERSE_FIELD,
}  # fmt: skip


@dataclass(frozen=True)
class Account:
    """Holds each key of the model and of the source in one sorted list; every rank has the same."""

    loaded: list[str]
    initialised: list[str]
    tied: list[str]  # Other names of parameters; a tensor that the source holds under such a name has to be equal
    buffers: list[str]  # Buffers in no state dict, which are computed with the model
    ignored: list[str]  # Keys of the source that are left unread


def account(
    model: Mapping[str, Tensor],
    tied: Mapping[str, str],
    computed_buffers: Collection[str],
    initialisable: Collection[str],
    source: Source,
    new_parameters: Collection[str],
    ignore_source_keys: Collection[str],
    vocabulary: Collection[str] = (),
    growing: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Account:
    """Match the model's keys with the source's; raise SeedError with every missing, unexpected, misshapen or unreadable key.

    Args:
        model: state dict with each tied parameter once, for shapes and dtypes.
        tied: other name of a tied parameter to its key in ``model``.
        initialisable: keys that have an initialisation.
        source: under the model's names.
        new_parameters: patterns of the keys that may be missing from the source.
        ignore_source_keys: patterns of the source's keys that may be left unread.
        vocabulary: keys of input and output embeddings, whose first dimension is the vocabulary.
        growing: keys of the tensors of which the source is to have the first rows only, with its shapes.
    """
    loaded, initialised, ignored = [], [], []
    problems: list[str] = []
    for key, needed in sorted(model.items()):
        # A tied weight may be saved under any of its names.
        names = [key, *sorted(alias for alias, owner in tied.items() if owner == key)]
        held = [source.entries[name] for name in names if name in source.entries]
        if held:
            loaded.append(key)
            for entry in held:
                problems += _misfits(entry, needed, growing.get(key, tuple(needed.shape)), key in vocabulary)
        elif key in initialisable and matches(key, new_parameters):
            initialised.append(key)
        else:
            missing = f"{key!r} {list(needed.shape)} is missing from the source"
            if key in initialisable:
                missing += "; if it is meant to start from its initialisation, declare it in seed.new_parameters"
            elif key in vocabulary:
                missing += (
                    "; if the model ties it to its input embedding, set tie_word_embeddings = true in config.json"
                )
            else:
                missing += (
                    ", and seed.new_parameters cannot declare it: the backbone has no initialisation here; copy the source again, "
                    "or give the key its name with seed.key_map"
                )
            problems.append(missing)
    beyond = [
        (name, entry.key, f"{list(entry.shape)} in {entry.place} is not in the model")
        for name, entry in sorted(source.entries.items())
        if name not in model and name not in tied
    ]
    beyond += [(key, key, f"in {file.name} is not a tensor") for key, file in sorted(source.objects.items())]
    unexpected = []
    for name, key, problem in beyond:
        if matches(key, ignore_source_keys) or matches(name, ignore_source_keys):
            ignored.append(key)
        else:
            unexpected.append(key)
            problems.append(f"{key!r} {problem}")
    if problems:
        shown = problems[:10] + ([f"… and {len(problems) - 10} more"] if len(problems) > 10 else [])
        shown += what_to_do([source.entries[name] for name, _, _ in beyond if name in source.entries])
        if unexpected:
            groups = defaultdict(list)  # keys that differ in numbers alone share a pattern
            for key in unexpected:
                groups[re.sub(r"(?<=\.)\d+(?=\.|$)", "*", key)].append(key)
            patterns = ", ".join(f'"{name if len(keys) > 1 else keys[0]}"' for name, keys in groups.items())
            shown.append(f"to leave out what is not in the model: seed.ignore_source_keys = [{patterns}]")
        shown += [f"passed over: {what}" for what in source.passed_over]
        raise SeedError(f"{source.path} does not fit the model:\n  - " + "\n  - ".join(shown))
    return Account(loaded, initialised, sorted(tied), sorted(computed_buffers), sorted([*ignored, *source.ignored]))


def what_to_do(unexpected: Collection[TensorEntry]) -> list[str]:
    """Return lines that say what to do with tensors that the model does not have, of adapters or quantised weights."""
    return [*adapters(unexpected), *quantised(unexpected)]


def adapters(unexpected: Iterable[TensorEntry]) -> list[str]:
    """Return a line that says what to do if tensors that the model does not have are those of adapters, else nothing."""
    found = [entry for entry in unexpected if ".lora_A." in entry.key or ".lora_B." in entry.key]
    if not found:
        return []
    return [
        f"{len(found)} of these tensors are adapters of a run with model.converters 'lora', whose steps hold no other weights of the "
        "backbone: take the run's export, hf/step-N, in which they are merged; or merge a folder of peft's: "
        "PeftModel.from_pretrained(…).merge_and_unload().save_pretrained(…)"
    ]


def quantised(unexpected: Iterable[TensorEntry]) -> list[str]:
    """Return a line that says what to do if tensors that the model does not have look like quantised weights, else nothing."""
    packed = [
        e for e in unexpected if (e.dtype.itemsize == 1 and e.dtype is not torch.bool) or e.key.endswith(".qweight")
    ]
    dtypes = ", ".join(sorted({dtype_name(entry.dtype) for entry in packed}))
    remedy = "with from_pretrained(…, quantization_config=Mxfp4Config(dequantize=True)), FineGrainedFP8Config(dequantize=True) or "
    remedy += "model.dequantize(), then save_pretrained to another folder"
    line = f"{len(packed)} of these tensors are {dtypes}: the weights are quantised; dequantise them first: {remedy}"
    return [line] if packed else []


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Return whether a key matches one of the patterns (fnmatch)."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _misfits(entry: TensorEntry, needed: Tensor, expected: tuple[int, ...], is_vocabulary: bool) -> Iterable[str]:
    # An integer buffer is the same integers in the model, or nothing.
    if entry.dtype not in SOURCE_DTYPES and (entry.dtype != needed.dtype or needed.is_floating_point()):
        yield (
            f"{entry.key!r} in {entry.place} has dtype {dtype_name(entry.dtype)}; only unquantised weights can be seeded from "
            f"({', '.join(map(dtype_name, SOURCE_DTYPES))}): dequantise the model first"
        )
    found = entry.shape
    if found == expected:
        return
    message = f"{entry.key!r}: shape {list(found)} in {entry.place}, the model has {list(expected)}"
    if is_vocabulary and len(found) == len(expected) and found[1:] == expected[1:]:
        message += (
            f": a vocabulary of {found[0]} in the source, of {expected[0]} in the model. Set vocab_size = {found[0]} "
            "in config.json at model.hf_assets_path (rows beyond the tokenizer's are padding and do no harm), or save the "
            f"source anew after resize_token_embeddings({expected[0]})"
        )
        if found[0] < expected[0]:
            message += "; if the tokenizer has grown beyond the source's, seed.resize_vocabulary = true initialises the rows that are new"
    elif expected == found[::-1]:
        message += " (transposed)"
    yield message


def require_same_function(
    source: Source, model_config: PreTrainedConfig, trust_remote_code: bool, allowed: Collection[str] = ()
) -> list[str]:
    """Compare the configurations as transformers completes them with defaults; returns a line for each ``allowed`` field that differs.

    Of a multimodal source the text model's counts, if the model is such a text model.
    Raises SeedError with each other field that differs, unless it is one that the model's class does not have: no model reads it.
    Also raises SeedError if ``allowed`` names a field that is the same in both.
    """
    try:
        config = AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as e:
        hint = " (seed.trust_remote_code = true runs the folder's code)" if "trust_remote_code" in str(e) else ""
        raise SeedError(f"{source.path / 'config.json'}: {str(e).strip().splitlines()[0]}{hint}") from e
    if config.model_type != model_config.model_type == config.get_text_config().model_type:
        config = config.get_text_config()
    found, expected = _compared(config), _compared(model_config)
    differences = {
        field: f"{field}: {found.get(field, 'absent')!r} in the source, {expected.get(field, 'absent')!r} in the model"
        for field in sorted(found.keys() | expected.keys())
        if found.get(field) != expected.get(field)
    }
    if same := sorted({*filter(None, allowed)} - {*differences}):
        raise SeedError(f"seed.allow_config_difference: {', '.join(same)}: no difference of this name; leave it out")
    if refused := [field for field in differences if field not in allowed]:
        names = ", ".join(f'"{field}"' for field in differences)
        raise SeedError(
            f"{source.path / 'config.json'} describes another function than config.json at model.hf_assets_path; the same "
            "weights would compute something else. Make them agree:\n  - "
            + "\n  - ".join(differences[field] for field in refused)
            + f"\nor, if the model is meant to differ: seed.allow_config_difference = [{names}]"
        )
    return list(differences.values())


def _compared(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields to compare, those of nested tables under their full names."""
    known = type(config)().to_dict() if is_part_of_transformers(config) else None
    return _flat(config.to_dict(), known, config.sub_configs)


def _flat(
    fields: dict[str, Any], known: dict[str, Any] | None, sub_configs: Collection[str] = (), prefix: str = ""
) -> dict[str, Any]:
    """``known`` has the fields of the configuration's class with their defaults; None = all count."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if key in _HARMLESS or "dropout" in str(key) or (known is not None and key not in known):
            continue
        below = known.get(key) if known is not None and key in sub_configs else None
        flat |= _flat(value, below, (), f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
