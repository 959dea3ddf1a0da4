"""Refusals of parallelism; those of tensor, pipeline and context parallelism are tried in tests/model."""

from __future__ import annotations

from tests.preflight.refusals import refusal


def test_expert_parallelism_is_refused() -> None:
    assert "parallelism.expert_parallel_degree must be 1" in refusal("--parallelism.expert_parallel_degree=2")
