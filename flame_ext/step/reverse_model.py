"""The frozen language model of ``future_encoder.reverse_model``, which reads every sequence from right to left."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import set_default_dtype
from transformers import PreTrainedConfig

from flame_ext.config.head_options import HEAD_NAMES
from flame_ext.config.model_config import load_model_config
from flame_ext.config.resume_record import asset_digests
from flame_ext.config.sections import FlameJobConfig, sequence_lengths
from flame_ext.data.loader import positions_in_documents
from flame_ext.distributed import failing_together, gathered
from flame_ext.errors import ConfigError, SeedError
from flame_ext.hf_config import REVERSE_FIELD, is_part_of_transformers, load_hf_config
from flame_ext.model.attention import attention_windows, flex_problem, mask_form, mask_problem
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.model.parallelize import forget_forwards, parallelize_frozen
from flame_ext.objective.masks import causal_block_mask, causal_mask
from flame_ext.seeding.proof.replicas import compare_replicas, weights_digest
from flame_ext.seeding.read import logged_progress, read_weights
from flame_ext.seeding.seed import match
from flame_ext.seeding.sources.hub import locate
from flame_ext.seeding.sources.safe_files import (
    MAX_TOKENIZER_BYTES,
    TOKENIZER_FILES,
    find_file,
    read_bytes,
    require_contained,
)
from flame_ext.seeding.target import seed_target

OPTION = "future_encoder.reverse_model"


def reverse_model_problems(config: FlameJobConfig, folder: Path, backbone: PreTrainedConfig) -> Iterator[str]:
    """Yields one sentence for each reason why the model in ``folder`` cannot be the teacher of a ``backbone``."""
    options, seed, name = config.future_encoder, config.seed, f"{OPTION} {str(folder)!r}"
    if not (folder / "config.json").is_file():
        yield f"{name}: no config.json: name the Hugging Face folder of a reverse language model, such as an export (hf/step-N)"
        return
    try:
        require_contained(folder, seed.follow_links)
        found = load_hf_config(str(folder), seed.trust_remote_code, OPTION)
        tokenizer = _other_tokenizer(folder, Path(config.model.hf_assets_path), seed.follow_links)
    except (SeedError, ConfigError) as e:
        yield str(e)
        return
    if getattr(found, REVERSE_FIELD, None) is not True and not options.assume_reverse:
        yield (
            f"{name} does not say that it reads from right to left ({REVERSE_FIELD} in config.json): train it with data.reverse = true, "
            "or, if it was made elsewhere and does, set future_encoder.assume_reverse = true"
        )
    own, other = backbone.get_text_config(), found.get_text_config()
    for field in ("vocab_size", "hidden_size"):
        if getattr(own, field) != getattr(other, field):
            yield (
                f"{name} has {field} {getattr(other, field)}, and the model {getattr(own, field)}: take a reverse model of the same "
                "tokenizer and width"
            )
    if tokenizer is not None:
        yield f"{name}: its {tokenizer} has other tokens than that of model.hf_assets_path: take a reverse model of the same tokenizer"
    if (reason := mask_problem(found)) is not None:
        yield f"{name} cannot keep documents apart: {reason}; take a model with attention"
    elif not is_part_of_transformers(found):
        yield f"{name} is code from outside transformers, and nothing proves that it obeys its mask; take one that transformers has"
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if options.teacher_attention == "flex" and (reason := flex_problem(found, device_type)) is not None:
        yield f"future_encoder.teacher_attention = 'flex' with {name}: {reason}; take 'auto' or 'sdpa'"
    limit = getattr(other, "max_position_embeddings", None)
    for section, seq_len in sequence_lengths(config).items():
        if limit is not None and seq_len > limit:
            yield f"{section}.seq_len ({seq_len}) is beyond max_position_embeddings ({limit}) of {name}: shorten it"


def _other_tokenizer(folder: Path, assets: Path, follow_links: bool) -> str | None:
    """The name of a tokenizer's file that both folders have, with other tokens; None if there is none."""
    for name in TOKENIZER_FILES:
        files = [find_file(place, name, follow_links) for place in (folder, assets)]
        if all(files):
            one, other = (read_bytes(file, "tokenizer", MAX_TOKENIZER_BYTES) for file in files if file is not None)
            if one != other and (name != "tokenizer.json" or _tokens(one) != _tokens(other)):
                return name
    return None


