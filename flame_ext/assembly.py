"""The one registration: what torchtitan finds by name once this is called."""

from __future__ import annotations

from torchtitan.protocols.model_converter import register_model_converter
from torchtitan.protocols.train_spec import register_train_spec

from flame_ext.data.sources import register_local_sources
from flame_ext.heads.converter import FuturePredictionConverter
from flame_ext.model.train_spec import MODEL_NAME, build_train_spec

CONVERTER_NAME = "future_prediction"

_done = False


def register() -> None:
    """Register TrainSpec, ModelConverter and local datasets with torchtitan. Safe to call again."""
    global _done
    if not _done:
        register_train_spec(MODEL_NAME, build_train_spec())
        register_model_converter(FuturePredictionConverter, CONVERTER_NAME)
        register_local_sources()
        _done = True
