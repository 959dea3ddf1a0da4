"""For ``experimental.custom_import``: the loss of the second step is not finite, and only that one."""

from flame_ext.step import losses

cross_entropy_sum = losses.cross_entropy_sum
calls = 0


def overflowing(*args):
    global calls
    calls += 1
    return cross_entropy_sum(*args) * (float("inf") if calls == 2 else 1.0)


losses.cross_entropy_sum = overflowing
