"""Keys and values that travel in pieces: the numbers of one gathering, and what is in flight while heads attend."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flame_ext.model.attention import BOOLEAN_ATTENTION
from flame_ext.model.context_parallel import ContextParallel, joined
from tests.ranks import run_ranks

RANKS, LENGTH = 2, 32
# The attention, heads of queries, of keys and values, sizes of keys and of values, and further arguments.
CASES: dict[str, tuple[str, int, int, int, int, dict[str, Any]]] = {
    "sdpa": ("sdpa", 8, 8, 16, 16, {}),
    "grouped": ("sdpa", 8, 4, 16, 16, {"scaling": 0.3}),
    "six heads": ("sdpa", 6, 6, 8, 8, {}),
    "multi-query": ("sdpa", 4, 1, 16, 16, {}),
    "latent": ("sdpa", 4, 4, 24, 16, {}),
    "soft-capped": (BOOLEAN_ATTENTION, 8, 4, 16, 16, {"softcap": 5.0}),
    "sinks": (BOOLEAN_ATTENTION, 8, 4, 16, 16, {"s_aux": torch.linspace(-1, 2, 8)}),
    "flex": ("flex_attention", 4, 2, 16, 16, {"softcap": 5.0}),
}


def inputs(case: str) -> tuple[list[Tensor], Tensor, Any, dict[str, Any]]:
    """In a rank: queries, keys and values; a gradient of the output; a mask with a window; and further arguments."""
    _, heads, groups, size, value_size, more = CASES[case]
    generator = torch.Generator().manual_seed(dist.get_rank())
    shapes = [(2, heads, LENGTH, size), (2, groups, LENGTH, size), (2, groups, LENGTH, value_size)]
    states = [torch.randn(shape, generator=generator) for shape in (*shapes, (2, LENGTH, heads, value_size))]
    rows = torch.arange(LENGTH)[:, None] + dist.get_rank() * LENGTH
    ahead = rows - torch.arange(RANKS * LENGTH)
    mask: Any = ((ahead >= 0) & (ahead < 40))[None, None]
    return states[:3], states[3], mask, more


def results(case: str, attention: Any) -> list[Tensor]:
    """The output, and gradients where the attention has a backward on a CPU."""
    states, gradient, mask, more = inputs(case)
    module = SimpleNamespace(num_key_value_groups=states[0].shape[1] // states[1].shape[1], training=False)
    if case == "flex":
        from torch.nn.attention.flex_attention import create_block_mask

        of_rank = dist.get_rank() * LENGTH

        def causal(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return row + of_rank >= column

        mask = create_block_mask(causal, None, None, LENGTH, RANKS * LENGTH, device="cpu")
        with torch.no_grad():
            return [attention(module, *states, mask, **more)[0]]
    leaves = [state.requires_grad_() for state in states]
    output = attention(module, *leaves, mask, **more)[0]
    output.backward(gradient)
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def compare(cases: list[str]) -> dict[str, list[bool]]:
    """In a rank: whether pieces give the bits of one gathering by other code."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("cp",))
    ContextParallel(mesh, None)
    same = {}
    for case in cases:
        name = CASES[case][0]

        def at_once(
            module: Any, query: Tensor, key: Tensor, value: Tensor, *mask: Any, name: str = name, **more: Any
        ) -> Any:
            whole = joined(key, mesh, 2), joined(value, mesh, 2)
            return ALL_ATTENTION_FUNCTIONS[name](module, query, *whole, *mask, **more)

        pairs = zip(
            results(case, ALL_ATTENTION_FUNCTIONS[ContextParallel.attention_name(name)]),
            results(case, at_once),
            strict=True,
        )
        same[case] = [bool(torch.equal(*pair)) and bool(pair[0].abs().max() > 0) for pair in pairs]
    dist.destroy_process_group()
    return same


def expect_same(cases: list[str], folder: Path) -> None:
    for rank in run_ranks(compare, RANKS, cases, folder=folder):
        assert rank.exit_code == 0, rank.output[-3000:]
        assert rank.value == {case: [True] * (1 if case == "flex" else 4) for case in cases}


def test_pieces_give_the_bits_of_one_gathering(tmp_path: Path) -> None:
    expect_same([case for case in CASES if case != "flex"], tmp_path)


@pytest.mark.matrix  # it compiles for the CPU
def test_pieces_give_the_bits_of_one_gathering_to_flex_attention(tmp_path: Path) -> None:
    expect_same(["flex"], tmp_path)


WATCHED = {
    "all_gather_into_tensor": "gather",
    "wait_tensor": "wait",
    "reduce_scatter_tensor": "reduce",
    "_scaled_dot_product_flash_attention_for_cpu": "attend",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "attend",
}


class Calls(TorchDispatchMode):
    """Notes which operators run, by the names that they have in this test."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += filter(None, [WATCHED.get(func.overloadpacket.__name__)])
        return func(*args, **(kwargs or {}))


def watch() -> tuple[list[str], list[str]]:
    """In a rank: the operators of a forward and of its backward."""
    dist.init_process_group("gloo")
    ContextParallel(init_device_mesh("cpu", (RANKS,), mesh_dim_names=("cp",)), None)
    states, gradient, mask, more = inputs("sdpa")
    module = SimpleNamespace(num_key_value_groups=1)
    leaves = [state.requires_grad_() for state in states]
    with Calls() as forward:
        output = ALL_ATTENTION_FUNCTIONS[ContextParallel.attention_name("sdpa")](module, *leaves, mask, **more)[0]
    with Calls() as backward:
        output.backward(gradient)
    dist.destroy_process_group()
    return forward.seen, backward.seen


def test_pieces_travel_while_heads_attend(tmp_path: Path) -> None:
    for rank in run_ranks(watch, RANKS, folder=tmp_path):
        assert rank.exit_code == 0, rank.output[-3000:]
        forward, backward = rank.value
        assert forward == ["gather"] * 4 + ["wait", "attend"] * 4, "all are under way before the first is waited for"
        assert backward == ["attend", "reduce"] * 4 + ["wait"] * 4, (
            "sums are under way while the next heads' gradients are computed"
        )
