#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them.
#
#   bash launch/test.sh [--all] [pytest arguments; paths are relative to the checkout]
#
# --all  also installs the extras `parity` and `aot` (gigabytes), and runs the slow tests too; those by hand are
#        run by -m by_hand alone.
# What is not installed is skipped, and counted in the last lines.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

extras='test'
every_test=()
if [[ ${1:-} == --all ]]; then
    shift
    extras='test,parity,aot'
    every_test=(-m 'not by_hand')
fi
install --editable ".[$extras]"

cd "$root"
# A whole file to a worker: its tests share what was expensive to set up. In the order of
# tests/conftest.py.
"$python" -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder ${every_test[@]+"${every_test[@]}"} "$@"
