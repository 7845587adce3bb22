#!/usr/bin/env bash
# What only a GPU can show, most important first: on one H100 or H200 it is known after 10 minutes
# whether the kernels are right, after 22 what they cost, after 30 which tiles are the best.
#
#   bash benchmarks/on_gpu.sh OUT [NAME ...]      # NAME: of the steps below; all of them without
#   bash benchmarks/on_gpu.sh --smoke OUT         # the same commands in small, on a CPU
#
# Each step prints as it goes, writes OUT/NAME.log and has its own time limit, 9 minutes at most;
# one that fails leaves the others their turn, and the call ends with 1. Needs jax with CUDA, flax,
# optax, rich, pytest 9, hypothesis, fsspec and, for the training step and checkpoint, ml_collections;
# for the latter orbax-checkpoint and 22 GB of disk in TMPDIR; torch and transformers for the peer,
# tokamax for its kernels, compute-sanitizer for `memory`. PYTHON names the interpreter.
set -uo pipefail

smoke=''
[[ ${1:-} == --smoke ]] && smoke=yes && shift
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
if [[ -n $smoke ]]; then
    export JAX_PLATFORMS=cpu
    small=(--smoke) # wins over the sizes before it
    ftz=''
    config=configs/smoke.py
    step_of=(--config "$config" --steps 1)
    head_of=(--rows 64 --width 32 --vocab 128 --calls 1)
    model_of=(--model 150m --batch 1 --context 8 --new 2 --repeats 1 --peer none)
else
    config=configs/stablelm_2_1_6b_h200.py
    ftz=--xla_gpu_ftz=true small=() head_of=() model_of=(--batch 1 8 64)
    # fewer rows for a GPU of 80 GB: 8 of them need 66 GB, with all layers unrolled and no remat 79
    step_of=(--config "$config" --rows "${ROWS:-8}")
fi
failed=() tried=''

step() { # name, minutes, command ...
    local name=$1 minutes=${smoke:+60} started=$SECONDS status
    minutes=${minutes:-$2}
    shift 2
    [[ ${#wanted[@]} -eq 0 || " ${wanted[*]} " == *" $name "* ]] || return 0
    tried=yes
    echo "== $name, at most $minutes minutes: $*"
    timeout --kill-after=30s "${minutes}m" "$@" 2>&1 | tee "$out/$name.log"
    status=$?
    if [[ $status -eq 0 ]]; then
        echo "== $name: $((SECONDS - started)) s"
    else
        echo "== $name: failed with $status after $((SECONDS - started)) s: see $out/$name.log"
        failed+=("$name")
    fi
}

on_chip=("$python" -m pytest -q -s -p no:cacheprovider -m by_hand tests/kernels/test_on_chip.py)
attention=("$python" benchmarks/attention.py)
train_step=("$python" benchmarks/train_step.py "${step_of[@]}")
alone=(--peer none)

# Are the kernels right?
step numerics 7 "${on_chip[@]}" -k 'not fifty and not float32 and not mosaic'
step bits 3 "${on_chip[@]}" -k '(fifty or float32) and not mosaic'

# What do they cost, alone and in a step, and what else does a step spend its time on?
step attention 3 "${attention[@]}" "${small[@]}"
step train_step 4 "${train_step[@]}" "${alone[@]}" --profile "$out/trace" \
    --also training.unroll=24,training.remat=none
step attention_160 2 "${attention[@]}" --kv-heads 8 --head-size 160 --documents whole 512 "${small[@]}"
step generate 3 "$python" benchmarks/generate.py "${model_of[@]}" --peer none

# Which tiles are the best?
step tune 4 "${attention[@]}" --tune --documents 512 "${small[@]}"
step tune_whole_rows 4 "${attention[@]}" --tune --documents whole "${small[@]}"
step attention_128 2 "${attention[@]}" --heads 16 --kv-heads 16 --head-size 128 --documents whole 512 "${small[@]}"
# the second kernel for Hopper, which might hang: apart from the others
step mosaic 3 "${on_chip[@]}" -x -k 'mosaic or NOTSET' # so are tests called that have no kernel on a CPU
[[ -n $smoke ]] || step attention_mosaic 2 "${attention[@]}" --implementations pallas_mosaic pallas_gpu
step attention_80 2 "${attention[@]}" --head-size 80 --documents whole 512 "${small[@]}"

# The other choices of a config, and the peer.
step choices 9 "${train_step[@]}" --also training.unroll=24 --also training.remat=attention \
    --also training.cross_entropy=saved --also training.attention=chunked
# the layers' norms as kernels of their own; a rehearsal has no GPU for them
[[ -n $smoke ]] || step norms 5 "${train_step[@]}" "${alone[@]}" --also training.norms=pallas_gpu \
    --also training.norms=pallas_gpu,training.unroll=24,training.remat=none
step documents 2 "${train_step[@]}" "${alone[@]}" --mean-document 1000
# what the same bits in every run cost
step deterministic 4 "${train_step[@]}" "${alone[@]}" --also training.deterministic=True
# numbers near zero taken as zero everywhere: what the rest of a step would gain by it
XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }$ftz step small_numbers_as_zero 3 "${train_step[@]}" "${alone[@]}"
step generate_beside_peer 8 "$python" benchmarks/generate.py "${model_of[@]}"
step cross_entropy 3 "$python" benchmarks/cross_entropy.py "${head_of[@]}"
# 19.7 GB saved five times and read back four times: minutes by the disk, not by the GPU
step checkpoint 8 "$python" benchmarks/checkpoint.py --config "$config" --repeats 1 "${small[@]}"
# reads and writes outside of arrays; everything is many times slower
if command -v compute-sanitizer >/dev/null; then
    step memory 9 compute-sanitizer --tool memcheck --error-exitcode 1 "${on_chip[@]}" -k 'bfloat16 and 1000 and not mosaic'
else
    echo "== memory: left out, there is no compute-sanitizer"
fi

if [[ -z $tried ]]; then
    echo "error: no step is called ${wanted[*]}" >&2
    exit 1
fi
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "error: failed: ${failed[*]}" >&2
    exit 1
fi
