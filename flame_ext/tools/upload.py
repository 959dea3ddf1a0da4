"""``flame-ext upload``: copies an export into an object store, or pushes it to the Hugging Face Hub."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from flame_ext.errors import ConfigError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the command and its options."""
    parser = commands.add_parser("upload", help="copy an export into an object store or to the Hub, or go on with it")
    parser.add_argument("source", metavar="EXPORT", type=Path, help="an export of a step: hf/step-N of a run")
    where = "a URL such as s3://bucket/prefix, under which the folder keeps its name; or hf://org/name"
    parser.add_argument("destination", metavar="DST", help=where)
    public = "make the repository public if it is not there; without it, a public one is refused"
    parser.add_argument("--public", action="store_true", help=public)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Returns 0; every failure is raised as a UserError."""
    from flame_ext.checkpoint.push import push
    from flame_ext.checkpoint.upload import upload
    from flame_ext.object_stores import is_url

    if repository := re.fullmatch(r"hf://([\w.-]+/[\w.-]+)", options.destination):
        print(push(options.source, repository[1], private=not options.public))
    elif is_url(options.destination):
        print(upload(options.source, options.destination))
    else:
        raise ConfigError(f"{options.destination}: expected a URL such as s3://bucket/prefix, or hf://org/name")
    return 0
