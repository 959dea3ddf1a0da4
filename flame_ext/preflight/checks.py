"""Everything that can be known to be wrong before a process group exists. One message with every finding."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.serialization._base import parse_size_to_int
from torchtitan.protocols.model_converter import _registry_model_converter_cls
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flame_ext.assembly import CONVERTER_NAME
from flame_ext.config.sections import FlameJobConfig, sequence_lengths
from flame_ext.errors import ConfigError, SeedError
from flame_ext.heads.own import check_own_heads, enabled_heads
from flame_ext.hf_config import load_hf_config
from flame_ext.model.attention import mask_problem, supports_flex_attention
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.model.tensor_parallel import tensor_parallel_problems
from flame_ext.model.train_spec import MODEL_NAME
from flame_ext.preflight.context_parallel import check_context_parallel, check_context_parallel_of_model
from flame_ext.preflight.pipeline import check_pipeline, check_pipeline_of_model
from flame_ext.seeding.key_map import parse_key_map
from flame_ext.seeding.sources.safe_files import TOKENIZER_FILES

# What becomes of a run that resumes a step without one of its parts.
WITHOUT = {
    "model": "without it the weights would be random",
    "optimizer": "without it the moments start at 0 and the next step takes the schedule's first learning rate",
    "lr_scheduler": "without it the schedule starts over while the step goes on",
    "dataloader": "without it the data start over while the step goes on",
    "train_state": "without it the step starts over while schedule and data go on",
}


def check_config(config: FlameJobConfig) -> None:
    """Check values and their combinations.

    Raises:
        ConfigError: with one line for each finding.
    """
    problems = [
        *_check_model(config),
        *_check_parallelism(config),
        *check_pipeline(config),
        *check_context_parallel(config),
        *_check_checkpoint(config),
        *_check_seed(config),
        *_check_export(config),
    ]
    problems += [*_check_objective(config), *_check_data(config)]
    if not problems:
        problems += _check_against_model(
            config, load_hf_config(config.model.hf_assets_path, config.seed.trust_remote_code)
        )
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} problems in the configuration:\n  - " + "\n  - ".join(problems))


def _check_model(config: FlameJobConfig) -> Iterator[str]:
    if config.model.name != MODEL_NAME:
        yield f"model.name must be {MODEL_NAME!r}, got {config.model.name!r}; torchtitan's own models run with torchtitan.train"
    if config.model.flavor != "auto":
        yield f"model.flavor must be 'auto' (the model is what its config.json says), got {config.model.flavor!r}"
    for name in config.model.converters:
        if name not in _registry_model_converter_cls:
            close = difflib.get_close_matches(name, _registry_model_converter_cls, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            yield f"model.converters: unknown converter {name!r}{hint} (known: {', '.join(sorted(_registry_model_converter_cls))})"


def _check_parallelism(config: FlameJobConfig) -> Iterator[str]:
    degrees = config.parallelism
    if degrees.expert_parallel_degree != 1:
        yield (
            f"parallelism.expert_parallel_degree must be 1 for {MODEL_NAME!r}, got {degrees.expert_parallel_degree}; scale with "
            "data_parallel_shard_degree (FSDP), data_parallel_replicate_degree (DDP, HSDP) and pipeline_parallel_degree"
        )
    yield from _check_tensor_parallelism(config)
    if config.comm.mode != "default":
        yield f"comm.mode must be 'default', got {config.comm.mode!r}: without real communication there is nothing to seed"
    if config.fault_tolerance.enable:
        yield "fault_tolerance.enable is not supported: TorchFT replaces the checkpoint flow that seeding hooks into"


def _check_tensor_parallelism(config: FlameJobConfig) -> Iterator[str]:
    degrees = config.parallelism
    degree, replicas = degrees.tensor_parallel_degree, degrees.data_parallel_replicate_degree
    if degree < 1:
        yield f"parallelism.tensor_parallel_degree must be >= 1, got {degree}"
    if degree <= 1:
        if degrees.enable_async_tensor_parallel:
            yield "parallelism.enable_async_tensor_parallel needs parallelism.tensor_parallel_degree > 1"
        return
    ranks = _data_parallel_ranks(config)
    if ranks is None:
        yield (
            f"parallelism.tensor_parallel_degree ({degree}) must divide the number of processes "
            f"({os.environ.get('WORLD_SIZE', '1')})"
        )
    shards = degrees.data_parallel_shard_degree
    if ranks is not None and replicas > 1 and (ranks == replicas if shards == -1 else shards == 1):
        yield (
            f"parallelism.data_parallel_replicate_degree = {replicas} with tensor_parallel_degree = {degree}: the host's DDP goes with "
            "no other parallelism; set data_parallel_shard_degree to 2 or more (HSDP), or data_parallel_replicate_degree to 1 (FSDP)"
        )
    for name, seq_len in sequence_lengths(config).items():
        if seq_len % degree:
            yield (
                f"{name}.seq_len ({seq_len}) must be a multiple of parallelism.tensor_parallel_degree ({degree}): sequence "
                "parallelism gives each rank as many positions"
            )
    if degrees.enable_async_tensor_parallel:
        if not (config.compile.enable and "model" in config.compile.components):
            yield "parallelism.enable_async_tensor_parallel needs compile.enable with 'model' in compile.components"
        if not torch.accelerator.is_available():
            yield "parallelism.enable_async_tensor_parallel overlaps kernels of an accelerator, and there is none; leave it out"


def _data_parallel_ranks(config: FlameJobConfig) -> int | None:
    """Processes that read different data; None if the degrees do not divide their number. Known under torchrun, else 1."""
    degrees = config.parallelism
    sharing = 1
    for kind in ("tensor", "pipeline", "context"):
        sharing *= max(1, getattr(degrees, f"{kind}_parallel_degree"))
    ranks, rest = divmod(int(os.environ.get("WORLD_SIZE", "1")), sharing)
    return None if rest else ranks


def _check_seed(config: FlameJobConfig) -> Iterator[str]:
    try:
        parse_key_map(config.seed.key_map)
    except SeedError as e:
        yield str(e)


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
    if checkpoint.interval < 1:
        yield f"checkpoint.interval must be >= 1 step, got {checkpoint.interval}"
    if checkpoint.max_nonfinite_steps < 1:
        yield (
            f"checkpoint.max_nonfinite_steps must be >= 1 (1 = stop at the first step without a finite gradient norm), got "
            f"{checkpoint.max_nonfinite_steps}"
        )
    for name in checkpoint.exclude_from_loading:
        consequence = WITHOUT.get(name, f"there is no such part ({', '.join(WITHOUT)})")
        yield (
            f"checkpoint.exclude_from_loading has {name!r}, but a step is resumed whole: {consequence}; leave it out, or start "
            "anew from the weights: a new job.dump_folder with checkpoint.initial_load_path = the step or its export"
        )


def _check_export(config: FlameJobConfig) -> Iterator[str]:
    export, interval = config.export, config.checkpoint.interval
    if export.interval < 0 or (interval > 0 and export.interval % interval):
        yield (
            f"export.interval must be 0 or a multiple of checkpoint.interval = {interval}, got {export.interval}: what is exported "
            "is a step that was saved"
        )
    try:
        parse_size_to_int(export.max_shard_size)
    except ValueError as e:
        yield f"export.max_shard_size {export.max_shard_size!r}: {e}"


def _check_objective(config: FlameJobConfig) -> Iterator[str]:
    encoder, predictor, action = config.future_encoder, config.future_predictor, config.action_layer
    attached = CONVERTER_NAME in config.model.converters
    own = enabled_heads(config)
    if encoder.enable != predictor.enable:
        yield "future_encoder.enable and future_predictor.enable go together: one is the target, the other predicts it"
    if action.enable and not encoder.enable:
        yield "action_layer.enable needs future_encoder.enable: candidates are scored by the summary of the future"
    if encoder.enable and not attached:
        yield f'future_encoder.enable is true but nothing attaches the heads: set model.converters = ["{CONVERTER_NAME}"]'
    for name in own if not attached else ():
        yield f'{name}.enable is true but nothing attaches the head: set model.converters = ["{CONVERTER_NAME}"]'
    if attached and not encoder.enable and not own:
        yield f"model.converters has {CONVERTER_NAME!r}, but future_encoder.enable is false: enable it or drop the converter"
    if encoder.future_k < 0:
        yield f"future_encoder.future_k must be >= 0 (0 = all the future), got {encoder.future_k}"
    if not 1 <= encoder.shift_k < config.training.seq_len:
        yield f"future_encoder.shift_k must be in 1..training.seq_len - 1 ({config.training.seq_len - 1}), got {encoder.shift_k}"
    if encoder.temperature <= 0:
        yield f"future_encoder.temperature must be > 0 (cosines are divided by it; 0.05-0.1 is usual), got {encoder.temperature}"
    if not 0 <= predictor.dropout < 1:
        yield f"future_predictor.dropout must be in [0, 1), got {predictor.dropout}"
    if action.top_k < 1:
        yield f"action_layer.top_k must be >= 1 (the likeliest tokens beside the true one), got {action.top_k}"
    if action.tau <= 0:
        yield f"action_layer.tau must be > 0 (cosines are divided by it), got {action.tau}"
    if action.ffn_hidden_size is not None and action.ffn_hidden_size < 1:
        yield f"action_layer.ffn_hidden_size must be >= 1, got {action.ffn_hidden_size}; leave it out for the backbone's"
    if action.model_loss_weight < 0:
        yield f"action_layer.model_loss_weight must be >= 0 (0 = not computed), got {action.model_loss_weight}"
    if action.enable and action.loss_weight > 0 and action.model_loss_weight == 0:
        yield (
            "action_layer.model_loss_weight is 0 while loss_weight is not: nothing would train the head that gives the "
            "rewards; set it above 0, or loss_weight to 0"
        )
    weights = [encoder.loss_weight if encoder.enable else 0.0, *(section.loss_weight for section in own.values())]
    weights += [action.loss_weight, action.model_loss_weight] if encoder.enable and action.enable else []
    if predictor.freeze_backbone and not any(weights):
        yield "future_predictor.freeze_backbone leaves nothing to train: enable the heads, with a loss_weight above 0"
    yield from check_own_heads(config)
    yield from _check_weights(config)
    yield from _check_teacher(config)


def _check_weights(config: FlameJobConfig) -> Iterator[str]:
    """Schedules of losses and of the heads' optimisation."""
    for name in ("future_encoder", "action_layer"):
        section = getattr(config, name)
        if section.loss_weight < 0:
            yield f"{name}.loss_weight must be >= 0 (0 = not computed), got {section.loss_weight}"
        for field in ("loss_weight_warmup_steps", "loss_weight_decay_steps"):
            if getattr(section, field) < 0:
                yield f"{name}.{field} must be >= 0 (0 = none), got {getattr(section, field)}"
    for name in ("future_encoder", "future_predictor", "action_layer", *enabled_heads(config)):
        section = getattr(config, name)
        if section.lr_scale <= 0:
            yield f"{name}.lr_scale must be > 0 (a multiple of optimizer.lr), got {section.lr_scale}"
        if section.weight_decay is not None and section.weight_decay < 0:
            yield f"{name}.weight_decay must be >= 0, got {section.weight_decay}; leave it out for optimizer.weight_decay"
        if section.warmup_steps is not None and section.warmup_steps < 0:
            yield f"{name}.warmup_steps must be >= 0, got {section.warmup_steps}; leave it out for lr_scheduler.warmup_steps"
        own_group = section.lr_scale != 1 or section.weight_decay is not None or section.warmup_steps is not None
        if own_group and config.optimizer.early_step_in_backward:
            yield (
                f"{name}.lr_scale, weight_decay and warmup_steps make a parameter group, which "
                "optimizer.early_step_in_backward does not have: drop one of the two"
            )


