"""Checks of the options of checkpoints, seeding, training, metrics and sources of data."""

from collections.abc import Iterator
from importlib.util import find_spec
from operator import attrgetter

import torch
from torchtitan.tools.utils import device_module

from flame_ext.config.sections import FlameJobConfig, Optimizer, Seed
from flame_ext.errors import SeedError
from flame_ext.heads.registry import freezing_heads, trained_heads
from flame_ext.host.names import DataLoader
from flame_ext.preflight.parallelism import data_parallel_ranks, is_launched, replicated_alone
from flame_ext.run.optimization import schedule_problem
from flame_ext.seeding.names import parse_key_map

# The parts of a saved step, and what a run without one of them would do.
_WITHOUT = {
    "model": "without it the weights would be random",
    "optimizer": "without it the moments start at 0 and the next step takes the schedule's first learning rate",
    "lr_scheduler": "without it the schedule starts over while the step goes on",
    "dataloader": "without it the data start over while the step goes on",
    "train_state": "without it the step starts over while schedule and data go on",
}


def check_options(config: FlameJobConfig) -> Iterator[str]:
    """Yields one sentence for each finding."""
    yield from _check_checkpoint(config)
    try:
        parse_key_map(config.seed.key_map)
    except SeedError as e:
        yield str(e)
    if not config.seed.resize_vocabulary:
        for name in ("new_rows", "pad_vocabulary_to_multiple_of"):
            value = getattr(config.seed, name)
            if value != getattr(Seed(), name):
                yield f"seed.{name} = {value!r} has no effect without seed.resize_vocabulary = true; set it, or leave the option out"
    yield from _check_trackers(config)
    yield from _check_training(config)
    yield from _check_optimizer(config)
    yield from _check_loss(config)
    yield from _check_memory_and_speed(config)


def _check_checkpoint(config: FlameJobConfig) -> Iterator[str]:
    checkpoint = config.checkpoint
    if not checkpoint.enable:
        yield "checkpoint.enable must be true: weights are seeded and resumed by the checkpoint manager (load_only = true never saves)"
    if checkpoint.initial_load_path is None and not checkpoint.initial_load_in_hf:
        yield (
            "checkpoint.initial_load_path is not set, and training never starts from random weights; name a Hugging Face "
            "folder, or set checkpoint.initial_load_in_hf = true to take model.hf_assets_path"
        )
    if checkpoint.create_seed_checkpoint:
        yield "checkpoint.create_seed_checkpoint has no use here: the trainer itself is seeded, under any parallelism"
    if not checkpoint.initial_load_model_only:
        yield "checkpoint.initial_load_model_only must be true: a source gives weights; to resume, use the same job.dump_folder"
    if checkpoint.initial_load_in_hf_quantized:
        yield "checkpoint.initial_load_in_hf_quantized is not supported: dequantise the model first"
    if checkpoint.keep_latest_k == 1:
        yield "checkpoint.keep_latest_k must be 0 (keep all) or at least 2: the newest step may be in the process of being saved"
    if checkpoint.async_mode == "async_with_pinned_mem" and not torch.accelerator.is_available():
        yield "checkpoint.async_mode = 'async_with_pinned_mem' needs an accelerator (pinned memory); use 'async' or 'disabled'"
    for name in checkpoint.exclude_from_loading:
        consequence = _WITHOUT.get(name, f"there is no such part ({', '.join(_WITHOUT)})")
        yield (
            f"checkpoint.exclude_from_loading has {name!r}, but a step is resumed whole: {consequence}; leave it out, or start "
            "anew from the weights: a new job.dump_folder with checkpoint.initial_load_path = the step or its export"
        )


