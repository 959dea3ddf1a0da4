"""Jobs whose steps are timed one by one: ours and torchtitan's, of any shape, each in a process of its own."""

from __future__ import annotations

import itertools
import json
import multiprocessing as mp
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, Literal

from flame_ext.host.device import prepare_host
from tests.benchmarks.common import DEBUG_TOML, REPOSITORY, TINY_OLMO, cpu_seconds, peak_gib, rank_environment

WARM_UP = 5  # steps that are not counted

PLAIN = ["--model.converters=", "--future_encoder.no-enable", "--future_predictor.no-enable"]


@dataclass(frozen=True)
class Shape:
    """A Llama of plain attention, and a batch."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    batch: int
    seq_len: int

    peer: ClassVar[str] = "llama3"  # torchtitan's model of this kind

    def config(self) -> Any:
        """Of the Hugging Face model, untied as torchtitan's is."""
        from transformers import LlamaConfig

        return LlamaConfig(**self._of_both(), intermediate_size=self.intermediate)

    def peer_args(self) -> Any:
        """Of torchtitan's model."""
        from torchtitan.models.llama3.model.args import TransformerModelArgs

        return TransformerModelArgs(
            dim=self.hidden,
            n_layers=self.layers,
            n_heads=self.heads,
            vocab_size=self.vocabulary,
            # Its width is rounded up, from a third of eight times the hidden size.
            multiple_of=8,
            ffn_dim_multiplier=(self.intermediate - 1) / (8 * self.hidden // 3),
        )

    def _of_both(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": max(512, self.seq_len),
            "tie_word_embeddings": False,
            **{"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1},
        }

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    def __str__(self) -> str:
        model = f"{self.layers} layers of {self.hidden} ({self.heads} heads, {self.intermediate}), {self.vocabulary:,} tokens"
        return f"{model}, {self.batch} x {self.seq_len} a step"


@dataclass(frozen=True)
class MixtureShape(Shape):
    """A Qwen3 mixture of experts, ``intermediate`` wide each, and a batch."""

    kv_heads: int
    head_dim: int
    experts: int
    chosen: int

    peer: ClassVar[str] = "qwen3"

    def config(self) -> Any:
        from transformers import Qwen3MoeConfig

        return Qwen3MoeConfig(
            **self._of_both(),
            **{
                "num_key_value_heads": self.kv_heads,
                "head_dim": self.head_dim,
                "rope_theta": 1e6,
                "rms_norm_eps": 1e-6,
            },
            **{"moe_intermediate_size": self.intermediate, "num_experts": self.experts},
            **{"num_experts_per_tok": self.chosen, "norm_topk_prob": True},
        )

    def peer_args(self) -> Any:
        """Of torchtitan's debug model, without biases of its routers and in the dtype of its weights, which ``grouped_mm`` is not."""
        from torchtitan.models.qwen3 import qwen3_args

        like = qwen3_args["debugmodel_moe"]
        moe = replace(
            like.moe_args,
            **{"num_experts": self.experts, "top_k": self.chosen, "use_grouped_mm": False, "load_balance_coeff": None},
        )
        return replace(
            like,
            **{"dim": self.hidden, "n_layers": self.layers, "n_heads": self.heads, "n_kv_heads": self.kv_heads},
            **{"head_dim": self.head_dim, "vocab_size": self.vocabulary, "moe_inter_dim": self.intermediate},
            moe_args=moe,
        )

    def __str__(self) -> str:
        model = (
            f"{self.layers} layers of {self.hidden} ({self.heads} heads of {self.head_dim}, {self.kv_heads} for keys), "
        )
        model += (
            f"{self.experts} experts of {self.intermediate}, {self.chosen} for each token, {self.vocabulary:,} tokens"
        )
        return f"{model}, {self.batch} x {self.seq_len} a micro-batch"


@dataclass(frozen=True)
class Job:
    """What one process trains."""

    kind: Literal["ours", "host"]
    options: tuple[str, ...] = ()


def save_backbone(folder: Path, shape: Shape) -> Path:
    """A random Hugging Face model of that shape, with the tiny OLMo's tokenizer."""
    from tests.benchmarks.seeding import make_checkpoint

    make_checkpoint(folder, shape.config())
    return folder


def give_host_the_shape(shape: Shape, text: str) -> None:
    """torchtitan's model in a flavor ``bench``, and ``text``, a folder of JSON lines, in the place of its test data."""
    from torchtitan.hf_datasets.text_datasets import DATASETS
    from torchtitan.protocols.train_spec import get_train_spec

    if isinstance(shape, MixtureShape):
        count_integers_on_cpu()
    get_train_spec(shape.peer).model_args["bench"] = shape.peer_args()  # type: ignore[index]
    DATASETS["c4_test"].path = text


def count_integers_on_cpu() -> None:
    """Let torchtitan's routers count tokens on a CPU: by ``bincount``, since torch has no histogram of integers there."""
    import torch

    histogram = torch.histc

    def histc(values: torch.Tensor, bins: int, **limits: int) -> torch.Tensor:
        if values.is_floating_point() or values.device.type != "cpu":
            return histogram(values, bins=bins, **limits)
        return torch.bincount(values, minlength=bins)

    torch.histc = histc  # type: ignore[assignment]


def host_options(shape: Shape, folder: str) -> list[str]:
    """The debug job's options, as far as torchtitan has them."""
    return [
        *(f"--model.name={shape.peer}", "--model.flavor=bench", f"--model.hf_assets_path={TINY_OLMO}"),
        *(f"--training.local_batch_size={shape.batch}", f"--training.seq_len={shape.seq_len}"),
        *("--training.dataset=c4_test", "--training.steps=60", "--training.mixed_precision_param=float32"),
        *("--optimizer.lr=1e-3", "--optimizer.implementation=foreach", "--activation_checkpoint.mode=none"),
        *("--lr_scheduler.warmup_steps=5", "--metrics.log_freq=1", "--metrics.disable_color_printing"),
        *("--debug.seed=0", f"--job.dump_folder={folder}"),
    ]


def our_options(backbone: str | None, shape: Shape | None, folder: str) -> list[str]:
    """The debug job, on its own model and batch or another's."""
    options = [f"--job.config_file={DEBUG_TOML}", f"--job.dump_folder={folder}"]
    if backbone is not None:
        options += [f"--model.hf_assets_path={backbone}", f"--checkpoint.initial_load_path={backbone}"]
    if shape is not None:
        options += [f"--training.local_batch_size={shape.batch}", f"--training.seq_len={shape.seq_len}"]
    return options


def write_text(folder: Path) -> Path:
    """The debug job's text as a folder of JSON lines, as torchtitan's test data are."""
    from flame_ext.data.python_stdlib import read_stdlib

    folder.mkdir(parents=True)
    lines = (json.dumps({"text": text}) for text in read_stdlib("train"))
    (folder / "data.json").write_text("\n".join(lines) + "\n")
    return folder


def build(job: Job, shape: Shape | None, backbone: str | None, text: str | None, folder: str, *rank: int) -> Any:
    """A trainer at step 0, seeded or, torchtitan's, random. Once in a process, which is ``rank``: its number, of how many, port."""
    os.environ.update(rank_environment(*rank))
    os.chdir(REPOSITORY)
    prepare_host()
    if job.kind == "host":
        from torchtitan.config import ConfigManager
        from torchtitan.train import Trainer

        assert shape is not None and text is not None
        give_host_the_shape(shape, text)
        trainer = Trainer(ConfigManager().parse_args([*host_options(shape, folder), *job.options]))
    else:
        from flame_ext.train import parse
        from flame_ext.trainer import FutureTrainer

        options = [*our_options(backbone, shape, folder), "--seed.verify=none", "--metrics.no-enable-tensorboard"]
        trainer = FutureTrainer(parse([*options, *job.options]))
    trainer.checkpointer.load()
    return trainer


def synchronise() -> None:
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def worker(pipe: Connection, *arguments: Any) -> None:
    """A step for each message; answers with wall and CPU seconds, parts of the step, and the peak of memory."""
    import torch
    from torchtitan.tools.logging import logger

    logger.setLevel("ERROR")
    trainer = build(*arguments)
    batches = trainer.batch_generator(trainer.dataloader)
    stopwatch = trainer.stopwatch if getattr(trainer, "teacher", None) is not None else None
    while pipe.recv():
        trainer.step += 1
        wall, cpu = time.perf_counter(), cpu_seconds()
        trainer.train_step(batches)
        synchronise()
        parts = {} if stopwatch is None else stopwatch.seconds()
        found = {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu, "peak_gib": _peak_gib()}
        pipe.send({**found, "parts": parts, "flops_per_token": trainer.metrics_processor.num_flops_per_token})
    trainer.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # else ranks wait for each other at their ends


def _peak_gib() -> float:
    """Of the device, else of the process."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else peak_gib()


@contextmanager
def running(jobs: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, Connection]]:
    """A process for each, as :func:`worker` takes its arguments; they end with the block."""
    context = mp.get_context("spawn")
    pipes, processes = {}, []
    for name, arguments in jobs.items():
        pipes[name], end = context.Pipe()
        processes.append(context.Process(target=worker, args=(end, *arguments), daemon=True))
        processes[-1].start()
        end.close()  # so that a worker that has failed is noticed
    try:
        yield pipes
        for pipe in pipes.values():
            pipe.send(False)
    finally:
        for process in processes:
            process.join(20)
            process.kill()


def in_turns(jobs: dict[str, tuple[Any, ...]], steps: int, warm_up: int = WARM_UP) -> dict[str, list[dict[str, Any]]]:
    """Each job's steps, one by one and in turns, so that a slow minute falls on all of them."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    with running(jobs) as pipes:
        for step in range(warm_up + steps):
            for name, pipe in pipes.items():
                pipe.send(True)
                taken = pipe.recv()
                if step >= warm_up:
                    found[name].append(taken)
    return found


def one_by_one(
    jobs: dict[str, tuple[Any, ...]], steps: int, rounds: int, warm_up: int = WARM_UP
) -> dict[str, list[dict[str, Any]]]:
    """The same where there is not the memory for all at once: in each round a fresh process for each, one after the other."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for _, (name, arguments) in itertools.product(range(rounds), jobs.items()):
        # The folder is the last argument: a run does not resume the one before.
        again = (*arguments[:-1], f"{arguments[-1]}-{len(found[name])}")
        found[name] += in_turns({name: again}, steps, warm_up)[name]
    return found


def column(steps: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [step[name] for step in steps]


if __name__ == "__main__":
    sys.exit("this is a part of the benchmarks: python -m tests.benchmarks --only steps")
