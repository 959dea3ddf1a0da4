"""For ``experimental.custom_import``: the second update leaves a weight that is not finite."""

import torch
from torchtitan.components.optimizer import OptimizersContainer

step = OptimizersContainer.step
updates = 0


def overflowing(self, *args, **kwargs):
    global updates
    step(self, *args, **kwargs)
    updates += 1
    if updates == 2:
        with torch.no_grad():
            self.model_parts[0].lm_head.weight[3, 5] = float("inf")


OptimizersContainer.step = overflowing
