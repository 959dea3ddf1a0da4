"""Implements :mod:`flame_ext.checkpoint.hooks` for a trainer."""

import math
import uuid
from collections.abc import Callable, Collection, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchtitan
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import MODEL
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.logging import logger

import flame_ext
from flame_ext.checkpoint.assets import read_assets
from flame_ext.checkpoint.card import card_of_step
from flame_ext.checkpoint.export import ExportSpec, export_hf
from flame_ext.checkpoint.export_folder import export_identity, exports_of, origin_of, why_not_exported
from flame_ext.checkpoint.gathering import BoxGatherer
from flame_ext.checkpoint.hooks import CheckpointHooks
from flame_ext.checkpoint.merging import adapter_summands
from flame_ext.checkpoint.push import check_token
from flame_ext.config.resume_record import asset_digests, check_unchanged, config_digest, config_record
from flame_ext.distributed import from_main_rank, is_main_rank, on_main_rank
from flame_ext.errors import ConfigError, SeedError
from flame_ext.heads.registry import head_arguments, record_of_heads
from flame_ext.host.high_precision import in_high_precision
from flame_ext.model.adapters import CONVERTER_NAME as LORA
from flame_ext.model.adapters import is_adapter, name_in_peft
from flame_ext.model.dtypes import dtypes_in
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.model.routing import KeptRoutes
from flame_ext.model.runner import ModelRunner, StageInputs
from flame_ext.run.background_evaluation import background_evaluation, require_tasks
from flame_ext.run.background_export import background_exports
from flame_ext.run.followers import Followers, followers_of
from flame_ext.run.optimization import configured_again
from flame_ext.seeding.accounting import matches
from flame_ext.seeding.again import read_again
from flame_ext.seeding.conversion import in_files
from flame_ext.seeding.proof.parity import Probe, probe_tokens
from flame_ext.seeding.report import changed_source
from flame_ext.seeding.seed import seed
from flame_ext.seeding.sources.dcp import DcpReader
from flame_ext.seeding.sources.hub import HUB_PREFIX
from flame_ext.seeding.sources.open import open_source
from flame_ext.seeding.sources.safe_files import some
from flame_ext.seeding.sources.traced import TracedTensor
from flame_ext.seeding.target import SeedTarget, in_source_names, seed_target