def _check_trackers(config: FlameJobConfig) -> Iterator[str]:
    of = config.metrics
    for name, wanted in (("trackio", of.enable_trackio), ("wandb", of.enable_wandb)):
        if wanted and find_spec(name) is None:
            yield f"metrics.enable_{name} needs the package {name}, which is not installed: pip install 'flame_ext[{name}]'"
    if not (of.enable_trackio or of.enable_wandb):
        for name in ("project", "run_name", "run_group", "run_tags"):
            if value := getattr(of, name):
                yield f"metrics.{name} = {value!r} has no effect without metrics.enable_trackio or enable_wandb; leave it out"


def _check_training(config: FlameJobConfig) -> Iterator[str]:
    # torchtitan checks the same by an assertion, deep in the trainer.
    training, replicas = config.training, data_parallel_ranks(config) or 1
    global_batch, local_batch = training.global_batch_size, training.local_batch_size
    if global_batch != -1 and global_batch % (local_batch * replicas):
        factors = f"training.local_batch_size ({local_batch}) times the data-parallel ranks ({replicas})"
        yield f"training.global_batch_size ({global_batch}) must be a positive multiple of {factors}"
    else:
        yield from _check_workers("training", training.dataloader, max(1, global_batch // replicas, local_batch))
    if config.validation.enable:
        yield from _check_workers("validation", config.validation.dataloader, config.validation.local_batch_size)
    if not training.epochs and (problem := schedule_problem(config.lr_scheduler.total_steps, training.steps)):
        yield problem


def _check_optimizer(config: FlameJobConfig) -> Iterator[str]:
    optimizer, training, replicas = config.optimizer, config.training, data_parallel_ranks(config) or 1
    global_batch, local_batch = training.global_batch_size, training.local_batch_size
    if optimizer.name != "Muon":
        if (value := optimizer.muon_momentum) != Optimizer().muon_momentum:
            yield f"optimizer.muon_momentum = {value} has no effect with optimizer.name = {optimizer.name!r}; take 'Muon', or leave it out"
    elif freezing := freezing_heads(config):
        yield f"optimizer.name = 'Muon' is for the backbone, which {freezing[0]}.freeze_backbone keeps as it is; take 'AdamW'"
    elif training.enable_cpu_offload or optimizer.early_step_in_backward:
        option = "training.enable_cpu_offload" if training.enable_cpu_offload else "optimizer.early_step_in_backward"
        yield f"{option} does not go with optimizer.name = 'Muon', which gathers matrices on the device after the backward; leave it out"
    if optimizer.name != "Adam" and (shrinking := optimizer.lr * optimizer.weight_decay) >= 1:
        yield f"optimizer.lr times optimizer.weight_decay must be below 1, got {shrinking:g}: a step takes that share of each weight away"
    if optimizer.early_step_in_backward:
        early = "optimizer.early_step_in_backward updates the weights in every backward"
        if global_batch > local_batch * replicas:
            steps = f"{global_batch // (local_batch * replicas)} times in a step"
            yield f"{early}, here {steps} (training.global_batch_size {global_batch}); raise training.local_batch_size, or leave it out"
        if replicated_alone(config):
            degree = "parallelism.data_parallel_replicate_degree > 1"
            yield f"{early}, before DDP ({degree}) has summed the gradients, so that replicas would differ; use FSDP, or leave it out"


def _check_loss(config: FlameJobConfig) -> Iterator[str]:
    if config.loss.ce_weight == 0 and not trained_heads(config):
        yield "loss.ce_weight = 0 leaves nothing to train by: set it above 0, or enable a head, with a loss_weight above 0"
    if config.loss.mix_ce and config.loss.weighting == "none":
        yield f"loss.mix_ce = {config.loss.mix_ce} mixes the plain cross-entropy with a weighted one: set loss.weighting, or leave it out"


def _check_workers(section: str, loading: DataLoader, sequences: int) -> Iterator[str]:
    name, workers = f"{section}.dataloader", loading.num_workers
    if workers and sequences % workers:
        yield (
            f"{name}.num_workers ({workers}) must divide the sequences that a rank has in a step ({sequences}), "
            "which its workers share"
        )
    if not workers and (loading.persistent_workers or loading.prefetch_factor is not None):
        option = "persistent_workers" if loading.persistent_workers else "prefetch_factor"
        yield f"{name}.{option} is for workers, and {name}.num_workers is 0; leave it out"


def _check_memory_and_speed(config: FlameJobConfig) -> Iterator[str]:
    ac, compiling, profiling = config.activation_checkpoint, config.compile, config.profiling
    if ac.mode == "selective" and ac.selective_ac_option != "op":
        every = ac.selective_ac_option
        if not (every.isdecimal() and int(every) > 0):
            yield (
                "activation_checkpoint.selective_ac_option must be 'op', or a number n >= 1 as a string (every n-th layer), "
                f"got {every!r}"
            )
    if ac.mode == "memory_budget" and not (compiling.enable and "model" in compiling.components):
        yield "activation_checkpoint.mode = 'memory_budget' needs compile.enable with 'model' in compile.components; or take 'selective'"
    if ac.determinism_check not in ("default", "none"):
        yield f"activation_checkpoint.determinism_check must be 'default' or 'none', got {ac.determinism_check!r}"
    if unknown := [name for name in compiling.components if name not in ("model", "loss")]:
        yield f"compile.components: unknown component {unknown[0]!r} (known: model, loss)"
    if compiling.enable and compiling.backend not in (known := torch._dynamo.list_backends(exclude_tags=())):
        yield f"compile.backend must be one of {', '.join(known)}, got {compiling.backend!r}"
    least = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < least:
        yield (
            f"profiling.profile_freq ({profiling.profile_freq}) must be at least profiler_warmup ({profiling.profiler_warmup}) + "
            f"profiler_active ({profiling.profiler_active}) = {least}"
        )
    if config.memory_estimation.enable:
        yield "memory_estimation.enable has no effect: torchtitan 0.2.2 has no estimate any more; leave it out"
    recording = hasattr(getattr(device_module, "memory", None), "_record_memory_history")
    if profiling.enable_memory_snapshot and is_launched() and not recording:
        yield (
            "profiling.enable_memory_snapshot records the allocator of an accelerator, and there is none; leave it out, or use "
            "profiling.enable_profiling"
        )


# The options without effect beside tables of sources, and what to set instead.
_REPLACED = {
    "data.sources": {
        "training.dataset": "",
        "training.dataset_path": "",
        "data.text_field": ", and set text_field in the tables",
    },
    "validation.sources": {"validation.dataset": "", "validation.dataset_path": ""},
}


def check_data(config: FlameJobConfig) -> Iterator[str]:
    """Yields one sentence for each finding in ``[[data.sources]]`` and ``[[validation.sources]]``."""
    for section in ("data", "validation"):
        sources = getattr(config, section).sources
        labels = [source.reported_as for source in sources]
        for name, instead in _REPLACED[f"{section}.sources"].items():
            value, default = (attrgetter(name)(c) for c in (config, FlameJobConfig()))
            # validation.dataset is read by data.text_field as well.
            read = name == "data.text_field" and config.validation.enable and not config.validation.sources
            if sources and value != default and not read:
                yield f"{name} = {value!r} has no effect beside {section}.sources; leave one of them out{instead}"
        for i, source in enumerate(sources):
            name = f"{section}.sources[{i}]"
            if (first := labels.index(labels[i])) < i:
                yield f"{name} is reported as {labels[i]!r}, as {section}.sources[{first}] is; give it a label of its own"
            if not source.path:
                yield f"{name}.path is empty: a file, a glob, a folder, a dataset on the Hub or a registered name"
            if source.weight <= 0:
                yield f"{name}.weight must be > 0, got {source.weight}; to leave the source out, take its table out"
            if source.max_samples is not None and source.max_samples < 1:
                yield f"{name}.max_samples must be >= 1, got {source.max_samples}"
            if section == "validation" and (source.weight != 1.0 or source.when_exhausted != "repeat"):
                yield f"{name}: weight and when_exhausted have no effect, since each source is read once by itself; leave them out"