def _check_teacher(config: FlameJobConfig) -> Iterator[str]:
    """What only some summaries have."""
    encoder, batch = config.future_encoder, config.training.local_batch_size
    if encoder.teacher_interval < 1:
        yield f"future_encoder.teacher_interval must be >= 1 (1 = every step), got {encoder.teacher_interval}"
    sequences = encoder.teacher_fraction * batch
    if not 0 < encoder.teacher_fraction <= 1:
        yield f"future_encoder.teacher_fraction must be in (0, 1], got {encoder.teacher_fraction}"
    elif abs(sequences - round(sequences)) > 1e-6 or round(sequences) < 1:
        yield (
            f"future_encoder.teacher_fraction ({encoder.teacher_fraction}) times training.local_batch_size ({batch}) must be "
            f"a whole number of sequences; for {max(1, round(sequences))} of them, set it to {max(1, round(sequences)) / batch:g}"
        )
    if encoder.summary_method == "anticausal":
        if not encoder.detach_targets:
            yield "future_encoder.detach_targets = false is for pooled summaries: the anticausal forward has no gradient"
    elif encoder.teacher_interval > 1 or encoder.teacher_fraction != 1:
        yield (
            "future_encoder.teacher_interval and teacher_fraction save the second forward of summary_method = 'anticausal'; "
            f"{encoder.summary_method!r} has none"
        )


