"""Continue the pre-training of a Hugging Face language model in torchtitan, with heads that predict the future."""

from flame_ext.host.device import prepare_host

__version__ = "0.1.0"

# Before any module of torchtitan: it decides for a device while it is imported.
prepare_host()
