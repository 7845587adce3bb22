"""One start of a run: the folder claimed, the trainer built, trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ml_collections import ConfigDict
from rich.console import Console

from stablelm_jax import config as config_lib
from stablelm_jax.parallel import distributed
from stablelm_jax.run import console as show
from stablelm_jax.run import notices
from stablelm_jax.run.compilation_cache import CompilationCache
from stablelm_jax.run.folder import RunFolder
from stablelm_jax.run.signals import StopRequest
from stablelm_jax.training.loop import Trainer
from stablelm_jax.training.start import ResumeOptions, prepare_start


def run_training(
    config: ConfigDict,
    set_by: dict[str, str],
    workdir: str,
    wishes: ResumeOptions | None = None,
    stop: StopRequest | None = None,
) -> int:
    """Trains `config` in the folder `workdir`; returns the exit code.

    Args:
      set_by: where each config value was set, for the run folder.
      wishes: how to resume.
      stop: entered already; by default the run listens to signals itself.

    Raises:
      ValueError: config, data or checkpoint do not fit; nothing is lost.
    """
    with contextlib.ExitStack() as stack:
        if stop is None:
            stop = stack.enter_context(StopRequest())
        stop.listen()  # jax takes SIGTERM for itself where several processes meet
        notices.watch(stop.hear)
        console = Console(quiet=not distributed.is_first())
        cache = CompilationCache(workdir)
        folder = RunFolder(workdir)
        run = prepare_start(config, workdir)
        # From here on there is something to bring to its end, but for the phases that say not.
        stack.enter_context(stop.phase(stop.phase_name))
        stack.enter_context(_claimed(folder))
        show.show_decisions(console, run)
        console.print(f"run folder: {folder}", soft_wrap=True)
        trainer = Trainer(run, folder, console, cache, wishes or ResumeOptions(), stop)
        if distributed.is_first():
            folder.describe(config_lib.to_dict(config), set_by, run.tokenizer)
        return trainer.train()


@contextlib.contextmanager
def _claimed(folder: RunFolder) -> Iterator[None]:
    """The folder, made and held by process 0; nobody goes on without it."""
    with contextlib.ExitStack() as stack:
        error = None
        if distributed.is_first():
            try:
                stack.enter_context(folder.claimed())
            except (ValueError, OSError) as caught:
                error = caught
        if distributed.agreed(error is not None):
            raise error or ValueError("process 0 could not take the run folder; see its output")
        yield
