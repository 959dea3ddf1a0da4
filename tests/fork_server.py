"""Prepares the fork server that ranks are forked from (tests/ranks.py): it imports what they need and fills the caches of tyro and
transformers, by parsing one configuration and building one model. The model is on the meta device, so that no thread starts.
"""

import gc

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

import tests.ranks
from flame_ext.train import parse

parse([f"--job.config_file={tests.ranks.DEBUG_TOML}", f"--model.hf_assets_path={tests.ranks.TINY_OLMO}"])
with torch.device("meta"):
    get_model_conversion_mapping(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tests.ranks.TINY_OLMO)))
gc.collect()
gc.freeze()  # no collection in a rank has to look at what was made here
