#!/usr/bin/env bash
# Draws debug_curves.png: the debug job from its trained model, and from a model of the same config.json with random weights,
# which is what a run is that loads nothing. Needs matplotlib (pip install -e '.[plot]'); takes two minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${PYTHON:-python}
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT

"$python" - "$runs/random" <<'PYTHON'
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM

torch.manual_seed(0)
config = AutoConfig.from_pretrained("tests/assets/tiny_olmo")
AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(sys.argv[1])
PYTHON

PYTHON=$python ./train.sh --job.dump_folder "$runs/seeded" --metrics.no-enable_tensorboard
PYTHON=$python ./train.sh --job.dump_folder "$runs/unseeded" --metrics.no-enable_tensorboard --checkpoint.initial_load_path "$runs/random"
"$python" -m flame_ext.tools.main plot "$runs/seeded" "$runs/unseeded" --labels "seeded" "random weights" \
    --output docs/pictures/debug_curves.png
