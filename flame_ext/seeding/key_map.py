"""New names for keys of files that no architecture explains: heads that earlier scripts saved as ``ln.weight``, ``proj.weight``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.dcp import NESTED_PREFIX
from flame_ext.seeding.sources.source import Source, TensorEntry

Rule = tuple[str, str]


def parse_key_map(rules: Iterable[str], where: str = "seed.key_map") -> list[Rule]:
    """``"old=new"`` to beginnings of keys.

    Args:
        rules: the first that fits a key renames it.
        where: they come from, for the message.

    Raises:
        SeedError: a rule is not of that form, or two begin alike.
    """
    parsed: list[Rule] = []
    for rule in rules:
        old, equals, new = rule.partition("=")
        if not (equals and old and new) or old == new:
            raise SeedError(f"{where}: {rule!r} is not 'old=new', two different beginnings of keys")
        if old in dict(parsed):
            raise SeedError(f"{where}: two rules rename {old!r}; keep one")
        parsed.append((old, new))
    return parsed


def rename(key: str, rules: Iterable[Rule], nested: bool = False) -> str:
    """The key with the beginning that the first fitting rule gives it; as it is if none fits.

    Args:
        key: as a file has it.
        rules: of :func:`parse_key_map`.
        nested: rules also fit behind "model.", which a nested DCP checkpoint has before every key of the model.
    """
    for old, new in rules:
        for prefix in ("", NESTED_PREFIX) if nested else ("",):
            if key.startswith(prefix + old):
                return prefix + new + key[len(prefix + old) :]
    return key


def renamed(source: Source, rules: list[Rule], where: str = "seed.key_map") -> Source:
    """The source with its entries under the names that the rules give them.

    Raises:
        SeedError: a rule fits no key, or two keys become one.
    """
    nested = source.layout == "dcp-nested"
    entries: dict[str, TensorEntry] = {}
    for key, entry in source.entries.items():
        new = rename(key, rules, nested)
        if new in entries:
            raise SeedError(f"{source.path}: {where} makes {new!r} of both {entries[new].key!r} and {key!r}")
        entries[new] = entry
    for rule in rules:
        if all(rename(key, [rule], nested) == key for key in source.entries):
            keys = ", ".join(sorted(source.entries)[:8])
            raise SeedError(f"{source.path}: {where}: no key begins with {rule[0]!r} (keys: {keys}, …); take it out")
    return replace(source, entries=entries)
