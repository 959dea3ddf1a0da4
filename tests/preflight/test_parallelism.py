"""Refusals of parallelism by its options; those by the architecture are tried in tests/model."""

from __future__ import annotations

import pytest

from tests.preflight.refusals import refusal

PP2 = "--parallelism.pipeline_parallel_degree=2"
SCHEDULE = "--parallelism.pipeline_parallel_schedule"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["pipeline_parallel_schedule=DualPipeV"], "parallelism.pipeline_parallel_schedule must be one of GPipe, 1F1B"),
        (["pipeline_parallel_schedule_csv=x.csv"], "parallelism.pipeline_parallel_schedule_csv is not supported"),
        (["pipeline_parallel_microbatch_size=3"], "must be >= 1 and divide training.local_batch_size (8), got 3"),
        (["pipeline_parallel_microbatch_size=8"], "needs at least as many micro-batches as ranks in the pipeline (2)"),
        (["pipeline_parallel_degree=8"], "parallelism.pipeline_parallel_degree gives 8 stages for a model of 4 layers"),
        (["pipeline_parallel_layers_per_stage=2"], "gives 3 stages on 2 ranks; pipeline_parallel_schedule '1F1B' needs one"),
        (["pipeline_parallel_layers_per_stage=0"], "pipeline_parallel_layers_per_stage must be >= 1, got 0"),
        (["pipeline_parallel_first_stage_less_layers=-1"], "pipeline_parallel_first_stage_less_layers must be >= 0"),
        (["pipeline_parallel_degree=0"], "parallelism.pipeline_parallel_degree must be >= 1 (1 = no pipeline), got 0"),
    ],
)  # fmt: skip
def test_options_that_make_no_pipeline_are_refused(options: list[str], message: str) -> None:
    assert message in refusal(PP2, *(f"--parallelism.{option}" for option in options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--future_predictor.freeze_backbone"], "only the last stage would have anything to train"),
        (["--training.local_batch_size=5", f"{SCHEDULE}=Interleaved1F1B"], "runs micro-batches in rounds of 2"),
        (["--optimizer.early_step_in_backward"], "a gradient is whole only after the backwards of all micro-batches"),
        (
            ["--future_encoder.summary_method=mean", "--future_encoder.no-detach_targets"],
            "the gradient of 'mean' summaries goes through the whole local batch, which a pipeline cuts",
        ),
    ],
)  # fmt: skip
def test_what_stages_can_not_do_is_refused(options: list[str], message: str) -> None:
    assert message in refusal(PP2, *options)
