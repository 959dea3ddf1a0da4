#!/usr/bin/env bash
# Train with torchrun: ./train.sh [--section.key value ...]
#
#   CONFIG_FILE   the TOML (default: configs/debug.toml)
#   NGPU          processes on this node (default: the accelerators present, else 1)
#   NNODE         nodes (default: 1); then also MASTER_ADDR and MASTER_PORT of the first one, and NODE_RANK
#   LOG_RANK      local ranks whose output is shown, comma-separated (default: 0)
#   PYTHON        the interpreter (default: python)
#
# SIGTERM, SIGUSR1, SIGINT (Ctrl-C) and SIGHUP are handed on: the run saves and this script exits with 75, for a launcher to
# start it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

PYTHON=${PYTHON:-python}
CONFIG_FILE=${CONFIG_FILE:-configs/debug.toml}
NNODE=${NNODE:-1}
LOG_RANK=${LOG_RANK:-0}
if [[ -z "${NGPU:-}" ]]; then
    NGPU=$("$PYTHON" -c 'import torch; print(max(1, torch.accelerator.device_count()))')
fi

rendezvous=(--standalone)
if ((NNODE > 1)); then
    : "${MASTER_ADDR:?with NNODE > 1, set MASTER_ADDR to the address of the first node}"
    rendezvous=(
        --rdzv_backend c10d
        --rdzv_id "${RDZV_ID:-flame_ext}"
        --rdzv_endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}"
    )
    if [[ -n "${NODE_RANK:-}" ]]; then
        rendezvous+=(--node_rank "$NODE_RANK")
    fi
fi

export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# Tokenisation runs in the training process: its own threads would compete with it, and warn after a fork.
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# Seconds that workers have to save before torchrun kills them (older than torch 2.13 it always takes 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
# Where they leave an exit code, since torchrun makes 1 of every one.
FLAME_EXT_EXIT_FILE=$(mktemp)
export FLAME_EXT_EXIT_FILE

# In a process group of its own, so that Ctrl-C reaches it once, from here.
set -m
"$PYTHON" -m torch.distributed.run \
    --nnodes "$NNODE" --nproc_per_node "$NGPU" "${rendezvous[@]}" \
    --signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --local_ranks_filter "$LOG_RANK" --role rank --tee 3 \
    -m flame_ext.train --job.config_file "$CONFIG_FILE" "$@" &
torchrun=$!
set +m
# shellcheck disable=SC2329 # the traps call it
stop() { # once: torchrun would not wait for its workers after a second one
    trap '' TERM USR1 INT HUP
    kill -s "$1" "$torchrun" 2>/dev/null || true
}
for signal in TERM USR1 INT; do
    # shellcheck disable=SC2064
    trap "stop $signal" "$signal"
done
trap "stop TERM" HUP
while kill -0 "$torchrun" 2>/dev/null; do
    wait "$torchrun" || true # a trap ends it early
done
code=0
wait "$torchrun" || code=$?
if [[ -s "$FLAME_EXT_EXIT_FILE" ]]; then
    code=$(<"$FLAME_EXT_EXIT_FILE")
fi
rm -f "$FLAME_EXT_EXIT_FILE"
exit "$code"
