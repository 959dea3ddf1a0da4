"""``[action_layer]``: the head that predicts the future summary after each candidate for the next token, and its two losses."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from flame_ext.config.head_options import at_least
from flame_ext.config.sections import FlameJobConfig
from flame_ext.heads.future_encoder import interval_factor, weight_in_step
from flame_ext.heads.future_predictor import GatedMLP
from flame_ext.heads.spec import LOSS_WEIGHT, Head, HeadBatch, HeadSection, HeadSpec
from flame_ext.model.parameters import parameters_of
from flame_ext.objective.action import Reward, action_losses, candidate_mask
from flame_ext.objective.chunks import chunk_elements
from flame_ext.objective.contrastive import info_nce
from flame_ext.objective.cross_entropy import IGNORE_INDEX


@dataclass
class ActionLayerSection(HeadSection):
    """The head that predicts the future summary after each candidate for the next token, and rewards the candidates by it."""

    enable: bool = False
    """Whether there is an action layer. Needs `future_encoder.enable`."""

    head_type: Literal["mlp", "tower"] = "mlp"
    """
    'mlp': a GELU MLP on h_t and the candidate's embedding side by side. 'tower': a residual SwiGLU tower for each, that
    meet in a product.
    """

    use_rms_norm: bool | None = None
    """RMSNorm on the inputs, else LayerNorm; by default what the backbone has."""

    ffn_hidden_size: int | None = None
    """Width of the hidden layers; by default the backbone's `intermediate_size`."""

    top_k: int = 8
    """Candidates: the k likeliest next tokens, and the true one."""

    tau: float = 0.1
    """Temperature of the rewards: softmax(cosine / tau) over the candidates."""

    reward: Reward = "future"
    """
    What rewards a candidate: 'future', the cosine above; 'label', being the true token (a reward without a future); 'uniform',
    nothing. The last two are there to compare with.
    """

    gt_bias: float = 0.0
    """Added to the true token's cosine before the softmax of `reward = "future"`."""

    label_smoothing: float = 0.1
    """The share of `reward = "label"` that all candidates have alike."""

    entropy_weight: float = 0.0
    """Weight, times `loss_weight`, of the entropy of the candidates' probabilities, which the policy loss is lowered by."""

    loss_weight: float = 0.1
    """Weight of the policy loss, -sum_a r_a log p(a), in which the rewards are constants."""

    loss_weight_warmup_steps: int = 0
    """Steps over which `loss_weight` rises linearly from 0; rewards mean nothing before the head has learned."""

    loss_weight_decay_steps: int = 0
    """Steps at the end of the run over which `loss_weight` falls linearly to 0."""

    model_loss_weight: float = 0.1
    """Weight of the loss that trains the head: to predict F_t from the true token, against other candidates and positions."""


