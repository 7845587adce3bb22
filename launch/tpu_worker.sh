#!/usr/bin/env bash
# What launch/tpu_pod.sh runs on each worker of a TPU slice; it copies this file there, beside the
# code, to ~/stablelm_pod. Not for people: `tpu_pod.sh` is.
#
#   prepare        unpacks the code and installs it
#   may_start WORKDIR LAUNCH NUMBER  whether a start after the first is one too many (restarts.py)
#   start WORKDIR FLAG...  starts `train` detached, so that a lost connection does not end it
#   follow LINES   prints the log from its last LINES lines (+1: all), until the training ends
#   result         prints `stablelm_pod HOST running|lost|none|EXIT_CODE`
#   last_words     the end of the log of a training that failed
#   stop           SIGTERM, and SIGKILL for what hangs
#
# prepare, may_start and start do nothing where a training runs: to call them again is safe.
# shellcheck disable=SC2329 # the steps are called by name, at the end
set -euo pipefail

here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
code="$here/code" log="$here/log" exit_code="$here/exit_code" lock="$here/lock"

fail() { # With 2: nothing that a second attempt would change.
    printf 'error: %s: %s\n' "$(hostname)" "$*" >&2
    exit 2
}

# The training and the shell that waits for it hold the lock: no process number to mistake for
# another's after the machine has started anew.
training_runs() { [[ -f $lock ]] && ! flock --shared --nonblock "$lock" true; }

prepare() {
    if training_runs; then
        echo "$(hostname): a training runs; its code stays as it is"
        return
    fi
    if [[ -f $here/setup.sh ]] && ! bash "$here/setup.sh"; then
        echo "error: $(hostname): the --setup script failed (see above)" >&2
        exit 1
    fi
    mkdir -p "$code"
    find "$code" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
    tar -xzf "$here/code.tar.gz" -C "$code"
    # shellcheck source=environment.sh
    source "$code/launch/environment.sh"
    PYTHON=$(find_python)
    export PYTHON
    install --requirement requirements.txt --editable '.[tpu,gcs]'
}

# The images for TPUs are Ubuntu 22.04, with Python 3.10; jax needs 3.11. uv brings a whole Python,
# where Ubuntu's own package of 3.11 is a release candidate.
find_python() {
    local candidate usable='import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))'
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c "$usable" >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    { python3 -m pip install --quiet --user uv && python3 -m uv --quiet python install 3.12; } >&2
    python3 -m uv python find 3.12
}

may_start() {
    ! training_runs || return 0
    cd "$code"
    .venv/bin/python launch/restarts.py "$@" || exit 2 # as with `fail`; it has said why
}

start() {
    local workdir=$1
    shift
    if training_runs; then
        echo "$(hostname): a training runs already"
        return
    fi
    [[ $workdir == gs://* ]] || shared_folder "$workdir"
    [[ ! -f $log ]] || mv "$log" "$log.previous"
    rm -f "$exit_code"
    # One worker may be reached minutes after another, when connections fail.
    export STABLELM_MEETING_SECONDS=${STABLELM_MEETING_SECONDS:-600}
    setsid bash "$here/worker.sh" train --workdir "$workdir" "$@" >"$log" 2>&1 </dev/null &
    until training_runs || [[ -f $exit_code ]]; do sleep 0.1; done
    echo "$(hostname): started"
}

shared_folder() {
    mkdir -p "$1" || fail "--workdir $1 cannot be made"
    if [[ $(df --output=source "$1") == "$(df --output=source "$HOME")" ]]; then
        fail "--workdir $1 lies on this machine's own disk: other workers cannot see it, and it is" \
            'lost with the machine. Name a bucket, or a folder of a disk that --setup FILE mounts'
    fi
}

train() { # Detached: waits for the training and records how it ended.
    local status=0 child
    exec 9>"$lock"
    flock 9
    # A machine that shuts down sends SIGTERM to everyone: the training saves, this shell records.
    trap '' TERM HUP
    cd "$code"
    # Into a file Python writes whole blocks: the log would lag behind by minutes.
    export PYTHONUNBUFFERED=1
    export STABLELM_STARTED_AGAIN=yes # so 75, not 1, where another was killed before the first checkpoint
    (trap - TERM HUP && exec .venv/bin/python -m stablelm_jax.train "$@") &
    child=$!
    echo "$child" >"$here/pid"
    wait "$child" || status=$?
    printf '%s' "$status" >"$exit_code.partial"
    mv "$exit_code.partial" "$exit_code"
    echo "the training ended with exit code $status"
}

follow() {
    local reader
    tail -n "$1" -F "$log" 2>/dev/null &
    reader=$!
    while training_runs && kill -0 "$reader" 2>/dev/null; do sleep "${TPU_POD_SECOND:-1}"; done
    sleep "${TPU_POD_SECOND:-1}" # tail looks at the file once a second
    kill "$reader" 2>/dev/null || true
}

result() {
    local answer=none
    if training_runs; then
        answer=running
    elif [[ -f $exit_code ]]; then
        answer=$(<"$exit_code")
    elif [[ -f $log ]]; then
        answer=lost # the machine started anew
    fi
    echo "stablelm_pod $(hostname) $answer"
}

last_words() {
    case $(result) in
        *' running' | *' none' | *' 0' | *' 75') ;;
        *)
            echo "--- $(result), the end of its log:"
            tail -n 20 "$log"
            ;;
    esac
}

stop() {
    local waited
    training_runs || return 0
    kill -TERM "$(<"$here/pid")" 2>/dev/null || true
    for ((waited = 0; waited < 60; waited++)); do
        training_runs || return 0
        sleep "${TPU_POD_SECOND:-1}"
    done
    kill -KILL "$(<"$here/pid")" 2>/dev/null || true
    while training_runs; do sleep "${TPU_POD_SECOND:-1}"; done
}

# One command to the end: bash reads a script as it goes, and a new copy may replace this file.
case ${1:-} in
    prepare | may_start | start | train | follow | result | last_words | stop) "$@"; exit ;;
    *) fail "tpu_worker.sh: no such step: ${1:-}" ;;
esac
