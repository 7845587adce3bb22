# shellcheck shell=bash disable=SC2154,SC2034 # what the user asked for is read by tpu_pod.sh
# Sourced by tpu_pod.sh: one TPU slice and its workers, by way of gcloud.

pause=${TPU_POD_PAUSE:-30} # seconds between two looks; after a failure first a third of it, then more
attempts=5
# What another attempt does not change; the last two are what gcloud says of missing keys and logins.
hopeless='NOT_FOUND|ALREADY_EXISTS|PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT'
hopeless+='|terminal state|ssh-add|gcloud auth login'
no_quota='RESOURCE_EXHAUSTED|[Qq]uota' # of chips when creating; elsewhere of calls a minute

tpus() { # ARGUMENT...: one gcloud command; a dry run prints it instead
    local command=(gcloud compute tpus "$@" "--zone=$zone" ${project:+"--project=$project"} --quiet)
    if [[ -n $dry_run ]]; then
        quoted "${command[@]}"
    else
        "${command[@]}" </dev/null
    fi
}

quoted() { # ARGUMENT...: as one would type them
    local argument line='' quote="'\\''"
    for argument in "$@"; do
        [[ $argument =~ ^[A-Za-z0-9_./:=@,%+-]+$ ]] || argument="'${argument//\'/$quote}'"
        line+=" $argument"
    done
    printf '%s\n' "${line# }"
}

# The same, with more attempts where they can help. Exit code 2 is a wrong flag or a worker's
# refusal. What the last attempt said is in $scratch/errors.
persist() {
    local attempt status
    [[ -z $dry_run ]] || { tpus "$@" && return; }
    for ((attempt = 1; ; attempt++)); do
        status=0
        # In a subshell: what Ctrl-C has this shell say must not go into the file.
        (tpus "$@") 2>"$scratch/errors" || status=$?
        if ((status == 0)); then return 0; fi
        said NOT_FOUND || cat "$scratch/errors" >&2 # not found: may be what was hoped for
        if ((status == 2 || attempt == attempts)) || said "$hopeless"; then return 1; fi
        if [[ $2 == create ]] && said "$no_quota"; then return 1; fi
        echo "gcloud compute tpus $1 $2 failed (attempt $attempt of $attempts)" >&2
        sleep $((pause * attempt / 3))
    done
}

said() { grep -Eq "$1" "$scratch/errors"; }

request_state() { persist queued-resources describe "$name" '--format=value(state.state)'; }
node_state() { persist tpu-vm describe "$name" '--format=value(state)'; }

# READY to be used, ABSENT, PREEMPTED, or a state on the way to one of these.
pod_state() {
    local state
    if ! state=$(request_state); then
        said NOT_FOUND || return 1
        state=ABSENT
    elif [[ $state == ACTIVE ]] && ! state=$(node_state); then
        # A request may still be called active when its machines are gone.
        said NOT_FOUND || return 1
        state=PREEMPTED
    elif [[ $state == TERMINATED ]]; then
        state=PREEMPTED
    fi
    echo "$state"
}

create() {
    persist queued-resources create "$name" "--node-id=$name" "--accelerator-type=$accelerator" \
        "--runtime-version=$runtime" ${spot:+--spot} ${internal_ip:+--internal-ips} \
        ${service_account:+"--service-account=$service_account"} \
        ${create_flags[@]+"${create_flags[@]}"} ||
        said ALREADY_EXISTS # an attempt that seemed to fail may have succeeded
}

delete_pod() { persist queued-resources delete "$name" --force || said NOT_FOUND; }

on_worker() { # WORKER STEP [ARGUMENT...]: a step of tpu_worker.sh there
    local worker=$1 command
    shift
    command=$(printf ' %q' bash stablelm_pod/worker.sh "$@")
    ssh_to "$worker" "${command# }"
}

ssh_to() { # WORKER COMMAND
    persist tpu-vm ssh "$name" "--worker=$1" ${internal_ip:+--internal-ip} "--command=$2"
}

# `stablelm_pod HOST running|lost|none|EXIT_CODE` of every worker, also of one that is quite new.
results() {
    ssh_to all 'if [ -f stablelm_pod/worker.sh ]; then bash stablelm_pod/worker.sh result; else'\
' echo stablelm_pod new none; fi'
}
