"""One start of a run from beginning to end: services, beginning, programs, loop."""

from __future__ import annotations

import contextlib

import jax
from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.parallel import distributed
from stablelm_jax.run.services import start_services
from stablelm_jax.run.signals import StopRequest
from stablelm_jax.training.begin import ResumeOptions, begin
from stablelm_jax.training.loop import Trainer
from stablelm_jax.training.setup import check_data
from stablelm_jax.workdir import check_workdir


def run_training(
    config: ConfigDict,
    set_by: dict[str, str],
    workdir: str,
    options: ResumeOptions = ResumeOptions(),
    stop: StopRequest | None = None,
) -> int:
    """Trains `config` in the folder `workdir`; returns the exit code.

    `set_by`: where each config value was set, for the run folder. `stop`: entered already; by
    default the run listens to signals itself. ValueError: config, data or checkpoint do not fit;
    nothing is lost.
    """
    from stablelm_jax.reporting.console import show_decisions  # the core never needs the shell

    config_lib.validate(config)
    check_workdir(workdir)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest())
        services = stack.enter_context(start_services(config, workdir, stop))
        with stop.phase("restoring", leave=True):
            if jax.process_count() > 1:
                check_data(config)
            beginning = begin(config, services, options)
            show_decisions(services.console, beginning.run)
            trainer = Trainer(beginning, services)
        progress = beginning.progress
        progress.wandb_id = services.log.writers.open(
            progress.step, progress.wandb_id, beginning.resumed
        )
        if not beginning.resumed and config.checkpoint.save_initial:
            with stop.phase("saving"):  # what a run that is stopped while it compiles goes on from
                services.saver.finish(progress.step, trainer.checkpoint)
        if distributed.is_first():
            values, tokenizer = config_lib.to_dict(config), beginning.run.tokenizer
            services.folder.describe(values, set_by, tokenizer, services.events.tell)
            services.folder.upload()
        with stop.phase("compiling", leave=True):
            trainer.compile()
        return trainer.train()
