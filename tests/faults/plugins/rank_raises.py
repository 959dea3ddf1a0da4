"""For ``experimental.custom_import``: rank 1 fails in the forward of its third step."""

import os

from flame_ext.trainer import FutureTrainer

forward_backward_step = FutureTrainer.forward_backward_step


def failing(self, **kwargs):
    if self.step == 3 and os.environ["RANK"] == "1":
        raise RuntimeError("this rank has failed")
    return forward_backward_step(self, **kwargs)


FutureTrainer.forward_backward_step = failing
