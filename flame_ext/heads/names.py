"""The names of the built-in heads. It imports neither torch nor torchtitan: tools need the names alone."""

from flame_ext.config.head_options import HEAD_NAMES, is_head_key

__all__ = ["HEAD_NAMES", "is_head_key"]

HEAD_NAMES += ["future_encoder", "future_predictor", "action_layer", "mtp", "token_order", "future_bag", "next_latent"]
