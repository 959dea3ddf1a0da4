"""For ``experimental.custom_import``: from the fourth step on, the loss is not finite."""

from flame_ext.step import losses

cross_entropy_sum = losses.cross_entropy_sum
calls = 0


def overflowing(*args):
    global calls
    calls += 1
    return cross_entropy_sum(*args) * (1.0 if calls < 4 else float("inf"))


losses.cross_entropy_sum = overflowing
