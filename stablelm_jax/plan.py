"""`plan --config F [--target v5p:4x4x4]`: what a run needs, before it runs.

Compiles the train step with the target's own compiler (extra `aot`), without owning the target, and
prints parameters, FLOPs, memory, communication, time, energy and emissions. Without `--target`, and
without `config.parallel.target`, it prints what needs no compiler. It needs neither data nor a
tokenizer.

    python -m stablelm_jax.plan --config configs/stablelm_2_1_6b.py --target a100-40gb:64x8
    python -m stablelm_jax.plan --config F --target h200:1x8 --sweep  # which way to divide the step
    python -m stablelm_jax.plan --all      # every config of configs/launch, for its own target
    python -m stablelm_jax.plan --recipe stablelm_2  # the data: download, core-hours, disk, epochs
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from stablelm_jax.run_verb import answer_interrupts, end_after_interrupt, run_verb

if __name__ == "__main__":  # what is imported below takes a moment, in which Ctrl-C may come
    end_after_interrupt("plan: interrupted; the plan ends here")

from absl import flags

from stablelm_jax import config as config_lib


def main() -> None:
    """Leaves with 0, 1 (does not compile or fit), 2 (bad config or arguments), 130 (Ctrl-C)."""
    config_lib.define_flags(required=False)
    flags.DEFINE_string("target", None, "Machine, as in v5p:4x4x4, a100-40gb:64x8 or h200:1x1.")
    flags.DEFINE_float(
        "mfu", 0.45, "Utilisation for the run's time: model FLOPs, full attention, of the peak."
    )
    flags.DEFINE_float("watts", None, "Mean power of a device and its share of the host.")
    flags.DEFINE_float("price", None, "Dollars a device-hour.")
    flags.DEFINE_bool(
        "sweep", False, "Compile ways to divide a step; rank what fits by an estimate of its time."
    )
    flags.DEFINE_bool("all", False, "Every config of configs/launch, for its own target.")
    flags.DEFINE_string("recipe", None, "The data instead: a recipe of `prepare`, or FILE.py.")
    config_lib.run(_plan)


def _plan(argv: Sequence[str]) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs; the compilers need no device
    given = flags.FLAGS
    if given.sweep:  # XLA warns of too much memory; each result says it once
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from stablelm_jax.planning import report
    from stablelm_jax.planning.sweep import sweep
    from stablelm_jax.planning.targets import TargetError, parse_target

    _check_together(given)
    if given.recipe:
        return _plan_recipe(given)
    if given.all:
        return report.plan_all()
    config = config_lib.config_from_flags(data=False)  # a plan reads none
    try:
        name = given.target or config.parallel.target
        target = parse_target(name) if name else None
        if not given.sweep:
            report.plan(config, target, mfu=given.mfu, watts=given.watts, price=given.price)
        elif config.lora.rank:
            raise config_lib.ConfigError(
                f"config.lora.rank={config.lora.rank}: --sweep estimates full tuning alone; plan "
                "the adapters without it, one division at a time"
            )
        elif target is None:
            raise config_lib.ConfigError(
                "--sweep: needs the machine to compile for; write --target, as in --target "
                "h200:1x8, or set config.parallel.target"
            )
        else:
            answer_interrupts()  # the first one ranks what is done
            sweep(config, target)
    except config_lib.ConfigError:
        raise
    except TargetError as error:
        raise config_lib.ConfigError(str(error)) from error
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _plan_recipe(given: flags.FlagValues) -> int:
    """The data of the run of `--config`, or of the recipe's own."""
    from stablelm_jax.planning import recipe_costs
    from stablelm_jax.preparation.recipes import config_path, load_recipe

    try:
        recipe = load_recipe(given.recipe)
    except ValueError as error:
        raise config_lib.ConfigError(str(error)) from error
    if given.config is None and not recipe.config:
        raise config_lib.ConfigError(f"--config: recipe {recipe.name} names none; write --config F")
    own = given.config is None
    config = (
        config_lib.load(config_path(recipe)) if own else config_lib.config_from_flags(data=False)
    )
    recipe_costs.show(recipe, config)
    return 0


def _check_together(given: flags.FlagValues) -> None:
    """Nothing that was asked for is left out without a word."""
    for asked, others in (
        ("recipe", ("target", "all", "sweep")),
        ("sweep", ("all", "mfu", "watts", "price")),
    ):
        for other in others:
            if given[asked].value and given[other].present:
                raise config_lib.ConfigError(
                    f"--{other}: has no effect with --{asked}; leave one of them out"
                )
    if given.config is None and not given.all and not given.recipe:
        raise config_lib.ConfigError("--config: is missing; write --config FILE.py, or --all")


if __name__ == "__main__":
    run_verb(main, "plan", prints_result=True, interrupted="the plan ends here")
