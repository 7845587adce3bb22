#!/usr/bin/env bash
# The entry point of launch/Dockerfile: `stablelm VERB ...` with the settings for GPUs.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/settings.sh"
use_gpu_settings
# exec: the SIGTERM of `docker stop` reaches the training itself, which saves and exits with 75.
exec python -m stablelm_jax "$@"
