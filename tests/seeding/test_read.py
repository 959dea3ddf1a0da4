"""Reading: casts and overflow, ties, integer buffers, the line that is logged meanwhile, and what it costs in memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, OlmoeConfig

from flame_ext.errors import SeedError
from flame_ext.model.initialisation import Uniform
from flame_ext.seeding import copying
from flame_ext.seeding.accounting import account
from flame_ext.seeding.names import in_model_names
from flame_ext.seeding.new_parameters import initialise
from flame_ext.seeding.read import logged_progress, read_weights
from flame_ext.seeding.sources.open import open_source
from flame_ext.tools.architecture import load_architecture
from tests.ranks import run_ranks
from tests.sources import save_dcp


def save_source(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("found", "needed", "value", "overflows"),
    [
        (torch.float64, torch.float32, 1e39, True),
        (torch.float32, torch.float16, 7e4, True),
        (torch.bfloat16, torch.float16, 7e4, True),
        (torch.float32, torch.bfloat16, 3.4e38, True),
        (torch.float64, torch.float32, 1e38, False),
        (torch.float16, torch.bfloat16, 6e4, False),
    ],
)
@pytest.mark.parametrize("check_finite", [True, False])
def test_an_overflow_in_the_cast_is_an_error_in_every_mode(
    tmp_path: Path, found: torch.dtype, needed: torch.dtype, value: float, overflows: bool, check_finite: bool
) -> None:
    folder = save_source(tmp_path / "s", {"x": torch.tensor([1.0, value], dtype=torch.float64).to(found)})
    state = {"x": torch.zeros(2, dtype=needed)}
    if overflows:
        with pytest.raises(SeedError, match=f"model.safetensors: 'x' .{found}. overflows {needed}"):
            read_weights(open_source(folder), state, {}, check_finite)
    else:
        assert read_weights(open_source(folder), state, {}, check_finite) == 2 * found.itemsize
        assert torch.equal(state["x"], torch.tensor([1.0, value], dtype=torch.float64).to(found).to(needed))


def test_large_finite_weights_are_finite(tmp_path: Path) -> None:
    """Their sum is not, which is what is looked at first."""
    folder = save_source(tmp_path / "s", {"x": torch.full((4,), 3e38)})
    read_weights(open_source(folder), {"x": torch.zeros(4)}, {}, check_finite=True)


def test_an_integer_buffer_is_read_as_it_is_and_never_cast(tmp_path: Path) -> None:
    source = open_source(save_source(tmp_path / "s", {"steps": torch.tensor([2**62 + 1])}))

    def fits(dtype: torch.dtype) -> list[str]:
        return account({"steps": torch.empty(1, dtype=dtype)}, {}, [], [], source, [], []).loaded

    state = {"steps": torch.zeros(1, dtype=torch.int64)}
    assert fits(torch.int64) == ["steps"]
    read_weights(source, state, {}, check_finite=True)
    assert state["steps"].item() == 2**62 + 1
    for dtype in (torch.int32, torch.float32):
        with pytest.raises(SeedError, match="'steps' in model.safetensors has dtype int64; only unquantised"):
            fits(dtype)


def test_a_piece_that_is_left_out_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(save_dcp({"x": torch.ones(4, 3)}, tmp_path / "dcp"))
    object.__setattr__(source.entries["x"], "chunks", ())
    with pytest.raises(SeedError, match="'x': elements .* were to be written exactly once, written were"):
        read_weights(source, {"x": torch.zeros(4, 3)}, {}, check_finite=True)


MIB = 2**20


def test_a_line_at_most_every_few_seconds(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    progress = logged_progress(interval=5.0, clock=lambda: now[0])
    with caplog.at_level(logging.INFO):
        for seconds in range(1, 13):
            now[0] = float(seconds)
            progress(seconds * 10 * MIB, 120 * MIB)
    assert [r.getMessage() for r in caplog.records] == [
        "Reading weights: 50 of 120 MiB on this rank, 10 MiB/s",
        "Reading weights: 100 of 120 MiB on this rank, 10 MiB/s",
    ]


LARGE = {f"layer.{i}": (2048, 4096) for i in range(6)}  # 16 MiB each in bfloat16, 32 MiB in float32


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def peak_of_reading(folder: str) -> tuple[int, int]:
    """In a rank: its shards are there and touched; what reading adds to them at its peak, and the bytes read."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = 2048 // dist.get_world_size()
    state = {
        key: DTensor.from_local(torch.full((rows, 4096), float("nan")), mesh, [Shard(0)], run_check=False)
        for key in LARGE
    }
    source = open_source(folder, allow_pickle=True)
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    nbytes = read_weights(source, state, {}, check_finite=True)
    done.set()
    watcher.join()
    dist.destroy_process_group()
    return peak[0] - before, nbytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
