# shellcheck shell=bash
# Sourced by the scripts beside it: the checkout's own .venv, and what gets installed into it.
# Sets $root (the checkout) and $python (the one of .venv, there after the first `install`).

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python="$root/.venv/bin/python"

# pip below leaves compiling to the first import; a Python forbidden to keep what it compiled
# would then start more slowly every time.
unset PYTHONDONTWRITEBYTECODE

say() { printf '\n[%3d s] %s\n' "$SECONDS" "$*"; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# The CUDA extra for the NVIDIA driver at hand; empty without a working one.
# 580 is the oldest driver for CUDA 13, 525 the oldest for CUDA 12 (jax's installation page).
cuda_extra() {
    local driver
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || return 0
    driver=${driver%%.*}
    [[ $driver =~ ^[0-9]+$ ]] || return 0
    if ((driver >= 580)); then
        echo cuda13
    elif ((driver >= 525)); then
        echo cuda12
    fi
}

# install ARGUMENT...: `pip install ARGUMENT...` into .venv, once for each state of the checkout.
install() {
    local stamp_file stamp
    make_venv
    stamp="$* for $root, $(cat "$root/pyproject.toml" "$root/requirements.txt" | cksum)"
    stamp_file="$root/.venv/installed-$(printf '%s' "$*" | cksum | tr ' ' '-')"
    if [[ -f $stamp_file && $(<"$stamp_file") == "$stamp" ]]; then
        say "Installed already: $*"
        return
    fi
    say "Installing into .venv: $* (a minute or two)"
    # Measured for all extras on 2 cores: a new pip and --no-compile turn minutes into one.
    "$python" -m pip install --quiet --upgrade pip || die 'pip could not be upgraded (see above)'
    (cd "$root" && "$python" -m pip install --quiet --no-compile "$@") ||
        die 'the installation failed (see above); run the same command again'
    printf '%s' "$stamp" >"$stamp_file"
}

make_venv() {
    local base=${PYTHON:-python3} version
    if venv_is_usable; then return; fi
    version=$("$base" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])') ||
        die "no Python at '$base'; name one with PYTHON=/path/to/python3"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "Python 3.11 or newer is needed, $base is $version; name one with PYTHON=/path/to/python3"
    say "Making .venv with Python $version"
    "$base" -m venv --clear "$root/.venv" ||
        die "$base could not make .venv (on Debian and Ubuntu: apt-get install python3-venv)"
}

# It runs, has its pip (a venv killed while it was made has none), and is of the Python asked for.
venv_is_usable() {
    local version='import sys; print(sys.version_info[:2])'
    "$python" -m pip --version >/dev/null 2>&1 || return 1
    [[ -z ${PYTHON:-} || $("$PYTHON" -c "$version") == $("$python" -c "$version") ]]
}

# Runs in the background, because bash waits deaf for what runs before it: SIGTERM is handed on, and
# Ctrl-C reaches the whole group by itself (`trap -` undoes bash's deafening of background commands).
run_and_hand_on_signals() {
    local status child interrupted=yes
    (trap - INT && exec "$@") &
    child=$!
    trap 'interrupted=yes; kill -TERM "$child" 2>/dev/null || true' TERM
    trap 'interrupted=yes' INT
    while [[ -n $interrupted ]]; do # a signal ends the wait before the child ends
        interrupted='' status=0
        wait "$child" || status=$?
    done
    trap - TERM INT
    return "$status"
}