def _check_data(config: FlameJobConfig) -> Iterator[str]:
    training = config.training
    for name in ("seq_len", "local_batch_size", "steps"):
        if getattr(training, name) < 1:
            yield f"training.{name} must be >= 1, got {getattr(training, name)}"
    if training.dataloader.num_workers < 0:
        yield f"training.dataloader.num_workers must be >= 0, got {training.dataloader.num_workers}"
    if training.epochs < 0:
        yield f"training.epochs must be >= 0 (0 = training.steps), got {training.epochs}"
    for section in ("data", "validation"):
        sources = getattr(config, section).sources
        labels = [source.reported_as for source in sources]
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
    if config.metrics.log_freq < 1:
        yield f"metrics.log_freq must be >= 1, got {config.metrics.log_freq}"
    # Known under torchrun; the host's own check of the same is an assertion deep in the trainer.
    replicas = _data_parallel_ranks(config) or 1
    global_batch, local_batch = training.global_batch_size, training.local_batch_size
    if local_batch >= 1 and global_batch >= 0 and (global_batch == 0 or global_batch % (local_batch * replicas)):
        yield (
            f"training.global_batch_size ({global_batch}) must be a positive multiple of training.local_batch_size "
            f"({local_batch}) times the data-parallel ranks ({replicas})"
        )


