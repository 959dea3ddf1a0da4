"""torchtitan's ``CheckpointManager`` with four differences: step 0 is seeded, a step is complete or absent, it is read
with suspicion, and the last save exports to a folder of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torchtitan.components.checkpoint import MODEL, AsyncMode, CheckpointManager, ModelWrapper
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import GarbageCollection

from flame_ext.checkpoint.reading import StepPlanner, StepReader
from flame_ext.checkpoint.rng import RankRNG
from flame_ext.checkpoint.steps import (
    CompleteStep,
    complete_step,
    damaged_files,
    describe_files,
    find_steps,
    recover_replaced,
    start,
    temporary_path,
    written_files,
)
from flame_ext.checkpoint.writing import StepWriter
from flame_ext.distributed import describe, failing_together, is_main_rank
from flame_ext.errors import CheckpointError
from flame_ext.fault_injection import fault_point
from flame_ext.run.background_export import BackgroundExports

RNG = "rng"


class UntiedModelWrapper(ModelWrapper):
    """The model's state dict with each tied parameter once, under the key that Hugging Face files hold."""

    def _get_state_dict(self) -> dict[str, Any]:
        tied = {name for model in self.model for name in model.tied_keys}
        return {key: tensor for key, tensor in super()._get_state_dict().items() if key not in tied}


