#!/usr/bin/env bash
# What only a GPU can show, most important first: half an hour on one H100 or H200.
#
#   bash benchmarks/on_gpu.sh OUT [NAME ...]      # NAME: of the steps below; all of them without
#
# Each step writes OUT/NAME.log and has its own time limit; one that fails leaves the others their
# turn, and the call ends with 1. Needs jax with CUDA, flax, optax, rich, pytest 9, hypothesis, fsspec
# and, for train_step and checkpoint, ml_collections; for the latter orbax-checkpoint and 22 GB of
# disk in TMPDIR; torch and transformers for the peer, tokamax for its kernels. PYTHON names the
# interpreter.
set -uo pipefail

mkdir -p "${1:?OUT: a folder for the logs is missing}"
out=$(cd "$1" && pwd)
shift
wanted=("$@")
cd "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 COLUMNS=160
# As training starts (launch/settings.sh), but that memory is taken as it is needed: the peer's turn
# comes in another process. The tests' shortened compilation would be another program.
export JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=0.94
export JAX_DISABLE_MOST_OPTIMIZATIONS=0
config=configs/stablelm_2_1_6b_h200.py
failed=()

step() { # name, minutes, command ...
    local name=$1 minutes=$2 started=$SECONDS
    shift 2
    [[ ${#wanted[@]} -eq 0 || " ${wanted[*]} " == *" $name "* ]] || return 0
    if timeout "${minutes}m" "$@" >"$out/$name.log" 2>&1; then
        echo "$name: $((SECONDS - started)) s"
    else
        echo "$name: failed with $? after $((SECONDS - started)) s: see $out/$name.log"
        failed+=("$name")
    fi
}

step numerics 6 "$python" -m pytest -q -s -p no:cacheprovider -m by_hand tests/kernels/test_on_chip.py
step attention 5 "$python" benchmarks/attention.py
# fewer rows for a GPU of 80 GB: 8 of them need 66 GB, with all layers unrolled and no remat 79
step train_step 9 "$python" benchmarks/train_step.py --config "$config" --rows "${ROWS:-8}" \
    --also training.unroll=24 --also training.unroll=24,training.remat=none \
    --also training.remat=attention --also training.cross_entropy=saved \
    --also training.attention=chunked
step documents 2 "$python" benchmarks/train_step.py --config "$config" --rows "${ROWS:-8}" \
    --mean-document 1000 --peer none
# what the same bits in every run cost
step deterministic 4 "$python" benchmarks/train_step.py --config "$config" --rows "${ROWS:-8}" \
    --peer none --also training.deterministic=True
# 19.7 GB saved four times and read back four times: minutes by the disk, not by the GPU
step checkpoint 6 "$python" benchmarks/checkpoint.py --config "$config" --repeats 1
step generate 8 "$python" benchmarks/generate.py --batch 1 8 64
step cross_entropy 3 "$python" benchmarks/cross_entropy.py
step tune 4 "$python" benchmarks/attention.py --tune --documents 512
step tune_whole_rows 4 "$python" benchmarks/attention.py --tune --documents whole

if [[ ${#failed[@]} -gt 0 ]]; then
    echo "error: failed: ${failed[*]}" >&2
    exit 1
fi
