"""Checks of torchtitan's converters to other dtypes, ``quantize.*``: the options, then the layers that they convert."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from transformers import PreTrainedConfig

from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.heads.registry import CONVERTER_NAME, teacher_of, trained_heads
from flame_ext.host.names import model_converters
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.model.quantization import FLOAT8, converted_layers
from flame_ext.model.tensor_parallel import sizes_of_parts
from flame_ext.preflight.model import model_on_meta
from flame_ext.preflight.parallelism import is_launched, sharding_ranks

_MULTIPLE = 16  # of all sizes of matrices, for float8's kernels
_NOT_PADDED = "it is for torchtitan's own mixtures, which fill up the tokens of each expert to what its kernels take"
_REFUSED = {
    "quantize.linear.mx": "it needs a GPU of SM100 and MXLinearConfig, which torchao 0.18 no longer has, and was never run with this model",
    "quantize.grouped_mm.float8": _NOT_PADDED,
    "quantize.grouped_mm.mx": _NOT_PADDED,
}


def check_quantization(config: FlameJobConfig) -> Iterator[str]:
    """Yields one sentence for each finding that needs no model, among them what the converter itself raises on being built."""
    converters, float8 = config.model.converters, config.quantize.linear.float8
    refused = [name for name in converters if name in _REFUSED]
    for name in refused:
        yield f"model.converters: {name!r} is not supported: {_REFUSED[name]}; take {FLOAT8!r}, or leave it out"
    if FLOAT8 not in converters and vars(float8) != vars(type(float8)()):
        yield f'[{FLOAT8}] has no effect without model.converters = ["{FLOAT8}", …]; add it, or leave the section out'
    if FLOAT8 not in converters or refused:
        return
    if converters.count(FLOAT8) > 1 or CONVERTER_NAME in converters[: converters.index(FLOAT8)]:
        yield (
            f'model.converters must have "{FLOAT8}" once and before "{CONVERTER_NAME}", got {converters}: heads stay in high precision, '
            f"since many are given any number of positions, and float8's kernels take multiples of {_MULTIPLE}"
        )
    if float8.emulate and float8.recipe_name is not None:
        yield f"{FLOAT8}.emulate has no effect with {FLOAT8}.recipe_name; leave one of them out"
    if float8.precompute_float8_dynamic_scale_for_fsdp and not float8.enable_fsdp_float8_all_gather:
        yield f"{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp has no effect without enable_fsdp_float8_all_gather; leave it out"
    if float8.enable_fsdp_float8_all_gather:
        yield from _check_gathered(config)
    if not float8.emulate and (tokens := _tokens(config)) % _MULTIPLE:
        yield (
            f"{FLOAT8} takes multiples of {_MULTIPLE} tokens, and a rank's forward has {tokens}: choose another training.seq_len or "
            "training.local_batch_size"
        )
    if is_launched():
        try:
            model_converters[FLOAT8](copy.deepcopy(config), SimpleNamespace(dp_shard_enabled=True))
        except ImportError as e:
            yield f"model.converters: {FLOAT8!r} needs torchao ({e}): pip install 'flame_ext[float8]'"
        except Exception as e:
            yield f"model.converters: {FLOAT8!r}: {(str(e).strip().splitlines() or [type(e).__name__])[0]}"


def _check_gathered(config: FlameJobConfig) -> Iterator[str]:
    name = f"{FLOAT8}.enable_fsdp_float8_all_gather"
    if is_launched() and sharding_ranks(config) > 1 and not torch.accelerator.is_available():
        yield f"{name} needs an accelerator: gloo, which gathers on a CPU, does not know float8; leave it out"
    if (degree := config.parallelism.tensor_parallel_degree) > 1:
        yield (
            f"{name} does not go with parallelism.tensor_parallel_degree = {degree}: the scale of a weight would be that of a rank's part "
            "of it; leave it out"
        )
    teacher = teacher_of(config)
    anticausal = teacher and getattr(getattr(config, teacher), "summary_method", "anticausal") == "anticausal"
    if config.seed.verify == "parity" or (anticausal and config.seed.verify != "none"):
        proof = "from_pretrained" if config.seed.verify == "parity" else "itself, with a token changed"
        yield (
            f"{name} leaves no weights in high precision, by which step 0 is compared with {proof}: prove it once without, by "
            "seed.dry_run, and set seed.verify = 'none'"
        )


def _tokens(config: FlameJobConfig) -> int:
    """Of a forward of one rank."""
    options, training = config.parallelism, config.training
    pipelined = options.pipeline_parallel_degree > 1
    sequences = options.pipeline_parallel_microbatch_size if pipelined else training.local_batch_size
    return sequences * training.seq_len // max(1, options.context_parallel_degree)


def check_quantized(config: FlameJobConfig, _hf_config: PreTrainedConfig) -> Iterator[str]:
    """Yields one sentence for each finding of the layers that are converted, in the model on the meta device."""
    if FLOAT8 not in config.model.converters or not is_launched():
        return
    try:
        model = model_on_meta(config)
        dims = SimpleNamespace(dp_shard_enabled=sharding_ranks(config) > 1)
        model_converters[FLOAT8](copy.deepcopy(config), dims).convert(model)
    except ConfigError as e:
        yield str(e)
        return
    yield from _check_layers(config, model)


def _check_layers(config: FlameJobConfig, model: HFCausalLM) -> Iterator[str]:
    layers, output = converted_layers(model), model.get_output_embeddings()
    if not layers:
        yield (
            f"model.converters: {FLOAT8!r} would convert no layer of {model.architecture}: none has sizes that are multiples of "
            f"{_MULTIPLE} and is not spared by {FLOAT8}.filter_fqns"
        )
    calling = [name for name, spec in trained_heads(config).items() if spec.uses_unembedding]
    if calling and any(model.get_submodule(name) is output for name in layers):
        yield (
            f"{FLOAT8} with {', '.join(calling)}: it gives the output embedding any number of states, and float8's kernels take "
            f"multiples of {_MULTIPLE}: add 'output' to {FLOAT8}.filter_fqns"
        )
    if config.quantize.linear.float8.emulate or (degree := config.parallelism.tensor_parallel_degree) <= 1:
        return
    parts = sizes_of_parts(model, degree)
    if small := [name for name in layers if parts.get(name, _MULTIPLE) % _MULTIPLE]:
        yield (
            f"{FLOAT8} with parallelism.tensor_parallel_degree = {degree}: {small[0]!r} has {parts[small[0]]} rows or columns on a rank, "
            f"and float8's kernels take multiples of {_MULTIPLE}: lower the degree, or name it in {FLOAT8}.filter_fqns"
        )
