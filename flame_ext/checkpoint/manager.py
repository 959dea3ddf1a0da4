"""torchtitan's ``CheckpointManager``, but step 0 is seeded, and a saved step is complete or absent and read without running code."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torchtitan.components.checkpoint import MODEL, AsyncMode
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import GarbageCollection

from flame_ext.checkpoint.files import RankRNG, StepPlanner, StepWriter
from flame_ext.checkpoint.hooks import CheckpointHooks
from flame_ext.checkpoint.lineage import ROOT, Lineage, StepFolder, as_json, lineage_of, read_steps, record_lineage
from flame_ext.checkpoint.steps import (
    MANIFEST_NAME,
    CompleteStep,
    complete_step,
    damaged_files,
    describe_files,
    read_manifest,
    recover,
    set_aside,
    start,
    temporary_path,
    written_files,
)
from flame_ext.distributed import (
    describe,
    failing_together,
    from_main_rank,
    gathered,
    is_main_rank,
    object_group,
    on_main_rank,
)
from flame_ext.errors import CheckpointError
from flame_ext.fault_injection import fault_point
from flame_ext.host.names import CheckpointManager, ModelWrapper
from flame_ext.model.quantization import plain
from flame_ext.seeding.sources.dcp import DcpReader

RNG = "rng"


class UntiedModelWrapper(ModelWrapper):
    """Gives the part of the model's state dict that steps hold, with each tied parameter once.

    Beside adapters the backbone's parameters stay as the source has them, and no step holds them.
    """

    def whole(self) -> dict[str, Any]:
        """Returns all of the state dict, with each tied parameter once."""
        tied = {name for model in self.model for name in model.tied_keys}
        return {key: plain(tensor) for key, tensor in super()._get_state_dict().items() if key not in tied}

    def _get_state_dict(self) -> dict[str, Any]:
        whole = self.model[0].whole
        return {key: tensor for key, tensor in self.whole().items() if not whole.is_left_to_source(key)}


class SeedingCheckpointManager(CheckpointManager):
    """Takes torchtitan's arguments. The trainer sets :attr:`hooks` before it loads or saves anything."""

    hooks: CheckpointHooks
    stager: Any  # torchtitan's, of asynchronous saves from pinned memory
    lineage: Lineage = ROOT  # of the steps that are saved from now on

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.states[MODEL] = UntiedModelWrapper(kwargs["model_parts"])
        self.states[RNG] = RankRNG()
        # torchtitan would export into checkpoint/step-N, which a later run would take for a step to resume.
        self._exports_last_step, self.last_save_in_hf = kwargs["checkpoint_config"].last_save_in_hf, False

    # -- loading -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load(self, step: int = -1, only_try: bool = False) -> bool:
        """Resumes from the newest complete step of the current lineage, or from ``step``; without steps, seeds. Collective.

        Args:
            step: ``checkpoint.load_step``; it yields to newer steps of the lineage that it began.
            only_try: leaves the folder of the steps as it is: nothing is to be saved.

        Raises:
            CheckpointError: ``step`` is not there complete and undamaged, or every step is damaged.
            ConfigError: the options that determine the numbers differ from those of the step's run.
            SeedError: the source cannot be put into the model.
        """
        folder, candidates = self.find(step)
        for line in folder.passed_over:
            logger.warning(f"Passed over {folder.path / line}")
        chosen = self._undamaged(candidates)
        if chosen is None:
            path = self._source
            if self.initial_load_path is None:
                logger.info(
                    "Seeding from model.hf_assets_path (checkpoint.initial_load_in_hf is set, initial_load_path is not)"
                )
            logger.info(f"No complete step in {folder.path}: seeding step 0 from {path}")
            self.hooks.seed(path)
            return True
        if self.initial_load_path:
            logger.info(f"Resuming from {chosen.path}; passed over checkpoint.initial_load_path, which is for step 0")
        if chosen.manifest.get("model_only"):
            raise CheckpointError(
                f"{chosen.path} holds the model alone (checkpoint.last_save_model_only), which cannot be resumed; continue "
                "from its export with a new job.dump_folder, or set last_save_model_only = false before the last step"
            )
        loaded = self.hooks.resumed(chosen.manifest, chosen.path)
        self._yield(folder, chosen, step)
        states = self._states_to_load(model_only=False)
        if not self.states[RNG].fits(chosen.manifest.get("world_size")) or not self._shares_models_as(chosen):
            del states[RNG]
            logger.info(f"{chosen.path} has the random number generators of other ranks: they start anew")
        self.dcp_load(states, str(chosen.path), from_hf=False, from_quantized=False)
        self.hooks.read_rest(chosen.manifest, self._source)
        GarbageCollection.collect("GC collection for checkpoint loading.")
        loaded()
        if not only_try and not self.load_only:
            self._go_on(folder, chosen, step)
        logger.info(f"Resumed from {chosen.path} (complete: {', '.join(str(s.step) for s in folder.steps)})")
        return True

    @property
    def _source(self) -> str:
        return self.initial_load_path or self.sd_adapter.hf_assets_path

    def find(self, step: int) -> tuple[StepFolder, list[CompleteStep]]:
        """Returns the steps in the folder and those to go on from, the last one first in line. Collective.

        Args:
            step: ``checkpoint.load_step``; a CheckpointError is raised if there is no complete step of that number.
        """
        on_main_rank(recover, Path(self.folder))
        # Hosts may see different lists on a network file system.
        folder = from_main_rank(on_main_rank(read_steps, Path(self.folder)))
        assert folder is not None
        with failing_together(CheckpointError):
            return folder, folder.candidates(step)

    def _yield(self, folder: StepFolder, chosen: CompleteStep, load_step: int) -> None:
        """Says that ``load_step`` yields to a newer step; raises a CheckpointError if that is of another configuration."""
        if not folder.yields(load_step) or chosen.step == load_step:
            return
        why = f"this folder went back to step {load_step} before and has gone on to {chosen.path}"
        if chosen.manifest.get("config_sha256") != self.hooks.facts().get("config_sha256"):
            later = ", ".join(s.path.name for s in folder.current if s.step > load_step)
            raise CheckpointError(
                f"checkpoint.load_step = {load_step}: {why} with another configuration; to go on from there, leave out "
                f"load_step; to go back to step {load_step} once more, move these out of the folder first: {later}"
            )
        logger.warning(f"checkpoint.load_step = {load_step} yields: {why}")

    def _go_on(self, folder: StepFolder, chosen: CompleteStep, load_step: int) -> None:
        """Begins a branch if need be, and makes up for exports that were not finished, or not begun. Collective."""
        run, self.lineage = chosen.manifest.get("run"), folder.lineage_from(chosen, load_step)
        given_up = folder.given_up(run, self.lineage)
        if self.lineage != folder.lineage:
            on_main_rank(record_lineage, folder.path, run, self.lineage)
            left = f"; not on it, and left until a save takes their name: {', '.join(given_up)}" if given_up else ""
            logger.warning(f"Going back to {chosen.path}: a branch begins after it{left}")
        self.make_up_exports([s for s in folder.of(run, self.lineage) if s.step <= chosen.step])
        self.hooks.follow_exports(chosen.step, complete=False, given_up=given_up)

    def make_up(self, folder: StepFolder, last: CompleteStep, load_step: int) -> bool:
        """Makes what a run that has saved its ``last`` step still lacks: exports, and then deletions. Returns False if a stop signal
        came before that. Collective.
        """
        self.hooks.resumed(last.manifest, last.path)
        self._yield(folder, last, load_step)
        self.lineage = lineage_of(last)
        run = last.manifest.get("run")
        before = [s for s in folder.of(run, self.lineage) if s.step <= last.step]
        self.make_up_exports([s for s in before if s is not last or not self._exports_last_step])
        if self._exports_last_step and not self.hooks.is_exported(last.step):
            self.load_model(last)
            self.hooks.export(last.step)
        self.hooks.follow_exports(last.step, complete=True, given_up=folder.given_up(run, self.lineage))
        return self.finish_exports(purge=last in folder.current)

    def make_up_exports(self, steps: list[CompleteStep]) -> None:
        """Starts the exports of these steps that are due and not there."""
        for step in steps if is_main_rank() else []:
            self.hooks.exports.start(step.path, just_saved=False)

    def _shares_models_as(self, step: CompleteStep) -> bool:
        """Returns whether the step's ranks split a model as these do, and so draw the same random numbers for it."""
        then, now = step.manifest.get("parallelism", {}), self.hooks.facts().get("parallelism", {})
        return all(then.get(name, 1) == now.get(name, 1) for name in ("tp", "pp"))

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Loads as torchtitan does, but unpickles only plain data; a CheckpointError is raised on all ranks. Collective."""
        path = Path(checkpoint_id)
        with failing_together(CheckpointError):  # first, and apart: DCP would log it as a traceback
            _require_listed(
                path, {info.relative_path for info in DcpReader(path).read_metadata().storage_data.values()}
            )
        try:
            dcp.load(state_dict, storage_reader=DcpReader(path), planner=StepPlanner(), process_group=object_group())
        except CheckpointException as e:
            raise CheckpointError(f"{path} cannot be loaded: {_first_failure(e)}") from e
        self.states[MODEL].load_state_dict(state_dict)

    def load_model(self, step: CompleteStep) -> None:
        """Loads the weights alone of a step. Collective."""
        if self._undamaged([step]) is not None:
            self.dcp_load(self.states[MODEL].state_dict(), str(step.path), from_hf=False, from_quantized=False)
            self.hooks.read_rest(step.manifest, self._source)

    def _undamaged(self, candidates: list[CompleteStep]) -> CompleteStep | None:
        """Returns the last step whose files have their SHA-256, None without candidates; raises if all are damaged. Collective."""
        problems: list[str] = []
        for candidate in reversed(candidates):
            files = sorted(candidate.manifest["files"])
            found = [line for part in _shared_out(partial(damaged_files, candidate), files) for line in part]
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

    # -- saving --------------------------------------------------------------------------------------------------

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Saves as torchtitan does, but only a step that :meth:`CheckpointHooks.admit` admits. Collective; a CheckpointError is
        raised on all ranks if a file cannot be written, or the last step is not admitted.
        """
        if self._should_save(curr_step, last_step):
            if not self.hooks.admit(curr_step):
                refusal = f"step {curr_step} is not saved: its gradient norm, losses or weights are not finite"
                if last_step:
                    remedy = "look at metrics.jsonl, and resume from an earlier step with a lower rate"
                    raise CheckpointError(f"{refusal}; {remedy}")
                logger.warning(refusal)
                return
            self._wait_for_all()
        super().save(curr_step, last_step)

    def save_now(self, step: int) -> None:
        """Saves a step that is not due, in the foreground, unless it is saved already or not admitted. Collective."""
        if not self.enable or self.load_only:
            return
        self._wait_for_all()
        folder, _ = self.find(-1)
        if any(s.step == step for s in folder.current) or not self.hooks.admit(step):
            return
        self.dcp_save(self._flattened_model_states_sd(), self._create_checkpoint_id(step), AsyncMode.DISABLED)
        self._purge_stale_checkpoints()

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, async_mode: AsyncMode, **_: Any) -> Any:
        """Saves under a temporary name; the main rank completes the step when the files of all ranks are written."""
        final = Path(checkpoint_id)
        step, temporary = int(final.name.removeprefix("step-")), temporary_path(final)
        facts = {
            "world_size": dist.get_world_size(),
            "model_only": "train_state" not in state_dict,
            "lineage": as_json(self.lineage),
            **self.hooks.facts(),
        }

        def complete(files: dict[str, dict[str, Any]]) -> None:
            complete_step(final, step, facts, files)
            self.hooks.exports.start(final, just_saved=True)

        on_main_rank(start, final)
        writer, pinned = StepWriter(temporary), {}
        if async_mode == AsyncMode.ASYNC_WITH_PINNED_MEM:
            pinned = {"async_checkpointer_type": AsyncCheckpointerType.PROCESS, "async_stager": self.stager}
        try:
            if async_mode == AsyncMode.DISABLED:
                result: Any = dcp.save(state_dict, storage_writer=writer, process_group=object_group())
            else:
                result = dcp.async_save(state_dict, storage_writer=writer, process_group=self.pg, **pinned)
                if torch.__version__ < "2.13":
                    self.stager = None  # in torch 2.11 one stages once; torchtitan makes another
        except CheckpointException as e:
            raise CheckpointError(f"{final} cannot be saved: {_first_failure(e)}") from e
        if async_mode == AsyncMode.DISABLED:
            GarbageCollection.collect("GC collection invoked by checkpointer.")
            fault_point("after_shards")
            # On a network file system, other hosts may see an older list.
            names = from_main_rank(on_main_rank(written_files, final)) or []
            described = _shared_out(partial(describe_files, temporary), names)
            on_main_rank(complete, {name: file for part in described for name, file in part.items()})
            return result
        fault_point("during_async_save")
        if not is_main_rank():
            return result

        # DCP's coordinator is the main rank: its upload is done when the files of all ranks are. torchtitan then waits for
        # the upload and the completion of the step.
        def complete_alone() -> None:
            complete(describe_files(temporary, written_files(final)))

        if isinstance(result, AsyncSaveResponse):
            return AsyncSaveResponse(result.staging_completion, _then(result.upload_completion, complete_alone))
        return _then(result, complete_alone)

    def background_error(self) -> str | None:
        """Returns why a save or an export in the background of this rank has failed; None if none has."""
        future = getattr(self, "save_future", None)
        if future is not None and future.done() and (error := future.exception()) is not None:
            return f"the save in the background failed: {_first_failure(error)}"
        return self.hooks.exports.error()

    def finish_exports(self, purge: bool = True) -> bool:
        """Waits for exports in the background and what follows exports, then deletes the steps that they have read. Returns False if
        a stop signal came first: the next run makes up for it. Collective once a second, lest it time out; raises on all ranks if an
        export failed.
        """
        said: list[str] = []
        while True:
            exporting = self.hooks.exports.running()  # first: an export has begun what follows it before it is done
            following = self.hooks.followers.end()
            if any(job not in said for job in following):
                said = following
                logger.info(f"Waiting for what follows exports: {', '.join(following)}")
            ranks = gathered((exporting or bool(following), self.hooks.stopped()))
            if not any(running for running, _ in ranks):
                break
            if any(stopped for _, stopped in ranks):
                return False
            time.sleep(1)
        with failing_together(CheckpointError):
            if (error := self.hooks.exports.error()) is not None:
                raise CheckpointError(error)
        if purge and not self.load_only:
            self._purge_stale_checkpoints()
        return True

    def _wait_for_all(self) -> None:
        """Waits for a save in the background; raises on all ranks if it has failed, which the main rank alone may know. Collective."""
        if self.async_mode != AsyncMode.DISABLED:
            with failing_together(CheckpointError):
                self._async_wait()

    def _async_wait(self) -> None:
        try:
            super()._async_wait()
        except (OSError, CheckpointError, CheckpointException) as e:
            raise CheckpointError(f"the save in the background failed: {_first_failure(e)}") from e

    def __del__(self) -> None:
        """Nothing: the trainer closes, and one that was not built whole has nothing to close."""

    def close(self) -> None:
        """Waits for a save in the background, then closes as torchtitan does."""
        if getattr(self, "save_future", None) is not None:
            self._async_wait()
        self.hooks.exports.cancel()
        self.hooks.followers.cancel()
        super().close()

    def _save_last_step(self, curr_step: int) -> None:
        super()._save_last_step(curr_step)
        self._purge_stale_checkpoints()
        if self._exports_last_step:
            self.hooks.export(curr_step)

    def _purge_stale_checkpoints(self) -> None:
        """Deletes all but the newest ``keep_latest_k`` complete steps of this run's lineage. Collective."""

        def purge() -> None:
            steps = read_steps(Path(self.folder)).of(self.hooks.facts()["run"], self.lineage)
            in_use = self.hooks.exports.in_use()
            for stale in (step for step in steps[: -self.keep_latest_k] if step.path not in in_use):
                try:
                    self.purge_queue.put(str(set_aside(stale.path)))
                except OSError as e:
                    logger.warning(f"{stale.path} cannot be deleted: {e}")
                fault_point("before_delete")

        if self.keep_latest_k > 0:
            on_main_rank(purge)


