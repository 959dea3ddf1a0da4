"""Read each rank's own slices out of the files, straight into the parameters."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flame_ext.errors import SeedError
from flame_ext.seeding.placement import local_region
from flame_ext.seeding.source import Source


@torch.no_grad()
def read_weights(source: Source, state: Mapping[str, Tensor], tied: Mapping[str, str], check_finite: bool) -> int:
    """Fill the tensors of ``state`` that the source holds, file by file in the order of the bytes.

    Files are memory-mapped and sliced, so beside the parameters there is one slice in memory at a time. Where the
    source holds a tied parameter under several names, all have to be equal.

    Args:
        source: the checked description of the files.
        state: key to parameter or buffer, DTensor or plain, to be written in place.
        tied: other name to key in ``state``.
        check_finite: whether NaN and infinities are refused.

    Returns:
        Bytes of the source that this rank has read.

    Raises:
        SeedError: naming file and key: a slice of another shape than the parameter's, a value that is not finite (in
            the file, or after the cast), two different values for one tied parameter.
    """
    by_file: dict[Path, list[tuple[int, str, str]]] = defaultdict(list)
    for name, entry in source.entries.items():
        key = tied.get(name, name)
        if key in state:
            by_file[entry.file].append((entry.offset, name, key))
    written: dict[str, str] = {}
    bytes_read = 0
    for file in sorted(by_file):
        try:
            with safe_open(file, framework="pt") as reader:
                for _, name, key in sorted(by_file[file]):
                    local, region = local_region(state[key])
                    if math.prod(s.stop - s.start for s in region) == 0 or local.numel() == 0:
                        written.setdefault(key, name)
                        continue
                    values = reader.get_slice(name)[region] if region else reader.get_tensor(name)
                    bytes_read += values.nbytes
                    if values.shape != local.shape:
                        raise SeedError(
                            f"{file}: {name!r}: got {list(values.shape)} for a shard of {list(local.shape)}: the file has changed"
                        )
                    if key not in written:
                        local.copy_(values)
                        written[key] = name
                        if check_finite:
                            _require_finite(file, name, values, local)
                    elif not torch.equal(local, values.to(device=local.device, dtype=local.dtype)):
                        raise SeedError(
                            f"{file}: {name!r} differs from {written[key]!r}, but the model ties them (tie_word_embeddings); "
                            "set tie_word_embeddings = false in config.json, or remove the one that is not meant"
                        )
        except (SafetensorError, OSError) as e:
            raise SeedError(f"{file}: can not be read: {e}") from e
    return bytes_read


def _require_finite(file: Path, name: str, values: Tensor, local: Tensor) -> None:
    # One cheap pass over good weights: a sum is finite only if every element is.
    if not math.isfinite(local.sum(dtype=torch.float32).item()) and not bool(torch.isfinite(local).all()):
        if bool(torch.isfinite(values).all()):
            raise SeedError(
                f"{file}: {name!r} ({values.dtype}) overflows {local.dtype}; set training.dtype to a wider type"
            )
        raise SeedError(f"{file}: {name!r} holds NaN or infinity; the file is damaged or its training had diverged")
