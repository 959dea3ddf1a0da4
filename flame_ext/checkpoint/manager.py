"""torchtitan's ``CheckpointManager`` with three differences: step 0 is seeded, a step is complete or absent, and the
last save exports to a folder of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torchtitan.components.checkpoint import MODEL, AsyncMode, CheckpointManager, ModelWrapper
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import GarbageCollection

from flame_ext.checkpoint.steps import complete_step, find_steps, recover_replaced, start, temporary_path
from flame_ext.distributed import failing_together, is_main_rank
from flame_ext.errors import CheckpointError


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
        resumed: called with the manifest of the step that is resumed.
        **kwargs: the host's.
    """

    def __init__(
        self,
        *,
        seed: Callable[[str], None],
        export: Callable[[int], None],
        facts: Callable[[], dict[str, Any]],
        resumed: Callable[[dict[str, Any]], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._seed, self._export, self._facts, self._resumed = seed, export, facts, resumed
        self.states[MODEL] = UntiedModelWrapper(kwargs["model_parts"])
        self.hf_assets_path = self.sd_adapter.hf_assets_path

    # -- loading -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        """Resume from a complete step if there is one, else seed from the source. Never leaves random weights.

        Raises:
            CheckpointError: ``step`` is asked for by number and is not there complete.
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
            chosen = steps[-1] if steps else None
            if step != -1:
                chosen = next((s for s in steps if s.step == step), None)
                if chosen is None:
                    there = ", ".join(str(s.step) for s in steps) or "none"
                    raise CheckpointError(
                        f"checkpoint.load_step = {step}: no complete step of that number in {folder} (complete: {there})"
                    )
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
        self.dcp_load(self._states_to_load(model_only=False), str(chosen.path), from_hf=False, from_quantized=False)
        GarbageCollection.collect("GC collection for checkpoint loading.")
        self._resumed(chosen.manifest)
        logger.info(f"Resumed from {chosen.path} (complete: {', '.join(str(s.step) for s in steps)})")
        return True

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
        result = super().dcp_save(
            state_dict, str(temporary_path(final)), async_mode, enable_garbage_collection, to_hf=False
        )
        if async_mode == AsyncMode.DISABLED:
            with failing_together(CheckpointError):
                if is_main_rank():
                    complete_step(final, step, facts)
            return result
        if not is_main_rank():
            return result
        # DCP's coordinator is this rank, and its upload is done only when every rank's files are. What the host waits
        # for from here on is the upload and the step's completion.
        if isinstance(result, AsyncSaveResponse):
            completed = _then(result.upload_completion, lambda: complete_step(final, step, facts))
            return AsyncSaveResponse(result.staging_completion, completed)
        return _then(result, lambda: complete_step(final, step, facts))

    def _async_wait(self) -> None:
        try:
            super()._async_wait()
        except (OSError, CheckpointException) as e:
            raise CheckpointError(f"the last save in the background failed: {e}") from e

    def close(self) -> None:
        """Wait for a save in the background before the host tears its threads down."""
        if getattr(self, "save_future", None) is not None:
            self._async_wait()
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
        """Only complete steps count towards ``keep_latest_k`` and only they are deleted."""
        if self.keep_latest_k > 0 and is_main_rank():
            steps, _ = find_steps(Path(self.folder))
            for stale in steps[: -self.keep_latest_k]:
                self.purge_queue.put(str(stale.path))


def _then(upload: Future, action: Callable[[], None]) -> Future:
    """A future that is done when ``upload`` is and ``action`` has run, or has the exception of either."""
    completed: Future = Future()

    def finish(future: Future) -> None:
        try:
            future.result()
            action()
        except BaseException as e:  # DCP's CheckpointException is one; whoever waits gets it
            completed.set_exception(e)
        else:
            completed.set_result(None)

    upload.add_done_callback(finish)
    return completed