class RunHooks(CheckpointHooks):
    """Implements the hooks for a built :class:`flame_ext.trainer.FutureTrainer`.

    Args:
        attention_of: maps a batch of the dataloader and a slice of its sequences to the model's attention inputs.
        summaries: maps (1, T) tokens to anti-causal summaries; None if the run has none. Collective.
        summaries_remedy: what to do if these are not anti-causal.
    """

    def __init__(
        self,
        trainer: Any,
        attention_of: Callable[[dict[str, Tensor], slice], dict[str, Any]],
        summaries: Callable[..., Tensor | None] | None,
        summaries_remedy: str = "",
    ) -> None:
        self._trainer, self._attention_of = trainer, attention_of
        self._summaries, self._summaries_remedy = summaries, summaries_remedy
        self._config, self._device = trainer.job_config, trainer.device
        self._folder = Path(self._config.job.dump_folder)
        self._runner: ModelRunner = trainer.runner
        self._model: HFCausalLM = trainer.runner.model
        self.followers = Followers(
            [*followers_of(self._config), *background_evaluation(self._config)], self._folder / "hf", export_identity
        )
        self.exports = background_exports(
            self._config,
            lambda: trainer.finishing,
            lambda step, export: why_not_exported(step, export) is None,
            self._follow,
        )
        # Before the first step, since what cannot be read or exported must not end the run at its last export.
        assets, options = Path(self._config.model.hf_assets_path), self._config.seed
        self._assets = on_main_rank(read_assets, assets, options.trust_remote_code, options.follow_links) or {}
        if self._config.checkpoint.last_save_in_hf or self._config.export.interval > 0:
            whole = in_source_names(self._model, self._model.whole.state_dict())
            self._stored(whole, _dtypes(whole))
        if self._config.export.push_to_hub:
            on_main_rank(check_token, self._config.export.push_to_hub)
        if self._config.evaluation.tasks:
            on_main_rank(require_tasks, self._config.evaluation)
        # The manifest of every step names the run and the source of its step 0.
        self._run_id: str | None = None
        self._seed_identity: dict[str, Any] | None = None

    def seed(self, path: str) -> None:
        report = seed(self._target(), path, self._config.seed, self._probe(), self._folder)
        self._seed_identity = report.identity
        self._run_id = from_main_rank(uuid.uuid4().hex)
        self._trainer.metrics_processor.rewind(0)

    def _target(self) -> SeedTarget:
        state = self._trainer.checkpointer.states[MODEL].whole()
        return seed_target(self._model, state, self._trainer.model_args.load())

    def read_rest(self, manifest: dict[str, Any], path: str) -> None:
        if self._model.whole.adapters is not None:
            read_again(self._target(), path, self._config.seed, manifest.get("seed") or {})

    def resumed(self, manifest: dict[str, Any], step: Path) -> Callable[[], None]:
        allowed = self._config.checkpoint.allow_config_change
        changes = check_unchanged(manifest.get("config", {}), self._record, allowed, str(step))
        if added := [name for name in self._head_arguments or {} if name not in (manifest.get("heads") or {})]:
            raise ConfigError(
                f"{step} was saved without {', '.join(added)}, whose parameters and moments it lacks; switch the heads off, or begin a "
                "run with them: another job.dump_folder, and the step or its export as checkpoint.initial_load_path"
            )
        names = manifest.get("config", {}).get("optimizer.name"), self._config.optimizer.name
        if names[0] != names[1] and "Muon" in names and not manifest.get("model_only"):
            raise ConfigError(
                f"{step} has the state of optimizer.name = {names[0]!r}, which {names[1]!r} cannot continue; take it back, or begin a run: "
                "another job.dump_folder, and the step or its export as checkpoint.initial_load_path"
            )
        if problem := self._problem_of_adapters(manifest.get("config", {}), step):
            raise ConfigError(
                f"{step} {problem}, or begin a run: another job.dump_folder, and the step's export as checkpoint.initial_load_path"
            )
        if thawed := self._thawed(manifest.get("config", {}).get("training.freeze", [])):
            raise ConfigError(
                f"{step} has no moments of {some(thawed)} ({len(thawed)}), which training.freeze kept in its run; keep them frozen, or "
                "begin a run: another job.dump_folder, and the step or its export as checkpoint.initial_load_path"
            )
        if not manifest.get("model_only"):
            self._trainer.dataloader.require_layout(manifest.get("data"))
        for change in changes:
            logger.warning(f"Changed since {step.name}, as checkpoint.allow_config_change permits: {change}")
        self._seed_identity, self._run_id = manifest.get("seed"), manifest.get("run")
        path, seed = self._config.checkpoint.initial_load_path, self._config.seed
        # Beside adapters the source is read again, and has to be the same.
        compared = is_main_rank() and self._model.whole.adapters is None
        if compared and (other := changed_source(self._seed_identity, path, seed.allow_pickle, seed.follow_links)):
            logger.warning(other)
        if not changes:
            return lambda: None
        return configured_again(self._trainer.optimizers, self._trainer.lr_schedulers)

    def _problem_of_adapters(self, then: dict[str, Any], step: Path) -> str | None:
        """Returns what keeps the adapters of a step from being those of the model, or the weights beside them; None if nothing does.

        Collective.
        """
        adapters = self._model.whole.adapters
        if adapters is None and LORA not in then.get("model.converters", []):
            return None
        needed = set() if adapters is None else {*adapters.keys}
        held = from_main_rank(on_main_rank(_adapters_in, step)) or set()
        remedy = "set model.converters and lora.target_modules as they were"
        if lost := held - needed:
            return f"holds adapters that the model lacks, {some(lost)} ({len(lost)}); {remedy}"
        if absent := needed - held:
            return f"has no adapters {some(absent)} ({len(absent)}); {remedy}"
        name, now = "training.dtype", self._config.training.dtype
        if then.get(name, now) != now:
            return f"was saved with {name} {then[name]}, now {now}: the weights beside its adapters would be others; take it back"
        return None

    def _thawed(self, patterns: list[str]) -> list[str]:
        """Returns the parameters that match patterns of ``training.freeze``, by any of their names, and are trained now."""
        if not patterns:
            return []
        model = self._model.whole
        names = {key: key for key in self._target().whole} | model.tied_keys
        matched = dict.fromkeys(key for name, key in names.items() if matches(name, patterns))
        return [key for key in matched if key not in model.frozen]

    def admit(self, step: int) -> bool:
        parameters = (p.detach() for part in self._runner.parts for p in part.parameters())
        local = (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
        weights = [p for p in local if p.numel()]
        finite = torch.tensor(math.isfinite(self._trainer.gradients.norm), dtype=torch.uint8, device=self._device)
        largest = torch.nn.utils.get_total_norm(weights, math.inf, foreach=True)
        for value in (*self._trainer.reported.parts.values(), largest):
            finite *= torch.isfinite(value).all().to(self._device)
        if dist.get_world_size() > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite)

    def facts(self) -> dict[str, Any]:
        dims, trainer = self._trainer.parallel_dims, self._trainer
        degrees = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep")
        packages: Any = (flame_ext, torch, torchtitan, transformers)
        return {
            "parallelism": {name: getattr(dims, name) for name in degrees},
            "versions": {package.__name__: package.__version__ for package in packages},
            "seed": self._seed_identity,
            "heads": self._head_arguments,
            "run": self._run_id,
            "vocab_size": self._trainer.model_args.vocab_size,  # config.json in the model's folder may have another
            "data": trainer.dataloader.layout,
            "config": self._record,
            "config_sha256": config_digest(self._record),
            "finished": trainer.finishing or trainer.step >= self._config.training.steps,
        }

    def stopped(self) -> bool:
        return self._trainer.signals.received is not None

    def is_exported(self, step: int) -> bool:
        def unreadable() -> str | None:
            export = self._folder / "hf" / f"step-{step}"
            try:
                open_source(export)
            except SeedError as e:
                return str(e)
            return why_not_exported(self._step_folder(step), export)

        if reason := from_main_rank(on_main_rank(unreadable)):
            logger.warning(f"Exporting step {step} again: {reason}")
        return reason is None

    def export(self, step: int) -> None:
        spec = ExportSpec(
            config=self._trainer.model_args.load(),
            architecture=self._model.whole.architecture,
            assets=self._assets,
            folder=Path(self._config.model.hf_assets_path),
            dtype=TORCH_DTYPE_MAP[self._config.checkpoint.export_dtype],
            heads=self._head_arguments,
            max_shard_size=self._config.export.max_shard_size,
            reverse=self._config.data.reverse,
            card=on_main_rank(card_of_step, self._step_folder(step), self._folder),
            origin=on_main_rank(origin_of, self._step_folder(step)),
            adapter=self._adapter_config(),
        )
        target, whole = self._target(), self._model.whole
        stored = self._stored(target.whole, dtypes_in(whole, spec.dtype, _dtypes(target.whole)))
        shapes = {key: t.shape for key, t in target.whole.items()}
        gather = BoxGatherer(target.state, shapes, self._device, adapter_summands(self._model, target.state))
        folder = self._folder / "hf" / f"step-{step}"
        export_hf(stored, list(whole.heads), folder, spec, gather)
        on_main_rank(self.followers.start, folder, True)

    def _follow(self, export: Path) -> None:
        """Has an export that was made in the background followed: the last step's, too, where ranks export none."""
        last = self._trainer.step if self._trainer.finishing else self._config.training.steps
        self.followers.start(export, export.name == f"step-{last}")

    def follow_exports(self, last: int, complete: bool, given_up: Collection[str]) -> None:
        def follow() -> None:
            for export in exports_of(self._folder / "hf", self._step_folder(last).parent, self._run_id, last):
                if export.name not in given_up:
                    self.followers.start(export, complete and export.name == f"step-{last}")

        on_main_rank(follow)

    def _adapter_config(self) -> dict[str, Any] | None:
        """Returns the content of peft's file beside the adapters, which names their source; None without adapters."""
        if (adapters := self._model.whole.adapters) is None:
            return None
        identity = self._seed_identity or {}
        path, revision = str(identity.get("source")), ""
        if path.startswith(HUB_PREFIX):
            path, _, revision = path.removeprefix(HUB_PREFIX).partition("@")
        return {
            **adapters.config,
            "base_model_name_or_path": path,
            "revision": identity.get("revision") or revision or None,
        }

    def _stored(self, state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, TracedTensor]:
        """Returns the whole model's tensors as files hold them, in other dtypes, made of those of its state."""
        model = self._model.whole
        traced = {key: TracedTensor.whole(tensor.shape, dtypes[key], key) for key, tensor in state.items()}
        adapters = [key for key in traced if model.adapters is not None and is_adapter(key)]
        in_peft = {name_in_peft(key): traced.pop(key) for key in adapters}
        return in_files(model, traced) | in_peft

    def _step_folder(self, step: int) -> Path:
        return Path(self._trainer.checkpointer.folder) / f"step-{step}"

    @cached_property
    def _head_arguments(self) -> dict[str, dict[str, Any]] | None:
        return head_arguments(self._config, self._model.whole) or None

    @cached_property
    def _record(self) -> dict[str, Any]:
        config, dims = self._config, self._trainer.parallel_dims
        degree = dims.dp_replicate * dims.dp_shard
        assets = asset_digests(Path(config.model.hf_assets_path), code=config.seed.trust_remote_code)
        heads = record_of_heads(config, config.training.local_batch_size * degree)
        if self._trainer.teacher is not None:
            heads |= self._trainer.teacher.record
        return config_record(config, data_parallel_degree=degree, assets=assets, heads=heads)

    def _probe(self) -> Probe:
        training, dims = self._config.training, self._trainer.parallel_dims
        param_dtype, dtype = TORCH_DTYPE_MAP[training.mixed_precision_param], TORCH_DTYPE_MAP[training.dtype]
        compute_dtype = torch.bfloat16 if torch.bfloat16 in (param_dtype, dtype) else torch.float32
        return Probe(
            tokens=probe_tokens(self._trainer.tokenizer.encode, training.seq_len, dims.seq_len_divisor),
            forward=self._logits,
            autocast=self._trainer.autocast,
            # FSDP gives the layers parameters in the mixed-precision dtype; autocast leaves parameters as they are.
            dtype=param_dtype if dims.fsdp_enabled else dtype,
            compute_dtype=compute_dtype,
            device=self._device,
            vocab_size=self._model.config.get_text_config().vocab_size,
            seq_len=training.seq_len,
            logits_in_parts=self._logits_in_parts if self._model.context.is_split else None,
            summaries=None if self._summaries is None else partial(self._anticausal_states, KeptRoutes()),
            summaries_remedy=self._summaries_remedy,
            rounds_alike=not self._model.whole.routing.problem,
        )

    def _logits(self, tokens: Tensor) -> Tensor:
        """Maps (1, T) tokens to (1, T, V) logits on every rank. Collective."""
        found = self._evaluated(tokens.to(self._device), lambda _rows: {"compute": whole_logits})
        return self._runner.from_last(None if found is None else torch.cat(found))

    def _logits_in_parts(self, tokens: Tensor) -> Tensor:
        """Does the same by context parallelism. Collective."""
        context, tokens = self._model.context, tokens.to(self._device)
        inputs = {**self._attention_of({"input": tokens}, slice(None)), "compute": whole_logits}
        found = self._evaluated(context.shard(tokens), lambda _rows: inputs)
        return self._runner.from_last(None if found is None else context.unshard(found[0]))

    def _evaluated(self, tokens: Tensor, inputs_of: StageInputs) -> list[Any] | None:
        for part in self._runner.parts:
            part.eval()
        try:
            with self._trainer.autocast(), in_high_precision(self._runner.parts, self._config):
                return self._runner.forward(tokens, inputs_of)
        finally:
            for part in self._runner.parts:
                part.train()

    def _anticausal_states(self, routes: KeptRoutes, tokens: Tensor) -> Tensor:
        """Maps (1, T) tokens to (1, T, D) summaries on every rank, by the experts of the first call. Collective."""
        assert self._summaries is not None
        with in_high_precision(self._runner.parts, self._config):
            summaries = self._summaries(tokens, routes)
        return self._runner.from_last(summaries)


def _adapters_in(step: Path) -> set[str]:
    """Returns the names of the adapters' parameters that a step holds."""
    return {key for key in DcpReader(step).read_metadata().state_dict_metadata if is_adapter(key)}


def _dtypes(state: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    return {key: tensor.dtype for key, tensor in state.items()}


def whole_logits(logits: Tensor, *_: Any) -> Tensor:
    """Gathers logits that loss parallelism has sharded over the vocabulary. Collective if so."""
    return logits.full_tensor() if isinstance(logits, DTensor) else logits