@pytest.mark.parametrize("layout", ["hf-safetensors", "hf-bin", "dcp-flat"])
def test_reading_takes_no_memory_beside_the_shards(tmp_path: Path, layout: str) -> None:
    """The claim is at most two tensors (64 MiB here); a view of the file, cast into its place, takes none."""
    tensors = {key: torch.randn(shape, dtype=torch.bfloat16) for key, shape in LARGE.items()}
    folder = tmp_path / "source"
    if layout == "dcp-flat":
        save_dcp(tensors, folder)
    else:
        save_source(folder, tensors)
    if layout == "hf-bin":
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    for rank in run_ranks(peak_of_reading, 2, str(folder), folder=tmp_path / "ranks"):
        assert rank.exit_code == 0, rank.output
        added, nbytes = rank.value
        assert nbytes == 6 * 8 * MIB, "its own half of each tensor"
        assert added <= 2 * 32 * MIB, f"{added / MIB:.1f} MiB"


EXPERT = 1024 * 256 * 2  # bytes of one matrix of an expert as stored, in bfloat16


def save_mixture(folder: Path) -> Path:
    """One layer of 8 experts, in bfloat16, one tensor for each expert and matrix; nothing else is as large."""
    shape = {
        "vocab_size": 264,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "eos_token_id": 0,
    }
    config = OlmoeConfig(**shape, num_hidden_layers=1, num_key_value_heads=4, num_experts=8, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


class InThisThread(Executor):
    """A pool in which nothing is parallel: the profiler sees the thread that it is started in."""

    def __init__(self, *args: object, **options: object) -> None: ...

    def submit(self, function, /, *args, **options):
        future: Future = Future()
        future.set_result(function(*args, **options))
        return future


def allocated(run: Callable[[], object], mapped: int) -> int:
    """The most bytes of tensors that a function has allocated at one time, torch's own copies inside of operations included.

    A file that is mapped counts as an allocation for the profiler; those of ``mapped`` bytes are left out.
    """
    with (
        mock.patch.object(copying, "ThreadPoolExecutor", InThisThread),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        run()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = profiled.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]" and abs(event.nbytes()) != mapped]
    return max(accumulate(changes, initial=0))


def allocated_by_reading(folder: str) -> dict[tuple[torch.dtype, int], tuple[int, bool]]:
    """In a rank, for each dtype and sharded axis: bytes that reading allocates beside the shards, and whether the values are right."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo")
    mesh, rank = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank()
    architecture = load_architecture(Path(folder))
    source = in_model_names(open_source(folder), architecture.names)
    assert max(entry.nbytes for one in source.entries.values() for entry in one.stored_tensors) == EXPERT
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    found, mapped = {}, (Path(folder) / "model.safetensors").stat().st_size
    for dtype, axis in product((torch.float32, torch.bfloat16), (0, 1)):
        state = {
            key: distribute_tensor(torch.full(shape, float("nan"), dtype=dtype), mesh, [Shard(axis)])
            for key, shape in architecture.shapes.items()
            if len(shape) > axis
        }
        most = allocated(partial(read_weights, source, state, {}, check_finite=True), mapped)
        right = all(
            torch.equal(tensor.to_local().float(), expected[key].chunk(2, axis)[rank]) for key, tensor in state.items()
        )
        found[dtype, axis] = most, right
    dist.destroy_process_group()
    return found


def test_reading_experts_takes_less_than_one_of_their_tensors(tmp_path: Path) -> None:
    """The claim is at most two beside the shards; a view of the file, cast into its place and summed there, takes none."""
    folder = save_mixture(tmp_path / "source")
    for rank in run_ranks(allocated_by_reading, 2, str(folder), folder=tmp_path / "ranks"):
        assert rank.exit_code == 0, rank.output
        for case, (most, right) in rank.value.items():
            assert right, case
            assert most < EXPERT, f"{case}: {most / EXPERT:.2f} tensors"


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that anything made meanwhile."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


def test_no_rank_makes_the_whole_of_a_large_new_parameter() -> None:
    shape = (16384, 2048)  # 128 MiB
    local = torch.empty(shape[0] // 4, shape[1])  # a rank's quarter; filling is by box, so the mesh does not matter
    from flame_ext.seeding import new_parameters

    with LargestTensor() as largest:
        for draw, rows in new_parameters.uniform_blocks(local, ((4096, 8192), (0, 2048)), shape, 0.5, 0, "head.weight"):
            rows.copy_(draw())
    assert 0 < largest.nbytes <= 64 * MIB
    whole = torch.empty(shape)
    initialise({"head.weight": whole}, {"head.weight": Uniform(0.5)}, 0)
    assert torch.equal(local, whole[4096:8192])
