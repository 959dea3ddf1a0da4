"""A step's files as DCP reads them, without pickles that may do as they please.

A step is this trainer's own, but whoever can write to the folder could put another one there. Its metadata is read with
the allow-list that DCP checkpoints of strangers are read with, what is not a tensor with ``weights_only``.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from flame_ext.errors import CheckpointError, SeedError
from flame_ext.seeding.sources.dcp import METADATA_NAME, read_metadata
from flame_ext.seeding.sources.safe_files import contained_file, require_plain_name


class StepReader(FileSystemReader):
    """Reads from one folder, and only the regular files that lie in it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._folder = path

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As the base class's.

        Raises:
            CheckpointError: the metadata is damaged, wants to run code, or names a file outside of the folder.
        """
        try:
            _, metadata = read_metadata(contained_file(self._folder, METADATA_NAME, "the step"))
            for info in (metadata.storage_data or {}).values():
                name = require_plain_name(info.relative_path, "an entry", self._folder / METADATA_NAME)
                contained_file(self._folder, name, METADATA_NAME)
        except SeedError as e:
            raise CheckpointError(str(e)) from e
        except (AttributeError, TypeError) as e:  # of a class that is allowed, with anything in it
            raise CheckpointError(f"{self._folder / METADATA_NAME}: is malformed ({e})") from e
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class StepPlanner(DefaultLoadPlanner):
    """Takes what is not a tensor for plain data."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """As the base class's.

        Raises:
            CheckpointError: the entry holds anything but tensors, numbers, text and containers of them.
        """
        try:
            torch.load(value, weights_only=True)
        except Exception as e:  # whatever bytes can be
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise CheckpointError(
                f"{read_item.dest_index.fqn!r} is not plain data and was not unpickled: {reason}"
            ) from e
        value.seek(0)
        super().load_bytes(read_item, value)