class ActionLayer(Head):
    """From the (D,) hidden state h_t and a candidate's embedding to the summary of the future in which the candidate comes next.

    "mlp" is a GELU MLP on both side by side. "tower" has two residual SwiGLU towers that meet in a product, and the state's
    runs once for all candidates. Both inputs go through RMSNorm or LayerNorm first.
    """

    def __init__(
        self, hidden_size: int, head_type: Literal["mlp", "tower"], use_rms_norm: bool, ffn_hidden_size: int
    ) -> None:
        super().__init__()
        if head_type not in ("mlp", "tower"):
            raise ValueError(f"head_type must be one of 'mlp', 'tower', got {head_type!r}")
        norm = nn.RMSNorm if use_rms_norm else nn.LayerNorm
        self.state_norm, self.action_norm = norm(hidden_size), norm(hidden_size)
        self.ffn_hidden_size = ffn_hidden_size
        if head_type == "mlp":
            # One linear map on both inputs side by side, in two halves, so that the state's is computed once.
            self.state_proj: nn.Module = nn.Linear(hidden_size, ffn_hidden_size)
            self.action_proj: nn.Module = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
            self.out_proj = nn.Linear(ffn_hidden_size, hidden_size)
        else:
            self.state_proj = _Tower(hidden_size, ffn_hidden_size)
            self.action_proj = _Tower(hidden_size, ffn_hidden_size)
            self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.head_type = head_type

    def forward(
        self, hidden_states: Tensor, token_ids: Tensor, summaries: Tensor, embed: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Score candidates in chunks; the backward looks up and computes each chunk again, so no (N, C, D) is ever in memory.

        Takes (N, D) hidden states, (N, C) candidates, the true next token first, (N, D) summaries of unit length, and what maps
        tokens to their embeddings, which get no gradient. Returns (N, C) float32 cosines of predictions and summaries, and the
        (N, D) predictions for the true token.
        """

        def score(hidden_states: Tensor, token_ids: Tensor, summaries: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():  # the head learns what a token leads to; the embeddings stay the language model's
                embeddings = embed(token_ids)
            predictions = self.predict(hidden_states, embeddings)
            with torch.autocast(predictions.device.type, enabled=False):
                scores = (predictions * summaries.float().unsqueeze(-2)).sum(dim=-1)
            return scores, predictions[..., 0, :]

        width = token_ids.shape[1] * max(self.ffn_hidden_size, hidden_states.shape[1])
        rows = max(1, chunk_elements(hidden_states.device) // width)
        chunks = zip(hidden_states.split(rows), token_ids.split(rows), summaries.split(rows), strict=True)
        parts = [
            checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else score(*chunk)
            for chunk in chunks
        ]
        scores, predictions = zip(*parts, strict=True)
        return torch.cat(scores), torch.cat(predictions)

    def predict(self, hidden_states: Tensor, embeddings: Tensor) -> Tensor:
        """(…, D) states and (…, C, D) embeddings of candidates to (…, C, D) float32 predictions of unit length."""
        state = self.state_proj(self.state_norm(hidden_states)).unsqueeze(-2)
        action = self.action_proj(self.action_norm(embeddings))
        joint = F.gelu(state + action) if self.head_type == "mlp" else F.silu(state) * action
        return F.normalize(self.out_proj(joint).float(), dim=-1)


class _Tower(GatedMLP):
    """x + SwiGLU(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def action_loss(head: ActionLayer, batch: HeadBatch) -> dict[str, Tensor]:
    """The policy loss, and the loss that trains the head: the true token's prediction against other candidates and positions.

    Each value is a sum over this micro-batch's positions, over their number in the step.
    """
    future, options = batch.future, batch.config.action_layer
    assert future is not None and batch.embed is not None
    log_probs, token_ids = (values[:, : 1 + options.top_k] for values in future.log_probs)
    states, keys = future.hidden_states.flatten(0, 1), future.bank.keys.detach()
    own = slice(future.first_key, future.first_key + len(states))
    valid = future.bank.valid_mask[own] & (future.labels.flatten() != IGNORE_INDEX)
    scores, predictions = head(states, token_ids, keys[own], batch.embed)
    out = action_losses(
        *(scores, log_probs, candidate_mask(token_ids), valid, options.tau),
        *(options.gt_bias, options.reward, options.label_smoothing),
    )
    policy = out.policy_loss_sum
    if options.entropy_weight:
        policy = policy - options.entropy_weight * out.entropy_sum
    among_positions = info_nce(
        predictions,
        keys,
        valid,
        future.bank.valid_mask,
        torch.arange(own.start, own.stop, device=states.device),
        batch.config.future_encoder.temperature,
        batch.compile_backend,
    )
    sums = {
        "loss_action": policy,
        "loss_action_model": out.choice_loss_sum + among_positions.loss_sum,
        "action_reward": out.reward_sum,
        "action_entropy": out.entropy_sum.detach(),
        "action_rank": out.rank_sum,
        "action_cosine": out.cosine_sum,
    }
    return {name: value / future.positions_in_step for name, value in sums.items()}


def _arguments(section: ActionLayerSection, backbone: Any) -> dict[str, Any]:
    text = backbone.config.get_text_config()
    use_rms_norm = section.use_rms_norm
    if use_rms_norm is None:
        use_rms_norm = any("RMSNorm" in type(module).__name__ for module in backbone.modules())
    return {
        "hidden_size": text.hidden_size,
        "head_type": section.head_type,
        "use_rms_norm": use_rms_norm,
        "ffn_hidden_size": section.ffn_hidden_size or _ffn_hidden_size(text),
    }


def _ffn_hidden_size(text: PreTrainedConfig) -> int:
    """The backbone's, under the names that configurations have for it."""
    names = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    found: int | None = next((value for name in names if (value := getattr(text, name, None))), None)
    return found or 4 * text.hidden_size


def _multiplications(head: ActionLayer, _backbone: Any, config: FlameJobConfig) -> int:
    """Those of the state, and those of each candidate."""
    of_state = sum(map(parameters_of, (head.state_norm, head.state_proj)))
    return of_state + (1 + config.action_layer.top_k) * (parameters_of(head) - of_state)


def _weights(config: FlameJobConfig, step: int | None) -> dict[str, float]:
    section = config.action_layer
    return {
        "loss_action": weight_in_step(config, section, step),
        "loss_action_model": section.model_loss_weight * interval_factor(config, step),
    }


def _check(config: FlameJobConfig) -> Iterator[str]:
    action = config.action_layer
    if action.tau <= 0:
        yield f"action_layer.tau must be > 0 (cosines are divided by it), got {action.tau}"
    if action.ffn_hidden_size is not None and action.ffn_hidden_size < 1:
        yield f"action_layer.ffn_hidden_size must be >= 1, got {action.ffn_hidden_size}; leave it out for the backbone's"
    if action.enable and action.loss_weight > 0 and action.model_loss_weight == 0 and not action.freeze:
        yield (
            "action_layer.model_loss_weight is 0 while loss_weight is not: nothing would train the head that gives the "
            "rewards; set it above 0, loss_weight to 0, or freeze the head"
        )
    if not 0 <= action.label_smoothing <= 1:
        yield f"action_layer.label_smoothing must be in 0..1 (a share of the reward), got {action.label_smoothing}"
    if action.gt_bias and action.reward != "future":
        yield f"action_layer.gt_bias is added to cosines, and reward is {action.reward!r}: leave it out, or take reward = 'future'"
    least = {"top_k": (1, "the likeliest tokens beside the true one"), "model_loss_weight": (0, "0 = not computed")}
    least |= {"entropy_weight": (0, "0 = none"), "gt_bias": (0, "0 = none")}
    yield from at_least("action_layer", action, LOSS_WEIGHT | least)


def _check_model(config: FlameJobConfig, hf_config: PreTrainedConfig) -> Iterator[str]:
    top_k, vocab_size = config.action_layer.top_k, hf_config.get_text_config().vocab_size
    if top_k > vocab_size:
        yield (
            f"action_layer.top_k ({top_k}) is above the model's vocabulary ({vocab_size}); a few "
            "candidates are enough, their cost grows with their number"
        )


HEAD = HeadSpec(
    section=ActionLayerSection,
    build=ActionLayer,
    arguments=_arguments,
    loss=action_loss,
    multiplications=_multiplications,
    weights=_weights,
    needs_future=True,
    candidates=lambda section: section.top_k,
    uses_embedding=True,
    takes_parts=True,
    uses_logits=False,
    check=_check,
    check_model=_check_model,
    shown=("action_reward",),
    card_metrics=("loss_action",),
    card_options=("loss_weight",),
)
