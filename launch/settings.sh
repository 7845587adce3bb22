# shellcheck shell=bash
# Sourced by the launch scripts: what XLA, NCCL and the allocator are told, and why. XLA ends a process
# that names a flag it does not know, so tests/launch/test_settings.py tries each with the installed jax.

# --- NVIDIA GPUs; jax 0.10.2 to 0.12 ---------------------------------------------------------------

# Off by default. Moves the gather of the weights and the scatter of the gradients beside computation:
# an AOT-compiled A100 step goes from 3 to 14 asynchronous collectives at the same peak memory.
gpu_xla_flags='--xla_gpu_enable_latency_hiding_scheduler=true'

# jax takes 75 % of the memory by default. `plan` counts on 94 %: the rest is for the driver and NCCL.
gpu_memory_fraction=0.94

use_gpu_settings() {
    export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }$gpu_xla_flags"
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-$gpu_memory_fraction}
}

# --- TPUs ------------------------------------------------------------------------------------------
# None. Single flags left the compiled step as it was on v5e (either on already, or without effect).