class SeedingCheckpointManager(CheckpointManager):
    """See the module.

    Args:
        seed: puts the weights of a folder into the model (``checkpoint.initial_load_path``); collective.
        export: writes the model as a Hugging Face folder for a step; collective.
        facts: what every manifest records beside step and files.
        resumed: called with the manifest and the folder of the step that is to be resumed, before anything of it is loaded; what
            it returns is called after.
        admit: whether a step may be saved; collective.
        exports: of steps that are complete, on the main rank.
        **kwargs: the host's.
    """

    last_save_in_hf: bool

    def __init__(
        self,
        *,
        seed: Callable[[str], None],
        export: Callable[[int], None],
        facts: Callable[[], dict[str, Any]],
        resumed: Callable[[dict[str, Any], Path], Callable[[], None]],
        admit: Callable[[int], bool],
        exports: BackgroundExports,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._seed, self._export, self._facts, self._resumed, self._admit = seed, export, facts, resumed, admit
        self._exports = exports
        self.states[MODEL] = UntiedModelWrapper(kwargs["model_parts"])
        self.states[RNG] = RankRNG()
        self.hf_assets_path = self.sd_adapter.hf_assets_path

    # -- loading -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        """Resume from a complete step if there is one, else seed from the source. Never leaves random weights.

        Raises:
            CheckpointError: ``step`` is asked for by number and is not there complete and undamaged; or every step is
                damaged.
            ConfigError: the step is of a run with other numbers.
            SeedError: the source can not be put into the model.
        """
        folder = Path(self.folder)
        with failing_together(CheckpointError):
            if is_main_rank():
                recover_replaced(folder)
        with failing_together(CheckpointError):
            steps, passed_over = find_steps(folder)
            for line in passed_over:
                logger.warning(f"Passed over {folder / line}")
            if step != -1 and step not in {s.step for s in steps}:
                there = ", ".join(str(s.step) for s in steps) or "none"
                raise CheckpointError(
                    f"checkpoint.load_step = {step}: no complete step of that number in {folder} (complete: {there})"
                )
        chosen = self._undamaged([s for s in steps if step in (-1, s.step)])
        if chosen is None:
            self._seed_from_source(folder)
            return True
        if self.initial_load_path:
            logger.info(f"Resuming from {chosen.path}; passed over checkpoint.initial_load_path, which is for step 0")
        if chosen.manifest.get("model_only"):
            raise CheckpointError(
                f"{chosen.path} holds the model alone (checkpoint.last_save_model_only), which can not be resumed; continue "
                "from its export with a new job.dump_folder, or set last_save_model_only = false before the last step"
            )
        loaded = self._resumed(chosen.manifest, chosen.path)
        states = self._states_to_load(model_only=False)
        if not self.states[RNG].fits(chosen.manifest["world_size"]) or not self._shares_models_as(chosen):
            del states[RNG]
            logger.info(f"{chosen.path} has the random number generators of other ranks: they start anew")
        self.dcp_load(states, str(chosen.path), from_hf=False, from_quantized=False)
        GarbageCollection.collect("GC collection for checkpoint loading.")
        loaded()
        if is_main_rank():
            for other in steps:  # those that were not finished, or not begun
                if other.manifest.get("run") == chosen.manifest.get("run") and other.step <= chosen.step:
                    self._exports.start(other.path, just_saved=False)
        logger.info(f"Resumed from {chosen.path} (complete: {', '.join(str(s.step) for s in steps)})")
        return True

    def _shares_models_as(self, step: CompleteStep) -> bool:
        """Whether as many ranks share one model out, and so draw the same numbers for it."""
        then, now = step.manifest.get("parallelism", {}), self._facts().get("parallelism", {})
        return all(then.get(name, 1) == now.get(name, 1) for name in ("tp", "pp"))

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """As the host's, but nothing is unpickled that is not plain data. Collective.

        Raises:
            CheckpointError: on every rank.
        """
        path = Path(checkpoint_id)
        with failing_together(CheckpointError):  # first, and apart: DCP would log it as a traceback
            StepReader(path).read_metadata()
        try:
            dcp.load(state_dict, storage_reader=StepReader(path), planner=StepPlanner())
        except CheckpointException as e:
            raise CheckpointError(f"{path} can not be loaded: {_first_failure(e)}") from e
        self.states[MODEL].load_state_dict(state_dict)

    def newest_step(self) -> CompleteStep | None:
        """The complete step with the highest number, whose files have not been read yet."""
        with failing_together(CheckpointError):
            steps, _ = find_steps(Path(self.folder))
        return steps[-1] if steps else None

    def load_model(self, step: CompleteStep) -> None:
        """The weights of a step alone. Collective."""
        if self._undamaged([step]) is not None:
            self.dcp_load(self.states[MODEL].state_dict(), str(step.path), from_hf=False, from_quantized=False)

    def _undamaged(self, candidates: list[CompleteStep]) -> CompleteStep | None:
        """The last of these steps whose files have their SHA-256, which the ranks share out. Collective.

        Raises:
            CheckpointError: there are steps, and all of them are damaged.
        """
        problems: list[str] = []
        for candidate in reversed(candidates):
            files = sorted(candidate.manifest["files"])
            found = [line for part in _gathered(partial(damaged_files, candidate), files) for line in part]
            if not found:
                return candidate
            problems.append(f"{candidate.path}: {'; '.join(found)}")
            if len(candidates) > 1:
                logger.warning(f"Passed over {problems[-1]}")
        if problems:
            raise CheckpointError(
                f"{'; '.join(problems)}; restore the files from a copy, or start anew with another job.dump_folder"
            )
        return None

    def _seed_from_source(self, folder: Path) -> None:
        path = self.initial_load_path
        if path is None:
            path = self.hf_assets_path
            logger.info(
                "Seeding from model.hf_assets_path (checkpoint.initial_load_in_hf is set, initial_load_path is not)"
            )
        logger.info(f"No complete step in {folder}: seeding step 0 from {path}")
        self._seed(path)

    # -- saving --------------------------------------------------------------------------------------------------

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """As the host's, but a step that is not admitted is not saved.

        Raises:
            CheckpointError: on every rank, if a file can not be written, or if it is the last step that is not admitted.
        """
        if self._should_save(curr_step, last_step) and not self._admit(curr_step):
            refusal = f"step {curr_step} is not saved: its gradient norm, losses or weights are not finite"
            if last_step:
                raise CheckpointError(
                    f"{refusal}; look at metrics.jsonl, and resume from an earlier step with a lower rate"
                )
            logger.warning(refusal)
            return
        super().save(curr_step, last_step)

    def save_now(self, step: int) -> None:
        """Save a step that is not due, and be done with it on return, unless it is there or is not admitted. Collective."""
        if not self.enable or self.load_only:
            return
        self._async_wait()
        newest = self.newest_step()
        if (newest is not None and newest.step == step) or not self._admit(step):
            return
        self.dcp_save(self._flattened_model_states_sd(), self._create_checkpoint_id(step), AsyncMode.DISABLED, True)
        self._purge_stale_checkpoints()

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """Save under a temporary name; the main rank completes the step when all ranks' files are written."""
        final = Path(checkpoint_id)
        step = int(final.name.removeprefix("step-"))
        facts = {"world_size": dist.get_world_size(), "model_only": "train_state" not in state_dict, **self._facts()}
        with failing_together(CheckpointError):
            if is_main_rank():
                start(final)
        try:
            result = self._write(state_dict, StepWriter(temporary_path(final)), async_mode)
        except CheckpointException as e:
            raise CheckpointError(f"{final} can not be saved: {_first_failure(e)}") from e
        if enable_garbage_collection:
            GarbageCollection.collect("GC collection invoked by checkpointer.")
        if async_mode == AsyncMode.DISABLED:
            fault_point("after_shards")
            files: dict[str, dict[str, Any]] = {}
            for part in _gathered(partial(describe_files, temporary_path(final)), _listed(final)):
                files |= part
            with failing_together(CheckpointError):
                if is_main_rank():
                    complete_step(final, step, facts, files)
                    self._exports.start(final, just_saved=True)
            return result
        fault_point("during_async_save")
        if not is_main_rank():
            return result

        def complete() -> None:
            complete_step(final, step, facts, describe_files(temporary_path(final), written_files(final)))
            self._exports.start(final, just_saved=True)

        # DCP's coordinator is this rank, and its upload is done only when every rank's files are. What the host waits
        # for from here on is the upload and the step's completion.
        if isinstance(result, AsyncSaveResponse):
            return AsyncSaveResponse(result.staging_completion, _then(result.upload_completion, complete))
        return _then(result, complete)

    def _write(self, state_dict: dict[str, Any], writer: StepWriter, async_mode: AsyncMode) -> Any:
        """What the host does, with a writer of our own."""
        if async_mode == AsyncMode.DISABLED:
            return dcp.save(state_dict, storage_writer=writer)
        if async_mode == AsyncMode.ASYNC:
            return dcp.async_save(state_dict, storage_writer=writer, process_group=self.pg)
        return dcp.async_save(
            state_dict,
            storage_writer=writer,
            process_group=self.pg,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            async_stager=self.stager,
        )

    def background_error(self) -> str | None:
        """What went wrong in a save or export that has ended in the background, on this rank; None if nothing did."""
        future = getattr(self, "save_future", None)
        error = future.exception() if future is not None and future.done() else None
        return self._exports.error() if error is None else f"the save in the background failed: {_first_failure(error)}"

    def finish_exports(self) -> None:
        """Wait for exports in the background. Collective, a small one every second: exports may outlast any timeout.

        Raises:
            CheckpointError: on every rank, if one failed.
        """
        while True:
            busy = [bool(self._exports.in_use())]
            dist.broadcast_object_list(busy, src=0)
            if not busy[0]:
                break
            time.sleep(1)
        with failing_together(CheckpointError):
            if (error := self._exports.error()) is not None:
                raise CheckpointError(error)

    def _async_wait(self) -> None:
        try:
            super()._async_wait()
        except (OSError, CheckpointError, CheckpointException) as e:
            raise CheckpointError(f"the save in the background failed: {_first_failure(e)}") from e

    def close(self) -> None:
        """Wait for a save in the background before the host tears its threads down."""
        if getattr(self, "save_future", None) is not None:
            self._async_wait()
        self._exports.cancel()
        super().close()

    def _save_last_step(self, curr_step: int) -> None:
        export, self.last_save_in_hf = self.last_save_in_hf, False
        try:
            super()._save_last_step(curr_step)
        finally:
            self.last_save_in_hf = export
        self._purge_stale_checkpoints()
        if export:
            # Not into checkpoint/step-N as the host does: a later run would take the export for a step to resume.
            self._export(curr_step)

    def _purge_stale_checkpoints(self) -> None:
        """Only complete steps of this run count towards ``keep_latest_k`` and only they are deleted."""
        if self.keep_latest_k > 0 and is_main_rank():
            run = self._facts()["run"]
            steps = [step for step in find_steps(Path(self.folder))[0] if step.manifest.get("run") == run]
            in_use = self._exports.in_use()
            for stale in (step for step in steps[: -self.keep_latest_k] if step.path not in in_use):
                self.purge_queue.put(str(stale.path))


def _then(upload: Future[Any], action: Callable[[], None]) -> Future[None]:
    """A future that is done when ``upload`` is and ``action`` has run, or has the exception of either."""
    completed: Future[None] = Future()

    def finish(future: Future[Any]) -> None:
        try:
            future.result()
            action()
        except BaseException as e:  # DCP's CheckpointException is one; whoever waits gets it
            completed.set_exception(e)
        else:
            completed.set_result(None)

    upload.add_done_callback(finish)
    return completed


def _listed(final: Path) -> list[str]:
    """The files that all ranks have written, as the main rank sees them: a network file system shows others older lists."""
    names: list[list[str]] = [[]]
    with failing_together(CheckpointError):
        if is_main_rank():
            names = [written_files(final)]
    dist.broadcast_object_list(names, src=0)
    return names[0]


def _gathered(action: Callable[[list[str]], Any], files: list[str]) -> list[Any]:
    """What ``action`` gives for each rank's share of the files. Collective.

    Raises:
        CheckpointError: on every rank, if it fails on any.
    """
    share = None
    with failing_together(CheckpointError):
        share = action(files[dist.get_rank() :: dist.get_world_size()])
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, share)
    return shares


def _first_failure(error: BaseException) -> str:
    """What DCP's collection of every rank's exception and traceback is about: the first exception, with its path and errno."""
    if isinstance(error, CheckpointException):
        rank, (first, _) = min(error.failures.items())
        return f"[rank {rank}] {_first_failure(first)}"
    return describe(error)
