"""The installed XLA knows every flag of launch/settings.sh; a process would end otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = Path(__file__).parents[2] / "launch" / "settings.sh"


def settings(**environment):
    """XLA_FLAGS and the share of memory after `use_gpu_settings`."""
    script = f"set -eu; source '{SETTINGS}'; use_gpu_settings; "
    script += 'printf "%s\\n%s" "$XLA_FLAGS" "$XLA_PYTHON_CLIENT_MEM_FRACTION"'
    done = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split("\n")


def starts_with(flags):
    return subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
    ).returncode


def test_xla_knows_every_flag_and_would_have_said_so_if_not():
    flags, _ = settings()
    assert "--xla_gpu" in flags
    assert starts_with(flags) == 0
    assert starts_with(flags + " --xla_gpu_no_such_flag=true") != 0


def test_what_the_user_has_set_is_kept():
    flags, share = settings(XLA_FLAGS="--mine", XLA_PYTHON_CLIENT_MEM_FRACTION="0.5")
    assert flags.startswith("--mine --xla_gpu") and share == "0.5"


def test_the_share_of_memory_is_the_one_that_plan_counts_on():
    from stablelm_jax.planning import targets

    assert float(settings()[1]) == pytest.approx(targets._GPU_SHARE_OF_MEMORY)