def _tokens(file: bytes) -> Any:
    """What a ``tokenizer.json`` maps to ids; the rest may be written in another way."""
    try:
        fields = json.loads(file)
        added = [(token["id"], token["content"]) for token in fields.get("added_tokens") or []]
        return fields["model"]["vocab"], sorted(added)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise SeedError(f"tokenizer.json of {OPTION} or of model.hf_assets_path cannot be read: {e}") from e


class ReverseModel:
    """Loads the model, frozen, and runs it. It is sharded as FSDP shards the backbone, or else on each rank as a whole; ranks of
    tensor and context parallelism all compute the same. ``needed``: whether this rank runs it, as ranks of a pipeline's last stage do.

    Collective. Raises a UserError on all ranks if the folder cannot be the teacher of this run, or be read.
    """

    def __init__(self, config: FlameJobConfig, dims: ParallelDims, needed: bool, device: torch.device) -> None:
        options, self._future_k = config.future_encoder, config.future_encoder.future_k
        begin = time.perf_counter()
        folder, _ = locate(options.reverse_model, config.seed.allow_pickle, with_tokenizer=True)
        with failing_together(ConfigError):
            backbone = load_model_config(config)
            for problem in reverse_model_problems(config, folder, backbone):
                raise ConfigError(problem)
            args = HFModelArgs(
                hf_assets_path=str(folder), trust_remote_code=config.seed.trust_remote_code, option=OPTION
            )
            with set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
                model = build_hf_causal_lm(args)
        assets = Path(config.model.hf_assets_path)
        if not any((folder / name).is_file() and (assets / name).is_file() for name in TOKENIZER_FILES):
            logger.warning(
                f"{OPTION} {str(folder)!r} has no tokenizer's file that {str(assets)!r} has too, to compare: its token ids are taken "
                "to be the model's"
            )
        self._model = model.eval()
        if needed:
            parallelize_frozen(model, dims, config)
            offloaded = config.training.enable_cpu_offload and dims.fsdp_enabled
            model.to_empty(device="cpu" if offloaded else device)
            with torch.no_grad():
                model.init_weights(device)
        held: dict[str, Any] = get_model_state_dict(model)
        state = {key: value for key, value in held.items() if key not in model.tied_keys}
        local = state if needed else {}
        target = seed_target(model, state, args.load())
        ignored = [*(f"{head}.*" for head in HEAD_NAMES), *config.seed.ignore_source_keys]
        options_of_file = replace(
            config.seed,
            new_parameters=[],
            ignore_source_keys=ignored,
            key_map=[],
            allow_config_difference=[],
            resize_vocabulary=False,
        )
        with failing_together(SeedError):
            source, keys, *_ = match(target, folder, options_of_file)
        if len({*gathered(source.digest)}) > 1:
            raise SeedError(f"the ranks see different files at {OPTION} {str(folder)!r}; give all nodes the same copy")
        with failing_together(SeedError):
            read_weights(source, local, model.tied_keys, True, logged_progress())
        digests = compare_replicas(local, state, int(needed))
        self.digest = weights_digest(digests, state, keys.loaded)
        """SHA-256 over the values as they are in the model."""
        files = asset_digests(folder, config.seed.trust_remote_code).items()
        self.code = {name: digest for name, digest in files if name == "config.json" or name.endswith(".py")}
        """SHA-256 of each file that says what is computed with the values."""
        self._form = mask_form(options.teacher_attention, model, device)
        # A summary attends to ``future_k`` tokens, that whose state it is included.
        windows = attention_windows(model.config).items()
        self._windows = {kind: min((k for k in (window, self._future_k) if k), default=0) for kind, window in windows}
        logger.info(
            f"Loaded the reverse model from {options.reverse_model} ({source.layout}): {len(keys.loaded)} tensors, frozen, "
            f"in {time.perf_counter() - begin:.2f} s"
        )

    @torch.no_grad()  # not inference_mode, see ModelRunner.forward
    def states(self, input_ids: Tensor, doc_ids: Tensor) -> Tensor:
        """(B, T) tokens and documents to the (B, T, D) last hidden states, in the order in which the model reads: backwards."""
        backwards, documents = input_ids.flip(1), doc_ids.flip(1)
        rows = torch.arange(input_ids.shape[1], device=input_ids.device)
        make = causal_block_mask if self._form == "flex" else causal_mask
        masks = {kind: make(documents, window, rows, rows) for kind, window in self._windows.items()}
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        positions = positions_in_documents(documents)
        states: Tensor = self._model(backwards, attention_mask=mask, position_ids=positions, output="hidden_states")
        forget_forwards(self._model)
        return states