def _require_listed(step: Path, files: set[str]) -> None:
    """Raises a CheckpointError if a file of a step is not listed in its manifest, so that nobody has looked whether it is damaged."""
    plain = {name for name in files if Path(name).name == name and not (step / name).is_symlink()}
    if unlisted := sorted(plain - read_manifest(step)["files"].keys()):
        raise CheckpointError(
            f"{step}: its {MANIFEST_NAME} does not list {', '.join(unlisted[:8])}: restore it from a copy"
        )


def _then(upload: Future[Any], action: Callable[[], None]) -> Future[None]:
    """Returns a future that is done when ``upload`` is and ``action`` has run; it has the exception of either."""

    def finish() -> None:
        upload.result()
        action()

    executor = ThreadPoolExecutor(1, thread_name_prefix="complete")
    completed = executor.submit(finish)
    executor.shutdown(wait=False)
    return completed


def _shared_out(action: Callable[[list[str]], Any], files: list[str]) -> list[Any]:
    """Returns the results of ``action`` on each rank's share of the files; fails on all ranks together. Collective."""
    share = None
    with failing_together(CheckpointError):
        share = action(files[dist.get_rank() :: dist.get_world_size()])
    return gathered(share)


def _first_failure(error: BaseException) -> str:
    """Returns the message of the exception of the first rank that DCP reports."""
    if isinstance(error, CheckpointException):
        rank, (first, _) = min(error.failures.items())
        return f"[rank {rank}] {_first_failure(first)}"
    return describe(error)