def _check_against_model(config: FlameJobConfig, hf_config: PreTrainedConfig) -> Iterator[str]:
    # By name, since a folder may bring its own class; by transformers' table, since GPT-2's is a GPT2LMHeadModel.
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if not any(name.endswith("ForCausalLM") or name in known for name in (hf_config.architectures or [])[:1]):
        yield (
            f"{Path(config.model.hf_assets_path) / 'config.json'}: architectures is {hf_config.architectures}; only decoder-only "
            "causal LMs (…ForCausalLM) can be trained"
        )
    degree = config.parallelism.tensor_parallel_degree
    if degree > 1:
        model = build_hf_causal_lm(
            HFModelArgs(hf_assets_path=config.model.hf_assets_path, trust_remote_code=config.seed.trust_remote_code)
        )
        yield from tensor_parallel_problems(model, degree)
    assets = Path(config.model.hf_assets_path)
    if not any((assets / name).is_file() for name in TOKENIZER_FILES):
        yield f"model.hf_assets_path {str(assets)!r}: no tokenizer ({' or '.join(TOKENIZER_FILES)}); copy the model's there"
    text = hf_config.get_text_config()
    if config.action_layer.enable and config.action_layer.top_k > text.vocab_size:
        yield (
            f"action_layer.top_k ({config.action_layer.top_k}) is above the model's vocabulary ({text.vocab_size}); a few "
            "candidates are enough, their cost grows with their number"
        )
    if config.future_encoder.enable and config.future_encoder.summary_method == "anticausal":
        reason = mask_problem(hf_config)
        if reason is not None:
            yield (
                f"future_encoder.summary_method = 'anticausal' can not be right for {hf_config.model_type!r}: {reason}; take "
                "'mean', 'max' or 'attention'"
            )
    if config.data.document_attention and (reason := mask_problem(hf_config)) is not None:
        yield f"data.document_attention can not be right for {hf_config.model_type!r}: {reason}"
    if config.future_encoder.teacher_attention == "flex" and not supports_flex_attention(hf_config):
        yield (
            f"future_encoder.teacher_attention = 'flex': transformers has no FlexAttention for {hf_config.model_type!r}; take "
            "'auto' or 'sdpa'"
        )
    yield from check_pipeline_of_model(config)
    yield from check_context_parallel_of_model(config, hf_config)
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None and config.training.seq_len > limit:
        yield (
            f"training.seq_len ({config.training.seq_len}) is beyond the model's max_position_embeddings ({limit}); shorten "
            "it, or extend the model (rope_parameters and max_position_embeddings in config.json)"
        )
