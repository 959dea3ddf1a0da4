"""What to change in a job that does not fit; each change that is named has been rehearsed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from flame_ext.errors import ConfigError
from flame_ext.planning.plan import Plan, make_plan

_OF_BATCH = ("activations", "logits", "objective", "teacher and keys")  # parts that grow with the sequences


def remedy(plan: Plan, say: Callable[[str], None] = lambda _text: None) -> Plan | None:
    """Returns a plan that fits, by as little change as possible, or None if nothing helps; ``say`` is told of each attempt.

    Tried one by one: sharding, a smaller batch of a rank with the same batch of a step, checkpointing, weights on the host;
    then all but the last together, then all of them, then more ranks.
    """
    changes = dict(_changes(plan))
    alone = [[options] for options in changes.values()]
    modest = [options for name, options in changes.items() if name != "offload"]
    for combination in [*alone, modest, [*changes.values()]]:
        options = [option for some in combination for option in some]
        if options and (found := _tried(plan, options, plan.machine.ranks, say)) is not None and found.fits:
            return found
    for factor in (2, 4, 8):
        options = [option for some in modest for option in some]
        found = _tried(plan, options, plan.machine.ranks * factor, say)
        if found is not None and found.fits:
            return found
    return None


def _changes(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    settings, ranks = plan.rehearsal.settings, plan.machine.ranks
    if ranks > 1 and settings["parallelism.data_parallel_shard_degree"] != -1:
        yield (
            "shard",
            ["--parallelism.data_parallel_replicate_degree=1", "--parallelism.data_parallel_shard_degree=-1"],
        )
    if (batch := smaller_batch(plan)) is not None:
        sequences = plan.rehearsal.tokens // settings["training.seq_len"]
        yield "batch", [f"--training.local_batch_size={batch}", f"--training.global_batch_size={sequences}"]
    if settings["activation_checkpoint.mode"] != "full":
        yield "checkpointing", ["--activation_checkpoint.mode=full"]
    if not settings["training.enable_cpu_offload"] and ranks > 1:  # it is FSDP's
        yield "offload", ["--training.enable_cpu_offload"]


def smaller_batch(plan: Plan) -> int | None:
    """The largest half, quarter, … of a rank's batch that should fit, at least one sequence; None if it has only one."""
    settings, limit = plan.rehearsal.settings, plan.machine.limit
    batch = settings["training.local_batch_size"]
    if limit is None or batch == 1:
        return None
    growing = sum(plan.rehearsal.parts.get(part, 0) for part in _OF_BATCH)
    smaller = batch // 2
    while smaller > 1 and (plan.rehearsal.peak - growing) + growing * smaller / batch > limit:
        smaller //= 2
    return smaller


def _tried(plan: Plan, options: list[str], ranks: int, say: Callable[[str], None]) -> Plan | None:
    """The plan with these options beside its own; None if preflight refuses them."""
    machine = replace(plan.machine, ranks=ranks)
    try:
        found = make_plan([*plan.options, *options], machine)
    except ConfigError:
        return None
    say(f"tried {' '.join(options)} on {ranks}: {found.rehearsal.peak / 1e9:.1f} GB")
    return found
