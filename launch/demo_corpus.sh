#!/usr/bin/env bash
# The eight sources of configs/demo_multilingual.py: LibreOffice's help in seven languages, out of
# Debian's packages (25 MB to download), and the code of the standard library.
#
#   bash launch/demo_corpus.sh [DIR]
#
# DIR (default: data in the checkout) is the run's data.root and gets tokenizer.json too. Any user of Debian or Ubuntu can run
# it: packages are unpacked, not installed. Run again, it goes on with what is missing.
set -euo pipefail
caller=$PWD
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
source "$root/launch/debian.sh"

(($# <= 1)) || die 'usage: bash launch/demo_corpus.sh [DIR]'
need_debian
data=${1:-$root/data}
[[ $data == /* ]] || data="$caller/$data"
downloads="$data/downloads"
tokenizer="$data/tokenizer.json"

install --editable '.[demo,arcade100k]'
mkdir -p "$downloads"
languages=(en de es fr it nl pt)
texts=("$downloads/stdlib_code.jsonl")
for language in "${languages[@]}"; do
    say "LibreOffice's help: $language"
    code=$language
    [[ $language != en ]] || code=en-us
    fetch_package "libreoffice-help-$code"
    text="$downloads/libreoffice_help_$language.jsonl"
    # Left out: the names of menus on a Mac (each page has both), lists of links, names of icons.
    [[ -f $text ]] || (cd "$root" && "$python" launch/corpora/html_text.py \
        --input "$downloads/libreoffice-help-$code/usr/share/libreoffice/help" --output "$text" \
        --skip .MAC --skip .relatedtopics --skip .howtoget --skip .noteicon)
    texts+=("$text")
done
(cd "$root" && "$python" launch/corpora/smoke_corpus.py --output "$downloads" --sources stdlib_code)

say 'Training a tokenizer of 8,192 tokens on them'
(cd "$root" && "$python" -m stablelm_jax.train_tokenizer --rows 8192 --output "$tokenizer" \
    --input "${texts[@]}")
say 'Preparing the eight sources' # the recipe names the files that lie in downloads now
(cd "$root" && "$python" -m stablelm_jax.prepare --recipe demo --source all --output "$data" \
    --tokenizer "$tokenizer")

say "The eight sources lie in $data. Train on them, in the checkout's folder:"
printf '  %q -m stablelm_jax.train --config configs/demo_multilingual.py --workdir runs/demo' "$python"
[[ $data == "$root/data" ]] ||
    printf ' --config.data.root=%q --config.data.tokenizer=%q' "$data" "$tokenizer"
echo
