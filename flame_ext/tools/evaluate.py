"""``flame-ext evaluate``: evaluates an export by lm-evaluation-harness, as a run with ``[evaluation]`` does beside training."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from pathlib import Path
from typing import Any

from flame_ext.errors import ConfigError, UserError
from flame_ext.run.process import environment_of_only_rank


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the command and its options."""
    parser = commands.add_parser("evaluate", help="evaluate an export by lm-evaluation-harness")
    parser.add_argument(
        "path", metavar="EXPORT", type=Path, help="an export (hf/step-N), or another Hugging Face folder"
    )
    names = "names of lm-eval, and paths of YAML files or folders of your own tasks (with a / or .yaml)"
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help=names)
    parser.add_argument("--include-path", nargs="+", default=[], metavar="FOLDER", help="folders of your own tasks")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question (default: what each task says)")
    parser.add_argument("--limit", type=float, help="only the first examples of each task; below 1, a share of them")
    parser.add_argument("--batch-size", type=int, default=8, help="requests at once (default: 8)")
    parser.add_argument("--apply-chat-template", action="store_true", help="ask in the tokenizer's chat format")
    parser.add_argument("--device", default="cpu", help="such as cuda:1 (default: cpu)")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="of the weights (default: as they are stored)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the modelling code of the export")
    parser.add_argument("--import", dest="module", help="module that registers an architecture of your own")
    output = "file of lines to add the result to, such as a run's evaluations.jsonl"
    parser.add_argument("--output", type=Path, metavar="FILE", help=output)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Returns 0; every failure is raised as a UserError."""
    if options.output is not None and not options.output.parent.is_dir():
        raise UserError(f"--output {options.output}: there is no folder {options.output.parent}; make it first")
    origin = origin_of_export(options.path)
    for name in environment_of_only_rank():  # with these it would wait for others, or take their device
        os.environ.pop(name, None)
    if options.module:
        try:
            importlib.import_module(options.module)
        except ModuleNotFoundError as e:
            raise ConfigError(f"--import: {e}; it must be importable from the current folder") from e
    from flame_ext.run.harness import Request, evaluate

    request = Request(
        tasks=tuple(options.tasks),
        include_path=tuple(options.include_path),
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        apply_chat_template=options.apply_chat_template,
        dtype=options.dtype,
    )
    try:
        found = evaluate(
            options.path,
            request,
            device=options.device,
            batch_size=options.batch_size,
            trust_remote_code=options.trust_remote_code,
        )
    except ImportError as e:
        raise UserError(f"flame-ext evaluate needs lm-evaluation-harness: pip install 'flame_ext[eval]' ({e})") from e
    line = {"step": origin["step"], **found, "export": {"path": str(options.path.resolve()), **origin}}
    if options.output is not None:
        from flame_ext.run.evaluations import record_evaluation

        record_evaluation(options.output, line)
    print(summary(line))
    return 0


def origin_of_export(folder: Path) -> dict[str, Any]:
    """Returns the run, step (0 if it is no export) and digest of the step's files that an export records.

    Raises:
        UserError: it is no folder of a model, or the model reads from right to left.
    """
    from flame_ext.hf_config import REVERSE_FIELD

    content: dict[str, dict[str, Any]] = {}
    for name in ("config.json", "export.json"):
        try:
            content[name] = json.loads((folder / name).read_text(encoding="utf-8"))
            content[name].get("step")
        except FileNotFoundError as e:
            if name == "config.json":
                raise UserError(
                    f"{folder}: has no config.json; name an export, such as outputs/debug/hf/step-60"
                ) from e
        except (OSError, ValueError, AttributeError, RecursionError) as e:
            raise UserError(f"{folder / name}: cannot be read: {type(e).__name__}: {e}; export the step again") from e
    if content["config.json"].get(REVERSE_FIELD):
        raise UserError(
            f"{folder}: the model reads text from right to left (data.reverse), and tasks ask from left to right; there is no "
            "figure of it that would mean something"
        )
    record = content.get("export.json", {})
    step = record.get("step", 0)
    if not isinstance(step, int):
        raise UserError(f"{folder / 'export.json'}: step is {step!r}, expected a number; export the step again")
    return {"run": record.get("run"), "step": step, "files_sha256": record.get("files_sha256")}


def summary(line: dict[str, Any]) -> str:
    """Returns the figures of a line with their standard errors, in one line."""
    parts = []
    for name, value in line.items():
        task, slash, metric = name.partition("/")
        metric, of_answers, answers = metric.partition("/")
        if slash and not metric.endswith("_stderr"):
            error = line.get(f"{task}/{metric}_stderr{of_answers}{answers}")
            shown = "not finite" if value is None else f"{value:.4g}"
            parts.append(f"{name} {shown}" + ("" if error is None else f" ± {error:.2g}"))
    examples = sum(line["examples"].values())
    return f"{', '.join(parts)} ({examples:,} examples in {line['seconds']:.1f} s)"
