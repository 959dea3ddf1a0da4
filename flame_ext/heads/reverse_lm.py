"""``future_encoder.summary_method = "reverse_lm"``: the future as a frozen language model sees it that reads from right to left."""

from torch import Tensor

from flame_ext.heads.spec import FutureSummaries, Head
from flame_ext.model.context_parallel import WHOLE, SequenceParts
from flame_ext.objective.masks import has_future


class ReverseEncoder(Head):
    """Future summaries by a frozen reverse language model (Mahajan et al. 2025, https://arxiv.org/abs/2510.14751).

    F_t is the model's last hidden state at x_{t+1}, after the final norm, when it has read the document from its end, or from the last
    label, to x_{t+1}: all tokens after t and none before, nor x_t. A prediction at t is compared with F_{t+shift}. With shift 1 that is
    the state at x_{t+2}, the paper's: x_{t+1} is what the cross-entropy predicts. With ``future_k`` > 0 each layer attends to that many
    tokens, its own included.

    The model is not here but in :mod:`flame_ext.step.reverse_model`: no checkpoint, optimizer or export knows it.
    """

    def __init__(self, future_k: int = 0) -> None:
        super().__init__()
        self.future_k = future_k

    def summaries(self, states: Tensor, doc_ids: Tensor, parts: SequenceParts = WHOLE) -> FutureSummaries:
        """(B, T, D) states at the tokens that follow, in the order in which the model has read, and (B, T) documents, to the (B, n, D)
        summaries.
        """
        return FutureSummaries(parts.shard(states.flip(1)), parts.shard(has_future(doc_ids)))
