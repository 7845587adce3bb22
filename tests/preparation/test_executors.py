"""What `prepare` advises after an error is what can help."""

import errno

import pytest

from stablelm_jax.preparation.executors import remedy

AGAIN = "run the same command again"


@pytest.mark.parametrize(
    "error, advice",
    [
        (OSError(errno.EIO, "Input/output error"), AGAIN),
        (TimeoutError("no answer"), AGAIN),
        (OSError(errno.ENOSPC, "No space left on device"), f"free space on the disk, then {AGAIN}"),
        (PermissionError(errno.EACCES, "Permission denied"), f"mend that, then {AGAIN}"),
        (FileNotFoundError(errno.ENOENT, "No such file"), f"mend that, then {AGAIN}"),
        (ImportError("no gcsfs"), f"mend that, then {AGAIN}"),
        (MemoryError(), "with fewer --workers"),
    ],
)
def test_the_same_command_is_advised_where_it_can_help(error, advice):
    assert advice in remedy(error)
    assert "mend" in advice or "mend" not in remedy(error)


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), AssertionError(), TypeError()])
def test_the_same_command_is_not_advised_where_the_same_would_happen(error):
    assert "run the same" not in remedy(error)
    assert "would come again" in remedy(error)
