"""`runs DIR`: the tree of the runs below a folder, a branch under the checkpoint it started from.

python -m stablelm_jax.runs runs --picture branches.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from stablelm_jax.run_verb import run_verb


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 after an error; bad arguments leave with 2."""
    parser = argparse.ArgumentParser(
        prog="stablelm runs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", help="a folder of run folders")
    parser.add_argument("--picture", metavar="FILE.png", help="gets the curves of all of them")
    given = parser.parse_args(argv)
    from stablelm_jax.reporting.tree import show_runs

    try:
        show_runs(given.folder, given.picture)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_verb(main, "runs", prints_result=True)
