"""Without a chip no verb asks for one: plugins that compile for chips fail loudly where none is."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
from stablelm_jax import run_verb
run_verb._CHIPS = sys.argv[1:]
run_verb.run_verb(lambda: print(os.environ.get("JAX_PLATFORMS")), "test")
"""


@pytest.mark.parametrize(
    "chips, given, expected",
    [
        ("/dev/no_such_chip*", {}, "cpu"),
        ("/dev/null", {}, "None"),  # stands for a chip: jax looks for itself
        ("/dev/no_such_chip*", {"JAX_PLATFORMS": "tpu"}, "tpu"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="chips are looked for on Linux alone")
def test_the_platform_is_the_cpu_where_there_is_no_chip(chips, given, expected):
    kept = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    command = [sys.executable, "-c", SCRIPT, chips]
    found = subprocess.run(command, env=kept | given, stdout=subprocess.PIPE, text=True)
    assert found.stdout.strip() == expected
