"""For ``experimental.custom_import``: ``async_with_pinned_mem`` in shared memory that is not pinned: no accelerator is needed."""

from concurrent.futures import Future
from types import SimpleNamespace

from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torchtitan.components import checkpoint

from flame_ext.preflight import options


class UnpinnedStager(DefaultStager):
    """Copies at once, and says so as the asynchronous one does."""

    def __init__(self, _options):
        super().__init__(StagingOptions(False, True, False, False))

    def stage(self, *args, **kwargs):
        staged = Future()
        staged.set_result(super().stage(*args, **kwargs))
        return staged


checkpoint.DefaultStager = UnpinnedStager
options.torch = SimpleNamespace(accelerator=SimpleNamespace(is_available=lambda: True))
