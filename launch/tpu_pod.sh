#!/usr/bin/env bash
# Trains on a Cloud TPU slice: asks for it, installs and starts `train` on all of its workers, shows
# the log, and does so again after each preemption until the training ends.
#
#   bash launch/tpu_pod.sh run --name N --zone Z --accelerator-type v5p-128 --config configs/F.py \
#       --workdir /shared/run [option ...] [--config.group.field=value ...]
#   bash launch/tpu_pod.sh status | logs | delete --name N --zone Z [--project P]
#
# WORKDIR and the data lie in a bucket, or on a disk that all workers mount (--setup). Call `run` again whenever
# this script or its connection ended: it goes on with what it finds. Exit codes: those of `train`;
# 1 also when gcloud fails for good, 2 for wrong arguments, 130 after Ctrl-C.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
source "$(dirname -- "${BASH_SOURCE[0]}")/tpu_slice.sh"

usage() {
    cat <<'USAGE'
usage: bash launch/tpu_pod.sh run|status|logs|delete --name NAME --zone ZONE [option ...]

  --project P            default: that of gcloud's configuration
  --internal-ip          no external addresses: connect inside the VPC network
  --dry-run              print every gcloud command, run none

of `run`:
  --accelerator-type T   v5p-128 is the v5p:4x4x4 of `plan`: 64 chips, counted as 128 cores
  --config F             a file of this checkout, tracked by git
  --workdir D            gs://BUCKET/FOLDER, or an absolute path on a disk that all workers mount
  --setup FILE           a script that each worker runs first, to mount that disk
  --runtime-version V    default: the one for the accelerator type
  --spot                 cheaper, can be preempted
  --service-account S    default: the project's own
  --create-flag=FLAG     more for `gcloud compute tpus queued-resources create`; may be repeated
  --max-restarts N       default 100; five in a row without a newer checkpoint end it sooner
  --delete-after         delete the slice when this script ends, however it ends
  --config.KEY=VALUE     handed to `train`; may be repeated
USAGE
}

wrong() {
    printf 'error: %s (bash launch/tpu_pod.sh --help)\n' "$*" >&2
    exit 2
}

verb='' name='' zone='' project='' accelerator='' runtime='' config='' workdir='' setup=''
service_account='' spot='' internal_ip='' dry_run='' delete_after='' max_restarts=100
create_flags=() overrides=()

parse() {
    local flag value
    verb=${1:-}
    case $verb in
        run | status | logs | delete) shift ;;
        -h | --help) usage && exit ;;
        *) wrong "'$verb': the first argument is run, status, logs or delete" ;;
    esac
    while (($# > 0)); do
        flag=${1%%=*} value=
        case $flag in
            --spot | --internal-ip | --dry-run | --delete-after) ;;
            -h | --help) usage && exit ;;
            --*)
                if [[ $1 == *=* ]]; then
                    value=${1#*=}
                elif [[ $1 == --config.* ]]; then
                    wrong "$1: write $1=VALUE"
                elif (($# > 1)); then
                    value=$2
                    shift
                fi
                ;;
        esac
        shift
        case $flag in
            --name) name=$value ;;
            --zone) zone=$value ;;
            --project) project=$value ;;
            --accelerator-type) accelerator=$value ;;
            --runtime-version) runtime=$value ;;
            --config) config=$value ;;
            --workdir) workdir=$value ;;
            --setup) setup=$value ;;
            --service-account) service_account=$value ;;
            --max-restarts) max_restarts=$value ;;
            --create-flag) create_flags+=("$value") ;;
            --spot) spot=yes ;;
            --internal-ip) internal_ip=yes ;;
            --dry-run) dry_run=yes ;;
            --delete-after) delete_after=yes ;;
            --config.*) overrides+=("$flag=$value") ;;
            *) wrong "unknown argument '$flag'" ;;
        esac
    done
}

needed() { # VARIABLE FLAG
    [[ -n ${!1} ]] || wrong "$2 is missing, or has no value"
}

