"""Reads and rewrites the small files of an export: the configuration, and what a model's folder has beside its weights."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from torchtitan.tools.logging import logger
from transformers import GenerationConfig, PreTrainedConfig

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.safe_files import TOKENIZER_FILES, find_file, parse_json

# Listed one by one: modelling code in the source must not be copied.
CARRIED_FILES = (
    *TOKENIZER_FILES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
    # of multimodal models
    *(
        "processor_config.json",
        "preprocessor_config.json",
        "image_processor_config.json",
        "video_preprocessor_config.json",
    ),
)


def read_assets(folder: Path, trust_remote_code: bool, follow_links: bool = False) -> dict[str, bytes]:
    """Returns the name and content of each file that exports carry on from ``folder``, the model's.

    ``auto_map`` of the tokenizer is rewritten as in :func:`code_stays`. Raises a SeedError if a file is no file of the folder, or
    ``from_pretrained`` fails with its generation configuration.
    """
    found = {name: find_file(folder, name, follow_links) for name in CARRIED_FILES}
    assets = {name: file.read_bytes() for name, file in found.items() if file is not None}
    if (name := "tokenizer_config.json") in assets and b'"auto_map"' in assets[name]:
        fields = code_stays(parse_json(assets[name], folder / name, "file"), folder, trust_remote_code)
        assets[name] = json.dumps(fields, indent=2, ensure_ascii=False).encode()
    if (name := "generation_config.json") in assets:
        try:
            GenerationConfig.from_pretrained(folder, local_files_only=True)
        except OSError:  # no JSON: from_pretrained passes it over
            pass
        except Exception as e:
            reason = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
            raise SeedError(f"{folder / name}: from_pretrained cannot use it ({reason}); correct or delete it") from e
    return assets


def code_stays(fields: dict[str, Any], folder: Path, used: bool) -> dict[str, Any]:
    """Returns a configuration whose ``auto_map`` names the code in ``folder``, which an export does not carry, from outside of it.

    Its classes get the name of the Hub's repository, or of the folder, before them, as transformers writes it. Where the code is
    not ``used``, or the folder has a name that cannot be referred to, ``auto_map`` is left out.
    """
    if "auto_map" not in fields:
        return fields
    repository = re.search(r"/models--([^/]+)--([^/]+)/snapshots/[^/]+$", str(folder.absolute()))
    place = f"{repository[1]}/{repository[2]}" if repository else str(folder.absolute())
    if used and "--" not in place:

        def named(reference: Any) -> Any:
            if isinstance(reference, list):
                return [named(item) for item in reference]
            return f"{place}--{reference}" if isinstance(reference, str) and "--" not in reference else reference

        return {**fields, "auto_map": {key: named(reference) for key, reference in fields["auto_map"].items()}}
    logger.info(f"{folder}: auto_map is left out of exports: the code that it names stays there")
    return {key: value for key, value in fields.items() if key != "auto_map"}


def with_former_names(fields: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Adds the fields under which transformers 4 and its derivatives read rotary embeddings and dtype to those of ``config``.

    Each is added only if transformers reads the same configuration with it.
    """
    result = dict(fields)
    for key in config.sub_configs:
        if isinstance(fields.get(key), dict):
            result[key] = with_former_names(fields[key], getattr(config, key))
    read = type(config).from_dict
    plain = read(deepcopy(result)).to_dict()
    for name, value in _former_names(fields):
        with suppress(Exception):  # a configuration class may refuse what is not its own
            if _holds(read(deepcopy({**result, name: value})).to_dict(), plain):
                result[name] = value
    return result


def _holds(found: Any, expected: Any) -> bool:
    """Returns whether ``found`` is ``expected``, or has more keys in its tables."""
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        return found == expected
    return all(key in found and _holds(found[key], value) for key, value in expected.items())


def _former_names(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if "dtype" in fields:
        yield "torch_dtype", fields["dtype"]
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    main, sliding = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    scaling = {key: value for key, value in main.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if scaling.get("rope_type", "default") == "default":
        scaling = {}
    elif scaling["rope_type"] == "longrope" and fields.get("model_type") == "phi3":
        # Phi-3 in transformers 4 refuses any other key.
        scaling = {"type": "longrope"} | {key: scaling[key] for key in ("short_factor", "long_factor")}
    theta, part = main.get("rope_theta"), main.get("partial_rotary_factor")
    names = {"rope_theta": theta, "partial_rotary_factor": part, "rope_local_base_freq": sliding.get("rope_theta")}
    if str(fields.get("model_type")).startswith("gpt_neox"):
        names |= {"rotary_emb_base": theta, "rotary_pct": part}
    if str(fields.get("model_type")).startswith("modernbert"):
        names |= {"global_rope_theta": theta, "local_rope_theta": sliding.get("rope_theta")}
    yield from ((name, value) for name, value in names.items() if value is not None)
    yield "rope_scaling", scaling or None  # after theta, which transformers would not find in it
