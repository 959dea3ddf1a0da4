"""The table of what is taken from torchtitan is complete, and nothing in it is taken past :mod:`flame_ext.host`."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import flame_ext.host
from flame_ext.host.names import NAMES

PACKAGE = Path(flame_ext.host.__file__).parents[1]
TREES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): ast.parse(file.read_text())
    for file in PACKAGE.rglob("*.py")
}


def table() -> dict[str, set[str]]:
    """The table's full names, each with the modules that use it."""
    rows: dict[str, str] = {}
    module = name = ""
    edges = [len(part) for part in re.findall(r"=+ +", flame_ext.host.__doc__ or "")[:2]]
    for line in re.split(r"^=+ .*\n", flame_ext.host.__doc__ or "", flags=re.M)[2].splitlines():
        if not line.startswith(" "):
            module = line
            continue
        if first := line[: edges[0]].strip():
            rows[name := f"{module}.{first}"] = ""
        rows[name] += line[edges[0] : sum(edges)] + " "
    return {name: set(re.findall(r"(?:^|(?<=,))\s*([a-z_.0-9]+)(?=[:,]|\s*$)", used)) for name, used in rows.items()}


@cache
def imports(tree: ast.AST) -> set[str]:
    """Full names of what is imported, wherever in the file."""
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    whole = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return whole | {f"{node.module}.{alias.name}" for node in froms for alias in node.names}


def taken_by_host() -> dict[str, set[str]]:
    """Names that host/ takes, imported, patched or as text, with the modules that use them through it."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, tree in TREES.items():
        for name in imports(tree):
            if name.startswith("flame_ext.host.names."):
                found[NAMES[name.removeprefix("flame_ext.host.names.")]].add(module)
            elif module.startswith("host.") and name.startswith("torchtitan.") and name != "torchtitan.train":
                found[name].add(module)
        for node in ast.walk(tree) if module.startswith("host.") else ():
            if isinstance(node, ast.Call) and ast.unparse(node).startswith("mock.patch.object(torchtitan."):
                found[f"{ast.unparse(node.args[0])}.{ast.literal_eval(node.args[1])}"].add(module)
            elif isinstance(node, ast.Constant) and re.fullmatch(r"torchtitan(\.\w+)+", str(node.value)):
                found[str(node.value)] |= {module} - {"host.names"}
    return found


def test_the_table_lists_what_is_taken_and_by_whom() -> None:
    assert table() == taken_by_host()


def test_nothing_of_the_table_and_nothing_private_is_imported_past_it() -> None:
    listed = {name.rpartition(".")[2] for name in NAMES.values()}
    for module, tree in TREES.items():
        if module.startswith("host."):
            continue
        for name in imports(tree):
            first, *parts = name.split(".")
            if first == "torchtitan" and parts:
                assert parts[-1] not in listed and parts[0] not in ("models", "train"), (
                    f"{module}: {name} is in the table"
                )
                assert not any(part.startswith("_") for part in parts), f"{module}: {name} is private"
        if "torchtitan" in imports(tree):  # for its version
            whole = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "torchtitan")
            assert {node.attr for node in whole} <= {"__version__"}, f"{module}: take it from where it lies"


def test_no_class_that_is_imported_past_the_table_has_private_methods_overridden() -> None:
    spec = find_spec("torchtitan")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    looked_at = 0
    for module, tree in TREES.items():
        direct = {name.rpartition(".")[2]: name for name in imports(tree) if name.startswith("torchtitan.")}
        for node in ast.walk(tree):
            for base in node.bases if isinstance(node, ast.ClassDef) else ():
                if (full := direct.get(ast.unparse(base))) is None:
                    continue
                looked_at += 1
                mine = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
                mine |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
                source = folder.joinpath(*full.split(".")[1:-1])
                file = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
                theirs = set(re.findall(r"(?:def |self\.)(_[a-z]\w*)", file.read_text()))
                assert not mine & theirs, f"{module}: {node.name} uses what is private in {full}"
    assert looked_at
