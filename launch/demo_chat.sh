#!/usr/bin/env bash
# From the multilingual demo to a chat model: SFT, DPO, self-knowledge, and what they changed.
#
#   bash launch/demo_chat.sh [--data DIR] [--base RUN] [--runs DIR] [-- --config.group.field=value ...]
#
# DIR (default: data in the checkout) is the one of launch/demo_corpus.sh, RUN (default: runs/demo) what
# was trained on it; the runs and the table of results go to --runs (default: runs/demo_chat). What
# follows `--` goes to every `train`. Each command is printed before it runs. Run it again after
# anything stopped it: what is done is not done twice. Exit codes: those of the step that failed; 75
# when a signal stopped a training, with a whole checkpoint saved.
set -euo pipefail
caller=$PWD
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
source "$root/launch/debian.sh"

usage='usage: bash launch/demo_chat.sh [--data DIR] [--base RUN] [--runs DIR] [-- --config.key=value ...]'
data="$root/data" base="$root/runs/demo" runs="$root/runs/demo_chat"
absolute() { [[ $1 == /* ]] && printf '%s' "$1" || printf '%s' "$caller/$1"; }
while (($#)) && [[ $1 != -- ]]; do
    (($# > 1)) || die "$usage"
    case $1 in
    --data) data=$(absolute "$2") ;;
    --base) base=$(absolute "$2") ;;
    --runs) runs=$(absolute "$2") ;;
    *) die "unknown argument '$1': $usage" ;;
    esac
    shift 2
done
(($# == 0)) || shift
overrides=("$@")
downloads="$data/downloads" tokenizer="$data/tokenizer.json" chat="$data/chat"

need_debian
[[ -f $tokenizer ]] || die "no $tokenizer: run bash launch/demo_corpus.sh first"
[[ -d $base ]] || die "no run at $base: train configs/demo_multilingual.py first, as launch/demo_corpus.sh says"
install --editable '.[demo,arcade100k]'
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
cd "$root"

show() { # COMMAND...: as it may be typed
    printf '\n$'
    printf ' %q' "$@"
    echo
}

run() {
    show "$@"
    "$@"
}

prepare() { # SOURCE INPUT ARGUMENT...
    run "$python" -m stablelm_jax.prepare --source "$1" --input "$2" --output "$data" \
        --tokenizer "$tokenizer" --template zephyr "${@:3}"
}

train() { # STAGE PARENT: a run of configs/demo_chat.py, a branch of another run's weights
    local status=0 command
    command=("$python" -m stablelm_jax.train --config "configs/demo_chat.py:$1" --workdir "$runs/$1"
        --config.branch.parent="$2" --config.data.root="$data"
        --config.data.tokenizer="$tokenizer" "${overrides[@]}")
    show "${command[@]}"
    run_and_hand_on_signals "${command[@]}" || status=$?
    if ((status == 75 || status > 128)); then
        say 'Stopped before the end. Run the same command again: it resumes.'
    fi
    ((status == 0)) || exit "$status"
}

evaluate() { # STAGE: answers to the held-out questions, and the loss of the held-out answers
    local output="$runs/$1.json"
    [[ -f $output ]] || run "$python" -m stablelm_jax.evaluate --checkpoint "$runs/$1" --chat \
        --config configs/demo_chat.py:sft --limit 24 --data "$data" --tokenizer "$tokenizer" \
        --output "$output"
}

names() { # STAGE: what it answers to the twelve identity questions that nothing was trained on
    local output="$runs/$1_names.json"
    [[ -f $output ]] || run "$python" launch/corpora/self_knowledge.py check \
        --checkpoint "$runs/$1" --questions "$chat/identity_left_out.jsonl" --output "$output"
}

say 'Questions and answers out of manuals'
mkdir -p "$downloads" "$runs"
for package in debian-faq{,-de,-fr,-it,-nl,-pt}; do
    fetch_package "$package"
done
[[ -d $chat ]] || {
    rm -rf "$chat.partial"
    mkdir "$chat.partial"
    run "$python" launch/corpora/chat_corpus.py --input "$downloads" --tokenizer "$tokenizer" \
        --output "$chat.partial"
    run "$python" launch/corpora/identity_questions.py --output "$chat.partial"
    mv "$chat.partial" "$chat"
}
licence='MPL-2.0 (LibreOffice help); permissive notice of the Debian FAQ'
for language in en de es fr it nl pt; do
    for kind in howto random pairs; do
        prepare "${kind}_$language" "$chat/${kind}_$language.jsonl" --language "$language" \
            --held-out-by topic --held-out 0.1 --licence "$licence"
    done
done

say 'SFT on answers in the language of the question'
train sft "$base"
evaluate sft

say 'SFT on answers in random languages, to have something for DPO to mend'
train random "$base"
evaluate random

say 'DPO: the answer in the asked language against the same in another'
train dpo "$runs/random"
evaluate dpo
names dpo

say 'Self-knowledge'
[[ -f $chat/self_knowledge.jsonl ]] || run "$python" launch/corpora/self_knowledge.py answer \
    --checkpoint "$runs/dpo" --questions "$chat/identity_train.jsonl" --positives facts \
    --output "$chat/self_knowledge.jsonl"
prepare self_knowledge "$chat/self_knowledge.jsonl" --language en --held-out 0
train self_knowledge "$runs/dpo"
evaluate self_knowledge
names self_knowledge

say "What came of it, also in $runs/table.md"
run "$python" launch/corpora/demo_chat_table.py --runs "$runs" --pages "$chat"
