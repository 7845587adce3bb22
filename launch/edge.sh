#!/usr/bin/env bash
# The table of `report --edge` with MLX and OpenVINO beside llama.cpp, each in an environment of its own.
#
#   bash launch/edge.sh CHECKPOINT [--data DIR] [--output OUT] [--max-rows N] [--speed] ...
#
# CHECKPOINT is a run or a global_step<N>; what follows are flags of `python -m stablelm_jax.report
# --edge`. Makes .venv-mlx (1 GB) and .venv-openvino (2 GB; more where PyPI's torch brings CUDA) in the
# checkout. Run again after anything stopped it: rows that are measured stay.
set -euo pipefail
caller=$PWD
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

(($#)) || die 'usage: bash launch/edge.sh CHECKPOINT [flags of report --edge]'
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

environment() { # EXTRA: .venv-EXTRA with the checkout and this extra
    local folder="$root/.venv-$1" stamp
    stamp="$1 for $root, $(cksum <"$root/pyproject.toml")"
    [[ ! -f $folder/installed || $(<"$folder/installed") != "$stamp" ]] || return 0
    say "Installing into .venv-$1 (minutes)"
    "${PYTHON:-python3}" -m venv "$folder" || die "no environment could be made in $folder"
    (cd "$root" && "$folder/bin/python" -m pip install --quiet --no-compile --editable ".[$1]") ||
        die 'the installation failed (see above); run the same command again'
    printf '%s' "$stamp" >"$folder/installed"
}

install --editable '.[edge]'
environment mlx
environment openvino
cd "$caller"
"$python" -m stablelm_jax.report --edge "$@"
for program in mlx openvino; do
    say "Measuring $program"
    "$root/.venv-$program/bin/python" "$root/launch/edge_others.py" "$program" "$@"
done
"$python" -m stablelm_jax.report --edge "$@" --types none
