"""Make torchtitan, the host, importable and usable on a machine without an accelerator.

torchtitan 0.2.2 asks torch once, while it is imported, for the accelerator and its module, and takes CUDA where there
is none. On such a machine, once :func:`prepare_host` was called, the answer is "cpu" for the time of that import, with a
module that adds to ``torch.cpu`` the few functions that the host's memory monitor and barriers call. With an accelerator it
changes nothing. Nothing is imported before it is needed: torch and the host take seconds, and a tool may need neither.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

DETECTION = "torchtitan.tools.utils"
"""The module that asks for the device."""


class CpuDeviceModule(ModuleType):
    """``torch.cpu`` plus what torchtitan expects of a device module; memory figures are the process's resident set."""

    def __init__(self) -> None:
        super().__init__("flame_ext.host.device.cpu")

    def __getattr__(self, name: str) -> Any:
        import torch

        return getattr(torch.cpu, name)

    @staticmethod
    def current_device() -> int:
        # torch.cpu answers "cpu", which torch.distributed.barrier(device_ids=[...]) does not take.
        return 0

    @staticmethod
    def get_device_name(device: object = None) -> str:
        return "CPU"

    @staticmethod
    def get_device_properties(device: object = None) -> SimpleNamespace:
        return SimpleNamespace(total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    @staticmethod
    def memory_stats(device: object = None) -> dict[str, int]:
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak, "num_alloc_retries": 0, "num_ooms": 0}

    @staticmethod
    def reset_peak_memory_stats(device: object = None) -> None:
        """The kernel's peak of the resident set can not be reset without privileges: it stays the run's peak."""

    @staticmethod
    def empty_cache() -> None:
        """The CPU allocator keeps no cache of its own."""


class _Detection(MetaPathFinder):
    """Finds :data:`DETECTION` where it is, and runs it with other answers where there is no accelerator."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == DETECTION else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            from unittest import mock

            import torch

            if torch.accelerator.is_available():
                return execute(module)
            with (
                mock.patch.object(torch._utils, "_get_available_device_type", return_value="cpu"),
                mock.patch.object(torch._utils, "_get_device_module", return_value=CpuDeviceModule()),
            ):
                execute(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def prepare_host() -> None:
    """From here on, an import of torchtitan finds the device that is there. Safe to call again.

    Raises:
        RuntimeError: if torchtitan was imported before flame_ext on a machine without accelerator, since it has then
            bound itself to CUDA.
    """
    loaded = sys.modules.get(DETECTION)
    if loaded is not None:
        import torch

        if not torch.accelerator.is_available() and loaded.device_type != "cpu":
            raise RuntimeError("import flame_ext before torchtitan: without an accelerator the host would bind to CUDA")
    elif not any(isinstance(finder, _Detection) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Detection())
