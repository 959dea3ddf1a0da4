"""The TrainSpec's dataloader, from ``[data]`` and ``[training]``."""

from __future__ import annotations

from dataclasses import asdict

import torch.distributed as dist
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from flame_ext.data.loader import PackedDataloader
from flame_ext.data.packing import PackedDocuments
from flame_ext.data.sources import open_documents, sources_of
from flame_ext.data.tokenizer import require_of_model
from flame_ext.distributed import failing_together
from flame_ext.errors import ConfigError
from flame_ext.hf_config import load_hf_config


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig
) -> PackedDataloader:
    """Batches of this rank's lanes. With ``training.epochs``, ``training.steps`` is set to what they take.

    Raises:
        ConfigError: a source can not be read, is empty or has no such field, ids beyond the model's vocabulary, or workers that
            can not share the lanes.
    """
    training, loading = job_config.training, job_config.training.dataloader
    global_batch = training.global_batch_size
    if global_batch < 0:
        global_batch = training.local_batch_size * dp_world_size
    lanes = range(dp_rank, global_batch, dp_world_size)
    if loading.num_workers > 0 and len(lanes) % loading.num_workers:
        raise ConfigError(
            f"training.dataloader.num_workers ({loading.num_workers}) must divide the sequences that a rank has in a step "
            f"({len(lanes)}), which its workers share"
        )
    vocab_size = _vocab_size(tokenizer, job_config)
    named = sources_of(job_config)
    with failing_together(ConfigError):
        documents = [
            open_documents(
                where,
                source,
                tokenizer,
                num_lanes=global_batch,
                seq_len=training.seq_len,
                vocab_size=vocab_size,
                rng_seed=job_config.data.rng_seed + number if job_config.data.shuffle else None,
                epochs=training.epochs or (None if source.when_exhausted == "repeat" else 1),
                registered_path=None if job_config.data.sources else training.dataset_path,
            )
            for number, (where, source) in enumerate(named)
        ]
    data = PackedDocuments(
        documents,
        training.seq_len,
        lanes,
        global_batch,
        weights=[source.weight for _, source in named],
        rng_seed=job_config.data.rng_seed,
        eos_id=getattr(tokenizer, "eos_id", None),
        pad=training.epochs > 0,
    )
    if training.epochs:
        training.steps = _steps_of(data)
        logger.info(f"training.epochs = {training.epochs}: {training.steps} steps")
    return PackedDataloader(data, dp_rank, dp_world_size, batch_size=training.local_batch_size, **asdict(loading))


def build_validation_dataloaders(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig
) -> dict[str, tuple[PackedDataloader, int]]:
    """For each of ``validation.sources``, its label to its dataloader and the number of its batches. Collective.

    Documents come in their order, each once; the last batches are filled up without labels, so ranks have as many.

    Raises:
        ConfigError: as :func:`build_dataloader`.
    """
    validation = job_config.validation
    num_lanes = validation.local_batch_size * dp_world_size
    lanes = range(dp_rank, num_lanes, dp_world_size)
    vocab_size = _vocab_size(tokenizer, job_config)
    found: dict[str, tuple[PackedDataloader, int]] = {}
    for number, source in enumerate(validation.sources):
        where = f"validation.sources[{number}]"
        with failing_together(ConfigError):
            documents = open_documents(
                where,
                source,
                tokenizer,
                num_lanes=num_lanes,
                seq_len=validation.seq_len,
                vocab_size=vocab_size,
                rng_seed=None,
                epochs=1,
            )
        eos_id = getattr(tokenizer, "eos_id", None)
        data = PackedDocuments([documents], validation.seq_len, lanes, num_lanes, eos_id=eos_id, pad=True)
        loader = PackedDataloader(
            data, dp_rank, dp_world_size, batch_size=validation.local_batch_size, **asdict(validation.dataloader)
        )
        found[source.reported_as] = loader, _steps_of(data, None if validation.steps == -1 else validation.steps)
    return found


def _steps_of(data: PackedDocuments, limit: int | None = None) -> int:
    """How many steps the lanes of all ranks take to their ends, at most ``limit``. Collective: each rank reads its own."""
    with failing_together(ConfigError):
        steps = data.steps(limit)
    if not dist.is_initialized():
        return steps
    counted = [0] * dist.get_world_size()
    dist.all_gather_object(counted, steps)
    return max(counted)


def _vocab_size(tokenizer: BaseTokenizer, job_config: JobConfig) -> int:
    """Of the model, which the tokenizer has to belong to."""
    folder = job_config.model.hf_assets_path
    config = load_hf_config(folder, job_config.seed.trust_remote_code)
    require_of_model(tokenizer, config, folder)
    return config.get_text_config().vocab_size
