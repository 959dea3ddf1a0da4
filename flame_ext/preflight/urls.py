"""Checks of paths that are URLs: sources are read from object stores, everything else lies on a file system."""

from collections.abc import Iterator
from operator import attrgetter

from flame_ext.config.sections import FlameJobConfig
from flame_ext.object_stores import is_url, problem_of

_ON_FILE_SYSTEMS = {
    "job.dump_folder": "steps and exports are renamed when they are complete, which stores cannot do; give a folder, and copy it later",
    "checkpoint.folder": "steps are renamed when they are complete, which stores cannot do; give a folder below job.dump_folder",
    "model.hf_assets_path": "configuration and tokenizer are read as files; copy config.json and the tokenizer's files to a folder",
}


def check_urls(config: FlameJobConfig) -> Iterator[str]:
    """Yields one sentence for each finding."""
    for option, why in _ON_FILE_SYSTEMS.items():
        if is_url(path := attrgetter(option)(config)):  # not printed whole: it may hold credentials
            yield f"{option} is a URL ({path.split(':')[0]}://…): {why}"
    named = {"checkpoint.initial_load_path": config.checkpoint.initial_load_path or ""}
    for section in ("data", "validation"):
        named |= {f"{section}.sources[{i}].path": s.path for i, s in enumerate(getattr(config, section).sources)}
    for option, path in named.items():
        if is_url(path) and (problem := problem_of(path)):
            yield f"{option} {problem}"
