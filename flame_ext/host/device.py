"""Makes torchtitan usable without an accelerator: while it is imported, torch says that the device is the CPU.

torchtitan 0.2.2 takes CUDA otherwise. Torch and torchtitan are imported only when they are needed, since both take seconds.
"""

import os
import resource
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace

DETECTION = "torchtitan.tools.utils"  # the module that asks for the device


def cpu_device_module() -> ModuleType:
    """Return ``torch.cpu`` plus what torchtitan expects of a device module; memory is the process's peak resident set."""
    import torch

    def memory_stats(device: object = None) -> dict[str, int]:
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak, "num_alloc_retries": 0, "num_ooms": 0}

    def no_effect(device: object = None) -> None:
        """The kernel's peak cannot be reset without privileges, and the CPU allocator keeps no cache."""

    total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    module = ModuleType("flame_ext.host.device.cpu")
    module.__dict__.update(
        {name: value for name, value in vars(torch.cpu).items() if not name.startswith("__")},
        current_device=lambda: 0,  # torch.distributed.barrier(device_ids=[...]) does not take torch.cpu's "cpu"
        get_device_name=lambda device=None: "CPU",
        get_device_properties=lambda device=None: SimpleNamespace(total_memory=total_memory),
        memory_stats=memory_stats,
        reset_peak_memory_stats=no_effect,
        empty_cache=no_effect,
    )
    return module


class _Detection(MetaPathFinder):
    """Finds :data:`DETECTION`, and patches torch while it is executed if there is no accelerator."""

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
                mock.patch.object(torch._utils, "_get_device_module", return_value=cpu_device_module()),
            ):
                execute(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def prepare_host() -> None:
    """Let imports of torchtitan find the device that is there. Safe to call again.

    Raises RuntimeError if torchtitan was imported before flame_ext without an accelerator, and so is bound to CUDA.
    """
    loaded = sys.modules.get(DETECTION)
    if loaded is not None:
        import torch

        if not torch.accelerator.is_available() and loaded.device_type != "cpu":
            raise RuntimeError(
                "import flame_ext before torchtitan: without an accelerator torchtitan would bind to CUDA"
            )
    elif not any(isinstance(finder, _Detection) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Detection())
