"""The TrainSpec's dataloader, from ``[data]`` and ``[training]``."""

from dataclasses import asdict
from functools import partial

from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from flame_ext.config.model_config import load_model_config
from flame_ext.config.sections import FlameJobConfig
from flame_ext.data.loader import PackedDataloader
from flame_ext.data.packing import PackedDocuments
from flame_ext.data.sources import open_documents, sources_of
from flame_ext.data.tokenizer import require_of_model
from flame_ext.distributed import failing_together, gathered
from flame_ext.errors import ConfigError


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: FlameJobConfig
) -> PackedDataloader:
    """Build the dataloader of this rank's lanes. With ``training.epochs``, set ``training.steps`` to the steps that these take.

    Raises ConfigError if a source is unusable (:func:`open_documents`). Preflight lets the number of workers divide that of the lanes.
    """
    data_config, training, loading = job_config.data, job_config.training, job_config.training.dataloader
    num_lanes = training.global_batch_size
    if num_lanes < 0:
        num_lanes = training.local_batch_size * dp_world_size
    lanes = range(dp_rank, num_lanes, dp_world_size)
    seq_len, vocab_size = training.seq_len, _vocab_size(tokenizer, job_config)
    open_source = partial(
        open_documents, tokenizer=tokenizer, num_lanes=num_lanes, seq_len=seq_len, vocab_size=vocab_size
    )
    named = sources_of(job_config)
    with failing_together(ConfigError):
        documents = [
            open_source(
                where,
                source,
                rng_seed=data_config.rng_seed + number if data_config.shuffle else None,
                epochs=training.epochs or (None if source.when_exhausted == "repeat" else 1),
                registered_path=None if data_config.sources else training.dataset_path,
            )
            for number, (where, source) in enumerate(named)
        ]
    data = PackedDocuments(
        documents,
        seq_len,
        lanes,
        num_lanes,
        weights=[source.weight for _, source in named],
        rng_seed=data_config.rng_seed,
        eos_id=getattr(tokenizer, "eos_id", None),
        reverse=data_config.reverse,
        pad=training.epochs > 0,
    )
    if training.epochs:
        training.steps = _steps_of(data)
        logger.info(f"training.epochs = {training.epochs}: {training.steps} steps")
    return PackedDataloader(data, dp_rank, dp_world_size, batch_size=training.local_batch_size, **asdict(loading))


def build_validation_dataloaders(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: FlameJobConfig
) -> dict[str, PackedDataloader]:
    """Returns the label of each of ``validation.sources``, "" for ``validation.dataset``, with its dataloader. Collective.

    Each document is read once, in order. Raises ConfigError if a source is unusable (:func:`open_documents`).
    """
    validation = job_config.validation
    batch_size, seq_len, loading = validation.local_batch_size, validation.seq_len, asdict(validation.dataloader)
    num_lanes = batch_size * dp_world_size
    lanes = range(dp_rank, num_lanes, dp_world_size)
    eos_id, vocab_size = getattr(tokenizer, "eos_id", None), _vocab_size(tokenizer, job_config)
    open_source = partial(
        open_documents, tokenizer=tokenizer, num_lanes=num_lanes, seq_len=seq_len, vocab_size=vocab_size
    )
    registered_path = None if validation.sources else validation.dataset_path
    found: dict[str, PackedDataloader] = {}
    for where, source in sources_of(job_config, "validation"):
        with failing_together(ConfigError):
            documents = open_source(where, source, rng_seed=None, epochs=1, registered_path=registered_path)
        data = PackedDocuments([documents], seq_len, lanes, num_lanes, eos_id=eos_id, reverse=job_config.data.reverse)
        label = source.reported_as if validation.sources else ""
        found[label] = PackedDataloader(data, dp_rank, dp_world_size, batch_size=batch_size, **loading)
    return found


def _steps_of(data: PackedDocuments) -> int:
    """Number of steps to the end of the longest lane of all ranks. Collective: each rank reads its lanes."""
    with failing_together(ConfigError):
        steps = data.steps()
    return max(gathered(steps))


def _vocab_size(tokenizer: BaseTokenizer, job_config: FlameJobConfig) -> int:
    """The model's vocabulary size. Also checks that the tokenizer belongs to the model."""
    config = load_model_config(job_config)
    require_of_model(tokenizer, config, job_config.model.hf_assets_path)
    return config.get_text_config().vocab_size
