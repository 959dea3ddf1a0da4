"""Renames the keys of files to the model's: first as ``seed.key_map`` says, then as ``from_pretrained`` does.

Where that also makes one tensor of several (the experts of a layer), the result is described as made of them.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedConfig
from transformers import core_model_loading as loading

from flame_ext.errors import SeedError
from flame_ext.seeding.conversion import converted
from flame_ext.seeding.sources.safe_files import some
from flame_ext.seeding.sources.source import Source, TensorEntry

Rule = tuple[str, str]

# Under these names torch.compile, DDP, FSDP and activation checkpointing hold the module that they wrap.
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def parse_key_map(rules: Iterable[str], where: str = "seed.key_map") -> list[Rule]:
    """Split the ``"old=new"`` rules of option ``where`` into pairs; raise SeedError if one is malformed or two begin alike."""
    parsed: list[Rule] = []
    for rule in rules:
        old, equals, new = rule.partition("=")
        if not (equals and old and new) or old == new:
            raise SeedError(f"{where}: {rule!r} is not 'old=new', two different beginnings of keys")
        if old.count("*") != new.count("*"):
            raise SeedError(
                f"{where}: {rule!r} has not as many * on both sides; each * is one part of a key, such as a layer's number"
            )
        if old in dict(parsed):
            raise SeedError(f"{where}: two rules rename {old!r}; keep one")
        parsed.append((old, new))
    return parsed


def rename(key: str, rules: Iterable[Rule], nesting: str = "") -> str:
    """Replace the beginning of a key by the first rule that fits, also behind the source's ``nesting``; a ``*`` is any one part."""
    for old, new in rules:
        pattern = re.escape(old).replace(r"\*", "([^.]+)")
        for prefix in ("", nesting):
            if found := re.match(re.escape(prefix) + pattern, key):
                first, *others = new.split("*")
                new = first + "".join(part + other for part, other in zip(found.groups(), others, strict=True))
                return prefix + new + key[found.end() :]
    return key


def unwrapped(key: str, wrappers: Collection[str]) -> str:
    """Take the names of modules that wrap others out of a key."""
    return ".".join(part for part in key.split(".") if part not in wrappers)


def renamed(source: Source, rules: list[Rule], where: str = "seed.key_map") -> Source:
    """Rename a source's entries; raise SeedError if a rule fits no key, or two keys become one."""
    entries: dict[str, TensorEntry] = {}
    for key, entry in source.entries.items():
        new = rename(key, rules, source.nesting)
        if new in entries:
            raise SeedError(f"{source.path}: {where} makes {new!r} of both {entries[new].key!r} and {key!r}")
        entries[new] = entry
    for rule in rules:
        if all(rename(key, [rule], source.nesting) == key for key in source.entries):
            keys = some(source.entries)
            raise SeedError(f"{source.path}: {where}: no key begins with {rule[0]!r} (keys: {keys}); take it out")
    return replace(source, entries=entries)


@dataclass(frozen=True)
class KeyNames:
    """Maps the keys of an architecture's files to the model's."""

    model_keys: dict[str, tuple[int, ...]]
    """Every name of a parameter or saved buffer, tied ones included, to its shape."""
    transforms: tuple[loading.WeightTransform, ...] = ()  # Result of ``get_model_conversion_mapping``
    base_model_prefix: str | None = None
    ignored: Callable[[set[str]], set[str]] = lambda _names: set()
    """Returns those of the files' keys, renamed and unknown to the model, that ``from_pretrained`` ignores."""

    config: PreTrainedConfig | None = None  # Which some conversions ask

    def in_model(self, key: str, any_prefix: bool = True) -> tuple[str, str | None]:
        """Return the model's name of a file's key, or the key itself if it is unknown; and the pattern of the conversion by which
        it becomes a part of that tensor, None if it is the tensor.

        With ``any_prefix``, the base model's prefix may be missing or stand twice, as in ``from_pretrained``.
        """
        if key in self.model_keys:
            return key, None
        prefix = self.base_model_prefix if any_prefix else None
        found = loading.rename_source_key(key, self._renamings, [*self._converters], prefix, self.model_keys)
        if found[0] in self.model_keys:
            return found
        return loading.rename_source_key(key, self._renamings, [], prefix, self.model_keys)[0], None

    def converter(self, pattern: str) -> loading.WeightConverter:
        """Return the conversion that a pattern belongs to, as ``from_pretrained`` chooses it: the last one."""
        return next(converter for converter in reversed(self._converters) if pattern in converter.source_patterns)

    @cached_property
    def _renamings(self) -> list[loading.WeightRenaming]:
        return [t for t in self.transforms if isinstance(t, loading.WeightRenaming)]

    @cached_property
    def _converters(self) -> list[loading.WeightConverter]:
        return [t for t in self.transforms if isinstance(t, loading.WeightConverter)]


def in_model_names(source: Source, names: KeyNames) -> Source:
    """Return the model's part of the source, under the model's names.

    Raises SeedError if two keys become one, a conversion lacks a tensor or is not known, or a DCP checkpoint is flat and nested at
    once.
    """
    own = {part for key in names.model_keys for part in key.split(".")}
    source = _without_wrappers(source, {*_WRAPPERS} - own)
    # "model." before every key is what tells nested from flat, so a prefix counts only where nothing fits without.
    source = source.for_model(
        lambda key: names.in_model(key, any_prefix=False)[0] in names.model_keys,
        lambda key: names.in_model(key)[0] in names.model_keys,
    )
    entries: dict[str, TensorEntry] = {}
    parts: dict[str, dict[str, dict[str, TensorEntry]]] = defaultdict(lambda: defaultdict(dict))

    def add(name: str, entry: TensorEntry) -> None:
        if name in entries:
            both = f"{entries[name].key!r} and {entry.key!r} are both {name!r}"
            raise SeedError(f"{source.path}: {both} of the model; keep one")
        entries[name] = entry

    for key in sorted(source.entries, key=loading.dot_natural_key):  # the order in which transformers renames
        name, pattern = names.in_model(key)
        if pattern is None:
            add(name, source.entries[key])
        else:
            parts[name][pattern][key] = source.entries[key]
    for name, stored in parts.items():
        converter = names.converter(next(iter(stored)))
        if others := stored.keys() - {*converter.source_patterns}:
            keys = some(repr(key) for pattern in others for key in stored[pattern])
            raise SeedError(
                f"{source.path}: {keys}: become {name!r} of the model by another conversion than the rest; keep one"
            )
        for made, entry in converted(source.path, name, stored, converter, names.model_keys, names.config).items():
            add(made, entry)
    if unused := names.ignored({*entries} - {*names.model_keys}):
        ignored = tuple(sorted(entries.pop(name).key for name in unused))
        said = f"{some(ignored)}: {len(ignored)} keys that from_pretrained ignores"
        source = replace(source, ignored=ignored, passed_over=(*source.passed_over, said))
    return replace(source, entries=entries)


def _without_wrappers(source: Source, wrappers: set[str]) -> Source:
    found = sorted(wrappers.intersection(part for key in source.entries for part in key.split(".")))
    if not found:
        return source
    entries: dict[str, TensorEntry] = {}
    for key, entry in source.entries.items():
        if (new := unwrapped(key, found)) in entries:
            raise SeedError(
                f"{source.path}: {entry.key!r} and {entries[new].key!r} are both {new!r} without {', '.join(found)}; keep one"
            )
        entries[new] = entry
    said = f"{', '.join(found)} in the keys, as wrappers of modules leave them there"
    return replace(source, entries=entries, wrappers=tuple(found), passed_over=(*source.passed_over, said))
