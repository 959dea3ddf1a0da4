"""The floating point operations of a run, those of the teacher and of the heads included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flame_ext.config.sections import FlameJobConfig


@dataclass(frozen=True)
class Operations:
    """Operations for each token that is trained on. Validation, generation, norms and the optimizer are not counted."""

    backbone: float  # forward and backward
    heads: float  # forward and backward of those that are trained
    teacher: float  # the second forward of the backbone, which has no backward
    comparisons: float  # of predictions with the summaries of the step
    reverse_training: float = 0.0  # forward and backward of the reverse model, which has been trained on as many tokens

    @property
    def total(self) -> float:
        return self.backbone + self.heads + self.teacher + self.comparisons + self.reverse_training


def tokens_of_a_step(config: FlameJobConfig) -> int:
    """On one process."""
    sequences = max(config.training.global_batch_size, config.training.local_batch_size)
    return sequences * config.training.seq_len


def operations_per_token(config: FlameJobConfig, trains_reverse: bool = False) -> Operations:
    """Counts the operations of a configuration that preflight has passed, on a model without storage.

    The model and the heads are counted as for torchtitan's MFU: 6 for each weight that multiplies a token, and the attention
    without causal sparsity. A frozen backbone is counted as if it had gradients. A teacher that is a forward, of the backbone
    or of a reverse model, costs that without the output embedding, on the share of sequences and steps that it runs on, and so
    do the heads that need it; a pooling teacher costs its own maps. The training of a reverse model is in it if ``trains_reverse``.
    Every InfoNCE takes 4 operations for each pair of vectors and element, 8 where keys have a gradient.
    """
    from flame_ext.heads.future_encoder import WITH_A_FORWARD
    from flame_ext.heads.registry import attach_heads, teacher_of, trained_heads
    from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
    from flame_ext.model.parameters import parameters_of
    from flame_ext.seeding.sources.hub import locate

    arguments = HFModelArgs()
    arguments.update_from_config(config)
    model, seq_len = build_hf_causal_lm(arguments), config.training.seq_len
    backbone = float(arguments.get_nparams_and_flops(model, seq_len)[1])
    attach_heads(model, config)
    trained, name = trained_heads(config), teacher_of(config)
    summaries: Any = None if name is None else getattr(config, name)
    runs = summaries is not None and summaries.summary_method in WITH_A_FORWARD
    share = summaries.teacher_fraction / summaries.teacher_interval if runs else 1.0
    heads = sum(
        6.0 * model.heads[n].multiplications * (share if spec.needs_future else 1.0) for n, spec in trained.items()
    )
    if summaries is None:
        return Operations(backbone, heads, 0.0, 0.0)
    text = model.config.get_text_config()
    with_gradient = not runs and not summaries.detach_targets
    reverse_training = 0.0
    if runs:
        of_teacher = backbone
        if summaries.summary_method == "reverse_lm":
            reverse = HFModelArgs(
                hf_assets_path=str(locate(summaries.reverse_model, config.seed.allow_pickle)[0]),
                option="future_encoder.reverse_model",
                trust_remote_code=config.seed.trust_remote_code,
            )
            of_teacher = float(reverse.get_nparams_and_flops(build_hf_causal_lm(reverse), seq_len)[1])
            reverse_training = of_teacher * trains_reverse
        teacher = (of_teacher / 3 - 2 * text.vocab_size * text.hidden_size) * share
    else:  # it pools, if by attention with maps of its own
        pooling = parameters_of(model.get_submodule(str(name)))
        teacher = (6 if with_gradient else 2) * float(pooling + 2 * seq_len * text.hidden_size * bool(pooling))
    whole_step = runs and summaries.negatives == "global"
    keys = tokens_of_a_step(config) if whole_step else config.training.local_batch_size * seq_len
    keys *= summaries.teacher_fraction if runs else 1
    contrastive = "future_predictor" in trained and config.future_predictor.loss == "info_nce"
    losses = contrastive + ("action_layer" in trained and config.action_layer.model_loss_weight > 0)
    comparisons = losses * (8 if with_gradient else 4) * keys * text.hidden_size * share
    return Operations(backbone, heads, teacher, comparisons, reverse_training)
