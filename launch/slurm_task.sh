#!/usr/bin/env bash
# One task of launch/slurm.sbatch: bash launch/slurm_task.sh FILE COMMAND...
#
# Leaves with the exit code of COMMAND, and writes an error's to FILE, which lies on a shared disk: srun stops
# the other tasks on its account and then tells how those ended, 75 or 137.
set -uo pipefail
file=$1
shift

export STABLELM_STARTED_AGAIN=yes # so 75, not 1, where another process was killed before the first checkpoint
trap : TERM INT HUP USR1 USR2 # the command hears of these too, and this shell waits for it
"$@"
status=$?
# 75: stopped. From 128 on: killed from outside, or crashed.
if ((status != 0 && status != 75 && status < 128)); then echo "$status" >"$file"; fi
exit "$status"
