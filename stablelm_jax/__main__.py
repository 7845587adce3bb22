"""`stablelm VERB ...`, the same as `python -m stablelm_jax.VERB ...`.

Nothing but the verb asked for is imported: `--help` and a mistyped verb answer at once.
"""

from __future__ import annotations

import difflib
import runpy
import sys
from collections.abc import Sequence

from stablelm_jax import __version__, configs_folder
from stablelm_jax.run_verb import guard_output

VERBS = {
    "train_tokenizer": "a small tokenizer.json of your own, learned from documents",
    "prepare": "documents into token shards, a held-out split and a manifest",
    "plan": "what a run needs: memory, communication, time, cost, without the machine",
    "train": "pretrain; goes on by itself where the run's folder holds a checkpoint",
    "report": "the page of a run; runs compared: which is better, and how sure that is",
    "runs": "the tree of runs and their branches below a folder, their curves in one picture",
    "inspect_data": "the documents of a step, what each did to its loss; those of a source",
    "evaluate": "held-out loss of a checkpoint, or the benchmarks of lm-eval",
    "generate": "text from a checkpoint",
    "convert": "checkpoints from and to Hugging Face and GGUF, each checked as it is written",
    "drill": "kill and stop a run in every phase; is its end the undisturbed one, bit for bit?",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb, which leaves with an exit code of its own; else returns the exit code."""
    if argv is None:  # from the command line
        guard_output()
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments else ""
    if verb in VERBS:
        sys.argv = [f"stablelm {verb}", *arguments[1:]]
        # As the main module: absl's --help lists the flags of that one.
        runpy.run_module(f"stablelm_jax.{verb}", run_name="__main__", alter_sys=True)
    elif verb in ("-h", "--help", "help"):
        print("usage: stablelm VERB ...\n")
        for name, purpose in VERBS.items():
            print(f"  {name:<17}{purpose}")
        print("\nstablelm VERB --help says more of one.")
        print(f"The configs that come along: {configs_folder()}")
    elif verb == "--version":
        print(f"stablelm_jax {__version__}")
    else:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        question = f"there is no verb {verb!r}; " if verb else "which verb? "
        question += f"did you mean {near[0]!r}? " if near else ""
        verbs = f"the verbs are {', '.join(VERBS)}; stablelm --help says more"
        print(f"stablelm: {question}{verbs}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
