"""Keys in files are not always the model's: GPT-NeoX files say ``embed_out.weight`` where the model has ``lm_head.weight``.

transformers knows both, and what it knows is used here, so that a key becomes what ``from_pretrained`` makes of it. Where
its conversion does more than rename (fused experts), the values in the files are not the model's, and the source is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.dcp import NESTED_PREFIX, DcpSource, in_model_layout
from flame_ext.seeding.sources.source import Source, TensorEntry


@dataclass(frozen=True)
class KeyNames:
    """How one architecture's keys are spelled in files."""

    architecture: str
    model_keys: Mapping[str, tuple[int, ...]]
    """Every name of a parameter or saved buffer, tied ones included, to its shape."""
    transforms: tuple[WeightTransform, ...] = ()
    """transformers' own, for this model (``get_model_conversion_mapping``)."""
    base_model_prefix: str | None = None
    """Files of the base model alone lack it."""

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self.model_keys)

    @cached_property
    def _renamings(self) -> list[WeightRenaming]:
        return [t for t in self.transforms if isinstance(t, WeightRenaming)]

    @cached_property
    def _converters(self) -> list[WeightConverter]:
        return [t for t in self.transforms if isinstance(t, WeightConverter)]

    def in_model(self, key: str, any_prefix: bool = True) -> str:
        """The model's name of a file's key; the key itself where nothing is known of it.

        Args:
            key: as a file has it.
            any_prefix: whether the base model's prefix may be missing or stand twice, as ``from_pretrained`` lets it.

        Raises:
            SeedError: its values would have to be converted.
        """
        name, converted_by = rename_source_key(
            key,
            self._renamings,
            self._converters,
            self.base_model_prefix if any_prefix else None,
            self._shapes,
        )
        if converted_by is not None:
            raise SeedError(
                f"{self.architecture}: {key!r} is stored in another form than the model's (transformers converts "
                f"{converted_by!r} while loading); such architectures, mixtures of experts first of all, can not be seeded from "
                "their files; only dense models can"
            )
        return key if key in self.model_keys else name


def in_model_names(source: Source, names: KeyNames) -> Source:
    """The source with its entries under the model's names.

    Raises:
        SeedError: two keys become the same name; a key needs more than a new name; a DCP checkpoint that is flat and
            nested at once.
    """
    if isinstance(source, DcpSource):
        # "model." before every key is what tells nested from flat, so a prefix counts only where nothing fits without.
        keys = {k for key in (*source.entries, *source.objects) for k in (key, key.removeprefix(NESTED_PREFIX))}
        any_prefix = not any(names.in_model(key, any_prefix=False) in names.model_keys for key in keys)
        source = in_model_layout(source, lambda key: names.in_model(key, any_prefix) in names.model_keys)
    entries: dict[str, TensorEntry] = {}
    for key in sorted(source.entries, key=dot_natural_key):  # the order in which transformers renames
        name = names.in_model(key)
        if name in entries:
            raise SeedError(
                f"{source.path}: {entries[name].key!r} and {source.entries[key].key!r} are both {name!r} of the model; keep one"
            )
        entries[name] = source.entries[key]
    return replace(source, entries=entries)