check() {
    needed name --name
    needed zone --zone
    [[ $name =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]] ||
        wrong "--name '$name': lower-case letters, digits and hyphens, a letter first"
    [[ -n $dry_run ]] || command -v gcloud >/dev/null ||
        die "no gcloud here; install the Google Cloud CLI and call 'gcloud auth login'"
    [[ $verb == run ]] || return 0
    needed accelerator --accelerator-type
    needed config --config
    needed workdir --workdir
    [[ $workdir == /* || $workdir == gs://?*/?* ]] ||
        wrong "--workdir $workdir: give gs://BUCKET/FOLDER, or the path on the workers, from the root"
    [[ -z $setup || -f $setup ]] || wrong "--setup $setup: no such file"
    [[ $max_restarts =~ ^[0-9]+$ ]] || wrong "--max-restarts $max_restarts: not a number"
    [[ -n $runtime ]] || runtime=$(runtime_for "$accelerator")
    # After the colon come arguments of the config file.
    git -C "$root" ls-files --error-unmatch -- "${config%%:*}" >/dev/null 2>&1 ||
        wrong "--config ${config%%:*}: no file that git tracks in $root; what git does not track" \
            'is not copied to the workers (git add is enough)'
}

# Google's page on TPU software versions.
runtime_for() {
    case $1 in
        v6e-*) echo v2-alpha-tpuv6e ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v4-* | v3-* | v2-*) echo tpu-ubuntu2204-base ;;
        *) wrong "--accelerator-type $1: no runtime version known for it; name --runtime-version" ;;
    esac
}

# --- the steps of `run` --------------------------------------------------------------------------

make_ready() {
    local state previous='' created=
    while :; do
        state=$(pod_state) || die "gcloud does not tell the state of $name (see above)"
        [[ $state == "$previous" ]] || say "$name is $state"
        previous=$state
        exists=yes
        case $state in
            READY) return ;;
            ABSENT)
                if ! create; then
                    ! said "$hopeless|$no_quota" || exists=
                    die "gcloud could not create $name (see above)"
                fi
                created=yes
                ;;
            FAILED)
                [[ -z $created ]] || request_failed
                replace
                ;;
            PREEMPTED | SUSPENDED) replace ;;
            STOPPED) die "$name is stopped: gcloud compute tpus tpu-vm start $name --zone=$zone" ;;
            *) sleep "$pause" ;; # in the queue, being made, repaired or taken away
        esac
    done
}

replace() {
    say "Deleting what is left of $name, to ask for it again"
    delete_pod || die "gcloud could not delete $name (see above)"
}

request_failed() {
    persist queued-resources describe "$name" '--format=yaml(state)' >&2 || true
    die "the request for $name failed (see above). Once the reason is gone (quota, capacity, a wrong" \
        'flag), call this again'
}

# Committed and tracked changes, as they are now; not what git does not track.
pack() {
    local tree
    mkdir -p "$scratch/stablelm_pod"
    tree=$(git -C "$root" -c user.name=tpu_pod -c user.email=tpu_pod stash create) ||
        die "git could not read $root (see above)"
    git -C "$root" archive --format=tar.gz -o "$scratch/stablelm_pod/code.tar.gz" "${tree:-HEAD}"
    cp "$root/launch/tpu_worker.sh" "$scratch/stablelm_pod/worker.sh"
    [[ -z $setup ]] || cp "$setup" "$scratch/stablelm_pod/setup.sh"
    if [[ -n $(git -C "$root" ls-files --others --exclude-standard) ]]; then
        echo 'not copied, because git does not track them:' >&2
        git -C "$root" ls-files --others --exclude-standard | head -n 5 >&2
    fi
}

start_training() {
    local answers
    answers=$(results) || return 1
    if ! grep -qv ' running$' <<<"$answers"; then
        say "A training runs on $name already: following it"
        training='; a training on it goes on'
        lines=100
        return 0
    fi
    # One that lost some of its workers, who started anew: it cannot go on.
    ! grep -q ' running$' <<<"$answers" || on_worker all stop || return 1
    lines=+1
    copy_and_start
}

copy_and_start() {
    say "Copying the code to the workers of $name, installing, starting"
    persist tpu-vm scp "$scratch/stablelm_pod" "$name:" --recurse --worker=all \
        ${internal_ip:+--internal-ip} &&
        on_worker all prepare || return 1
    ((starts == 0)) || on_worker 0 may_start "$workdir" "$launch" "$starts" || return 1
    training='; a training on it goes on'
    on_worker all start "$workdir" --config "$config" ${overrides[@]+"${overrides[@]}"}
}

follower=
follow() { # LINES: worker 0's log, beside everything else; a group of its own, to end it whole
    set -m
    # Not persist: where its connection breaks, await_end begins anew.
    tpus tpu-vm ssh "$name" --worker=0 ${internal_ip:+--internal-ip} \
        "--command=bash stablelm_pod/worker.sh follow $1" 2>/dev/null &
    follower=$!
    set +m
}

unfollow() {
    [[ -z $follower ]] || kill -TERM -- "-$follower" 2>/dev/null || true
    follower=
}

