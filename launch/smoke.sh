#!/usr/bin/env bash
# From nothing to a small Stable LM 2 trained on real text, in minutes on two cores.
#
#   bash launch/smoke.sh [--workdir DIR] [-- --config.group.field=value ...]
#
# DIR (default: runs/smoke in the checkout) gets corpus/, data/ and run/; what follows `--` goes to
# `train`. Run it again after anything stopped it: what is done is not done twice. Exit codes: those
# of the step that failed; 75 when a signal stopped the training, with a whole checkpoint saved.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

workdir="$root/runs/smoke"
if [[ ${1:-} == --workdir ]]; then
    mkdir -p -- "${2:?--workdir needs a folder}"
    workdir=$(CDPATH='' cd -- "$2" && pwd)
    shift 2
fi
if (($# > 0)) && [[ $1 != -- ]]; then
    die "unknown argument '$1': usage: bash launch/smoke.sh [--workdir DIR] [-- --config.key=value ...]"
fi
(($# == 0)) || shift

newest_checkpoint() {
    local path step newest=-1
    for path in "$workdir"/run/checkpoints/global_step*; do
        step=${path##*/global_step}
        if [[ $step =~ ^[0-9]+$ ]] && ((step > newest)); then newest=$step; fi
    done
    printf '%s' "$workdir/run/checkpoints/global_step$newest"
}

cuda=$(cuda_extra)
if [[ -n $cuda ]]; then
    say "A working NVIDIA driver: JAX for the GPU (extra $cuda)"
    install --requirement requirements.txt --editable ".[$cuda]"
    export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
else
    install --requirement requirements.txt
    export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
fi
cd "$root"

say 'Collecting English that is on this machine already: the docstrings of Python and of packages'
"$python" launch/corpora/smoke_corpus.py --output "$workdir/corpus" --sources python_docs package_docs
tokenizer="$workdir/corpus/tokenizer.json"
say 'Training a small tokenizer on it'
"$python" -m stablelm_jax.train_tokenizer --output "$tokenizer" \
    --input "$workdir/corpus/python_docs.jsonl" "$workdir/corpus/package_docs.jsonl"
for source in python_docs package_docs; do
    say "Preparing $source: documents into tokens"
    # Whole files are held out: within one, docstrings repeat each other.
    "$python" -m stablelm_jax.prepare --source "$source" --held-out-by id --held-out 0.03 \
        --input "$workdir/corpus/$source.jsonl" --output "$workdir/data" --tokenizer "$tokenizer"
done

say 'Training'
status=0
run_and_hand_on_signals "$python" -m stablelm_jax.train --config configs/smoke.py \
    --workdir "$workdir/run" --config.data.root="$workdir/data" \
    --config.data.tokenizer="$tokenizer" "$@" || status=$?
if ((status == 75 || status > 128)); then
    say 'Stopped before the end. Run the same command again: it resumes.'
fi
((status == 0)) || exit "$status"

checkpoint=$(newest_checkpoint)
say 'Evaluating on the held-out text'
"$python" -m stablelm_jax.evaluate --checkpoint "$checkpoint" >"$workdir/held_out.json"

say 'Samples: English in form, not in sense. The model is tiny and has read minutes of docstrings.'
"$python" -m stablelm_jax.generate --checkpoint "$checkpoint" --temperature 0.6 \
    --prompt 'Return the' --prompt 'If the' --prompt 'The name of'

say 'Done. Everything lies here:'
cat <<EOF
  text          $workdir/corpus
  tokens        $workdir/data
  run           $workdir/run (config.json, metrics.jsonl, samples)
  checkpoint    $checkpoint
  held-out loss $workdir/held_out.json
EOF
