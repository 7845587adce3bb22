"""A tiny training of many steps that notes down, once a period, what its process holds.

    PYTHONPATH=.:tests python tests/chaos/long_run.py DATA WORKDIR STEPS EVERY

WORKDIR/usage.jsonl gets a line for every EVERY steps, half-way between two saves (and evaluations,
each with a picture): Python's threads, the system's, open files, resident and private memory. In a
process of its own: what other tests left behind, and what they have yet to let go of, is not in it.
"""

from __future__ import annotations

import collections
import ctypes
import gc
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tiny import tiny_config, train

from stablelm_jax.training.setup import Run


def usage() -> dict:
    """What this process holds now, after all has been given back that can be; memory in MB."""
    gc.collect()
    # What malloc keeps of freed memory goes up and down by 10 MB; what is held shows without it.
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    tasks = [_name(task) for task in Path("/proc/self/task").iterdir()]
    return {
        "python_threads": threading.active_count(),
        "threads": len(tasks),
        "files": len(os.listdir("/proc/self/fd")),
        "resident": int(fields["VmRSS"].split()[0]) / 1024,
        "private": int(fields["RssAnon"].split()[0]) / 1024,
        "names": dict(collections.Counter(tasks)),
    }


def _name(task: Path) -> str:
    try:
        return (task / "comm").read_text().strip()
    except OSError:  # it ended meanwhile
        return "ended"


def main() -> None:
    data, workdir, steps, every = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
    undisturbed = Run.batches

    def watched(run: Run, first: int) -> Iterator[dict]:
        with undisturbed(run, first) as batches, (workdir / "usage.jsonl").open("w") as file:
            for step, batch in enumerate(batches):
                if step % every == every // 2:
                    print(json.dumps({"step": step, **usage()}), file=file, flush=True)
                yield batch

    Run.batches = watched
    overrides = {
        "training.num_steps": steps,
        "training.log_every": 10,
        "schedule.total_steps": steps + 1,
        "evaluation.every": 2 * every,
        "checkpoint.every": every,
        "samples.every": 2 * every,
    }
    sys.exit(train(tiny_config(data, **overrides), workdir)[0])


if __name__ == "__main__":
    main()
