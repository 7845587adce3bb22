"""`plan --config F [--target v5p:4x4x4]`: what a run needs, before it runs.

Compiles the train step with the target's own compiler (extra `aot`), without owning the target, and
prints parameters, FLOPs, memory, communication, time, energy and emissions. Without `--target`, and
without `config.parallel.target`, it prints what needs no compiler.

    python -m stablelm_jax.plan --config configs/stablelm_2_1_6b.py --target a100-40gb:64x8
    python -m stablelm_jax.plan --all      # every config of configs/launch, for its own target
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from absl import flags

from stablelm_jax import config as config_lib


def main(argv: Sequence[str] | None = None) -> None:
    """Leaves with 0, 1 (does not compile or does not fit) or 2 (bad config or arguments)."""
    config_lib.define_flags(argv, required=False)
    flags.DEFINE_string("target", None, "Machine, as in v5p:4x4x4, a100-40gb:64x8 or h200:1x1.")
    flags.DEFINE_float(
        "mfu", 0.45, "Utilisation for the run's time: model FLOPs, full attention, of the peak."
    )
    flags.DEFINE_float("watts", None, "Mean power of a device and its share of the host.")
    flags.DEFINE_float("price", None, "Dollars a device-hour.")
    flags.DEFINE_bool("all", False, "Every config of configs/launch, for its own target.")
    config_lib.run(_plan, argv)


def _plan(argv: Sequence[str]) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs; the compilers need no device
    from stablelm_jax.planning import report
    from stablelm_jax.planning.targets import TargetError, parse_target

    given = flags.FLAGS
    if given.all:
        return report.plan_all()
    if given.config is None:
        raise config_lib.ConfigError("--config: is missing; write --config FILE.py, or --all")
    config = config_lib.config_from_flags()
    try:
        name = given.target or config.parallel.target
        target = parse_target(name) if name else None
        report.plan(config, target, mfu=given.mfu, watts=given.watts, price=given.price)
    except TargetError as error:
        raise config_lib.ConfigError(str(error)) from error
    except config_lib.ConfigError:
        raise
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    main()