# Returns when no worker trains any more, with $result: 0, 75 or an error's exit code.
await_end() {
    local answers state cause='' looks=0
    follow "$lines"
    while :; do
        sleep "$pause"
        if ! answers=$(results); then
            state=$(pod_state) || state=unknown
            [[ $state != READY && $state != unknown ]] || die 'the workers do not answer (see above).' \
                'The training goes on without this script; call it again to follow it'
            result=75
            break
        fi
        result=$(worst_of "$answers")
        if ! grep -q ' running$' <<<"$answers"; then
            break
        elif grep -qv ' running$' <<<"$answers" && ((++looks == 4)); then
            # The others end by themselves, or hang in a collective that will never be complete.
            say 'Some workers have ended, others hang: stopping those'
            cause=$result
            on_worker all stop || true
        fi
        kill -0 "$follower" 2>/dev/null || follow 0
    done
    if [[ -n $cause ]]; then # not what became of those that were stopped
        result=$cause
        ((result > 0)) || result=75
    fi
    last_lines
    unfollow
}

last_lines() { # they are on their way
    local waited
    for ((waited = 0; waited < 30; waited++)); do
        kill -0 "$follower" 2>/dev/null || return 0
        sleep 0.1
    done
}

# ANSWERS: an error's exit code, else 75, else 0. Where one worker was killed and others were stopped, or hang
# without it, all are started again; where every one was killed, that is how it ends.
worst_of() {
    awk '$3 == "0" { next }
         $3 == "running" || $3 == "75" || $3 == "lost" || $3 == "none" { again = 75; next }
         $3 >= 128 { killed = $3; next }
         !error { error = $3 }
         END { print error ? error : again ? again : killed + 0 }' <<<"$1"
}

run() {
    local starts result lines state launch
    launch="tpu_pod-$(date +%s)"
    for ((starts = 0; starts <= max_restarts; starts++)); do
        make_ready
        result=75
        if start_training; then
            await_end
            training=
        elif state=$(pod_state) && [[ $state == READY ]]; then
            die 'the training could not be started (see above)'
        fi
        if ((result != 0 && result != 75)); then
            # When one machine is taken away the others fail, sooner than its loss is reported.
            sleep "$pause"
            state=$(pod_state) || state=unknown
            [[ $state != READY && $state != unknown ]] || failed "$result"
        fi
        if ((result == 0)); then
            say 'The training reached its last step'
            return 0
        fi
        say 'Stopped before the last step: going on from the last checkpoint'
    done
    die "$max_restarts restarts were not enough (--max-restarts)"
}

failed() { # EXIT_CODE
    on_worker all last_words >&2 || true
    echo "error: the training failed with exit code $1 (see above)" >&2
    exit "$1"
}

print_commands() {
    local starts=0
    scratch=/tmp/tpu_pod
    case $verb in
        run)
            request_state
            create
            request_state
            node_state
            results
            copy_and_start
            follow +1 && wait "$follower"
            echo '# results again and again; after a preemption delete, and all of this once more'
            [[ -z $delete_after ]] || delete_pod
            ;;
        status) request_state && node_state && results ;;
        logs) follow +1 && wait "$follower" ;;
        delete) delete_pod ;;
    esac
}

exists='' training='' # set by `run`: there is something that may cost money; what it does
settle() {
    local status=$?
    trap - EXIT INT TERM
    unfollow
    if [[ -n $exists && -n $delete_after ]]; then
        say "Deleting $name"
        delete_pod || echo "error: $name could not be deleted; it still costs money" >&2
    elif [[ -n $exists ]]; then
        {
            echo "$name still exists and costs money$training. Call this again to go on, or delete it:"
            printf '  bash launch/tpu_pod.sh delete --name %q --zone %q' "$name" "$zone"
            printf '%s\n' "${project:+ --project $project}"
        } >&2
    fi
    rm -rf "$scratch"
    exit "$status"
}

parse "$@"
check
if [[ -n $dry_run ]]; then
    print_commands
    exit
fi
scratch=$(mktemp -d)
trap settle EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
case $verb in
    run)
        pack
        run
        ;;
    status)
        state=$(pod_state) || die "gcloud does not tell the state of $name (see above)"
        echo "$state"
        [[ $state != READY ]] || results
        ;;
    logs) tpus tpu-vm ssh "$name" --worker=0 ${internal_ip:+--internal-ip} \
        '--command=bash stablelm_pod/worker.sh follow +1' ;;
    delete) delete_pod || die "gcloud could not delete $name (see above)" ;;
esac
