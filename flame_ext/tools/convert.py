"""``flame-ext convert``: converts any layout of weights to any other."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

from flame_ext.errors import ConfigError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the command and its options."""
    parser = commands.add_parser("convert", help="write weights in another layout, bit for bit")
    parser.add_argument("source", metavar="SRC", help="what a job can be seeded from; of a training step, the model")
    parser.add_argument("destination", metavar="DST", type=Path, help="a folder that is not there yet")
    parser.add_argument(
        "--to",
        required=True,
        choices=("hf", "dcp", "dcp-nested"),
        help="hf: a Hugging Face folder; dcp: flat, what torchtitan and flame seed from; dcp-nested: under 'model'",
    )
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="of the weights (default: as they are)")
    parser.add_argument("--max-shard-size", default="5GB", help="of a Hugging Face folder's files (default: 5GB)")
    parser.add_argument("--assets", type=Path, help="folder of config.json and tokenizer, if SRC has none")
    toml = "TOML of the run, for what its heads are built from and, if SRC has none, its assets"
    parser.add_argument("--job.config_file", dest="config_file", help=toml)
    rules = "new beginnings of keys, such as ln.=future_predictor.norm."
    parser.add_argument("--key-map", nargs="+", default=[], metavar="OLD=NEW", help=rules)
    patterns = "patterns of the source's keys to leave out, such as score.*"
    parser.add_argument("--ignore-source-keys", nargs="+", default=[], metavar="PATTERN", help=patterns)
    parser.add_argument("--import", dest="module", help="module that registers heads of your own")
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin files, with weights_only")
    parser.add_argument(
        "--follow-links", action="store_true", help="read files of SRC and --assets that are links out of them"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the modelling code of the model's folder")
    parser.add_argument("--replace", action="store_true", help="replace DST, once everything is written")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Returns 0; every failure is raised as a UserError."""
    import torch

    from flame_ext.tools.conversion import Conversion, convert

    if options.module:
        try:
            importlib.import_module(options.module)
        except ModuleNotFoundError as e:
            raise ConfigError(f"--import: {e}; it must be importable from the current folder") from e
    assets, heads = options.assets, None
    if options.config_file:
        configured, heads = _of_the_run(options.config_file)
        if assets is None and not (Path(options.source) / "config.json").exists():
            assets = configured
    conversion = Conversion(
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        max_shard_size=options.max_shard_size,
        assets=assets,
        head_arguments=heads,
        key_map=tuple(options.key_map),
        ignore_source_keys=tuple(options.ignore_source_keys),
        allow_pickle=options.allow_pickle,
        follow_links=options.follow_links,
        trust_remote_code=options.trust_remote_code,
        replace=options.replace,
    )
    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("writing", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        converted = convert(options.source, options.destination, options.to, conversion, progress)
    for name in converted.passed_over:
        print(f"passed over: {name}")
    size = converted.nbytes / 2**20
    print(
        f"Wrote {converted.tensors} tensors ({size:,.1f} MiB) from {options.source} ({converted.layout}) to "
        f"{options.destination} ({options.to}) in {converted.seconds:.1f} s ({size / converted.seconds:,.0f} MiB/s), and "
        "read them back"
    )
    return 0


def _of_the_run(config_file: str) -> tuple[Path, dict[str, dict[str, Any]] | None]:
    """Returns the folder of the model's ``config.json``, and the arguments of the run's heads, None without heads."""
    from flame_ext.config.model_config import grown_vocabulary
    from flame_ext.heads.registry import enabled_heads, head_arguments
    from flame_ext.preflight.parse import parse
    from flame_ext.tools.architecture import load_architecture

    config = parse([f"--job.config_file={config_file}"])
    assets = Path(config.model.hf_assets_path)
    if not enabled_heads(config):
        return assets, None
    model = load_architecture(assets, config.seed.trust_remote_code, vocab_size=grown_vocabulary(config)).model
    return assets, head_arguments(config, model)
