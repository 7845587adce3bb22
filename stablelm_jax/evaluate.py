"""`evaluate --checkpoint C` or `--gguf FILE`: held-out text of each source, --tasks or --mt-bench.

JSON goes to stdout or --output, tables to stderr. With --tasks or --mt-bench only these are run,
unless --config or --data says where held-out text lies. --chat asks as a conversation does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stablelm_jax.preparation.lists import CONTAMINATED_NAME
from stablelm_jax.run.console import make_console
from stablelm_jax.run_verb import run_verb
from stablelm_jax.storage.files import check_writable, write_json

if TYPE_CHECKING:
    from stablelm_jax.checkpoint.saved_model import SavedModel
    from stablelm_jax.generation.generator import Generator
    from stablelm_jax.interop.llama_cpp import LlamaCpp
    from stablelm_jax.reporting.evaluations import Told
    from stablelm_jax.tokenizer.chat import ChatTemplate
    from stablelm_jax.training.setup import Run


# Flags that mean nothing without another.
_ONLY_WITH = {
    **dict.fromkeys(("contamination", "num_fewshot", "compare"), "tasks"),
    **dict.fromkeys(("questions", "model_id", "judge", "judge_model"), "mt_bench"),
}
_NOT_OF_FILES = ("model", "dtype", "chat", "mt_bench", "max_new_tokens")
_CONVERSATIONS = 64  # held-out ones of each source that are answered
_INTERRUPTED = "nothing was printed; answers and grades of --mt-bench are kept"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 on failure, 2 for bad arguments (argparse)."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    for name, value in vars(arguments).items():
        flag, needed = f"--{name.replace('_', '-')}", _ONLY_WITH.get(name)
        if value == "" or (isinstance(value, list) and "" in value):
            parser.error(f"{flag} is empty: name something, or leave it out")
        if needed and value not in (None, ()) and not getattr(arguments, needed):
            parser.error(f"{flag}: only with --{needed.replace('_', '-')}")
    if not (arguments.checkpoint or arguments.gguf):
        parser.error("--checkpoint or --gguf: name what is to be evaluated")
    for name in _NOT_OF_FILES if arguments.gguf else ():
        if getattr(arguments, name) not in (None, 1):
            parser.error(f"--{name.replace('_', '-')}: not with --gguf")
    if arguments.tasks and not arguments.checkpoint:
        parser.error("--tasks: with --gguf, name the --checkpoint it was written from too")
    try:
        from stablelm_jax.run.metrics import finite  # imports jax, which takes seconds

        if arguments.output:
            check_writable(arguments.output)
        found = finite(_evaluate(arguments))  # what one task found must not cost the others
        _write(found, arguments.output)
    except (ValueError, OSError, ImportError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    if failed := found.get("failed"):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        print(f"evaluate: tasks without scores: {reasons}", file=sys.stderr)
        return 1
    return 0


def _write(found: dict[str, Any], output: Path | None) -> None:
    """To stdout where no file is named, or where it cannot be written after all."""
    if output:
        try:
            return write_json(output, found)
        except OSError:  # hours of work are in it
            _write(found, None)
            raise
    print(json.dumps(found, indent=1, allow_nan=False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stablelm evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", help="a folder global_step<N>, or its gs:// URL")
    what = "a file of llama.cpp; --checkpoint then only says from what it was written"
    add("--gguf", metavar="FILE", help=what)
    add("--output", type=Path, help="file for the JSON; default: stdout")
    add("--model", type=_count, default=1, help="devices that share the model (%(default)s)")
    what = "default: held-out text as in training; tasks bfloat16, float32 on a CPU"
    add("--dtype", choices=("bfloat16", "float32"), help=what)
    what = "the model is asked in this template: zephyr, chatml or a FILE; default: its own"
    add("--chat", nargs="?", const=True, metavar="TEMPLATE", help=what)
    what = (
        "of an answer at most; default: 1,024 of MT-Bench, each task's own, 256 of held-out chats"
    )
    add("--max-new-tokens", type=_count, help=what)
    what = "tokens of a batch on each device (%(default)s)"
    add("--batch-tokens", type=_count, default=16_384, help=what)
    add("--tokenizer", help="default: the one the model was trained with")

    add = parser.add_argument_group("held-out text").add_argument
    add("--config", help="config file; default: the one in the checkpoint")
    add("--data", help="folder or URL of the prepared sources; default: the config's")
    add("--max-rows", type=_count, default=2**31 - 1, help="held-out rows a source; default: all")

    add = parser.add_argument_group("tasks").add_argument
    names = (
        "names with commas between; of lm-eval, or stablelm2_quick, stablelm2_leaderboard, "
        "stablelm2_multilingual, stablelm2_lambada_deepl"
    )
    add("--tasks", type=lambda text: [name.strip() for name in text.split(",")], help=names)
    add("--task-data", help="folder made by launch/corpora/task_data.py; default: the Hub")
    what = "data root whose sources list items that stand in them: scores without these, beside"
    add("--contamination", type=_contaminated, default=(), metavar="DATA", help=what)
    add("--limit", type=_count, help="items of each task; default: all")
    what = "examples, where a task is not fixed to none; default: each task's own number"
    add("--num-fewshot", type=int, help=what)
    add("--max-length", type=_count, help="tokens; default: those of the training")
    what = "published model; default: stablelm-2-1_6b, with --chat stablelm-2-zephyr-1_6b"
    add("--compare", help=what)

    add = parser.add_argument_group("MT-Bench").add_argument
    add("--mt-bench", type=Path, metavar="OUT", help="folder for the answers, in FastChat's files")
    what = "question.jsonl; default: of --task-data, else of OUT"
    add("--questions", type=Path, help=what)
    add("--model-id", help="name of the file of answers; default: that of the run and the step")
    what = "grades the answers: address of an OpenAI-compatible server, its key in OPENAI_API_KEY"
    add("--judge", metavar="URL", help=f"{what}; never the model itself")
    add("--judge-model", help="its name on the server; default: the only one there")
    add("--judge-timeout", type=_count, default=300, help="seconds of silence (%(default)s)")
    return parser


def _contaminated(root: str) -> list[Path]:
    lists = root and sorted(Path(root).glob(f"*/{CONTAMINATED_NAME}"))
    if not lists:
        raise argparse.ArgumentTypeError(
            f"{root or 'empty'}: no source there has a {CONTAMINATED_NAME}; prepare --benchmarks"
            " TASK_DATA writes it"
        )
    return lists


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    from stablelm_jax.checkpoint.saved_model import SavedModel
    from stablelm_jax.storage.remote import described

    saved, found = None, {"gguf": arguments.gguf} if arguments.gguf else {}
    if arguments.checkpoint:
        saved = SavedModel.open(arguments.checkpoint, arguments.tokenizer)
        found |= {"checkpoint": str(saved.path), "step": saved.run["step"]}
    template = None
    if arguments.chat or arguments.mt_bench:
        named = arguments.chat if isinstance(arguments.chat, str) else None
        template = saved.chat_or_own(named)
        found["chat_template"] = template.to_json()
    asked = [name for name in ("tasks", "mt_bench") if getattr(arguments, name)]
    if not asked or arguments.config or arguments.data:
        found |= _held_out(arguments, saved, template)
    failed: dict[str, str] = {}
    for name in asked:
        try:
            part = {"tasks": _tasks, "mt_bench": _mt_bench}[name](arguments, saved, template)
        except Exception as error:  # of any library: what was found before stays
            if not found.keys() & {"eval/loss", "eval/logps/chosen", "tasks"}:
                raise
            part = {"failed": {name: described(error)}}
        failed |= part.pop("failed", {})
        found |= part
    return found | ({"failed": failed} if failed else {})


def _tasks(arguments: argparse.Namespace, saved: SavedModel, template: Any) -> dict[str, Any]:
    from stablelm_jax.evaluation.checkpoint_tasks import evaluate_tasks

    return evaluate_tasks(
        lambda told: _lm(arguments, saved, template, told),
        arguments.tasks,
        data=arguments.task_data,
        compared=arguments.compare or f"stablelm-2-{'zephyr-' if template else ''}1_6b",
        limit=arguments.limit,
        num_fewshot=arguments.num_fewshot,
        chat=template,
        contamination=arguments.contamination,
    )


def _lm(arguments: argparse.Namespace, saved: SavedModel, template: Any, told: Told) -> Any:
    """What answers lm-eval: the checkpoint, or the GGUF file."""
    from stablelm_jax.evaluation.checkpoint_tasks import lm_of_checkpoint, lm_of_gguf
    from stablelm_jax.parallel.mesh import make_mesh

    if arguments.gguf:
        return lm_of_gguf(arguments.gguf, saved, told=told, max_length=arguments.max_length)
    names = ("max_new_tokens", "dtype", "max_length", "batch_tokens")
    options = {name: getattr(arguments, name) for name in names}
    mesh = make_mesh(model=arguments.model)
    return lm_of_checkpoint(saved, mesh, told=told, chat=template, **options)


def _mt_bench(arguments: argparse.Namespace, saved: SavedModel, template: Any) -> dict[str, Any]:
    from stablelm_jax.evaluation.judge import Judge
    from stablelm_jax.evaluation.mt_bench import evaluate_mt_bench

    judge = arguments.judge, arguments.judge_model, arguments.judge_timeout
    data = Path(arguments.task_data) / "mt_bench" if arguments.task_data else arguments.mt_bench
    return evaluate_mt_bench(
        saved,
        template,
        lambda: _generator(arguments, saved),
        arguments.questions or data / "question.jsonl",
        arguments.mt_bench,
        model_id=arguments.model_id,
        max_new_tokens=arguments.max_new_tokens,
        judge=Judge(*judge) if arguments.judge else None,
    )


def _generator(arguments: argparse.Namespace, saved: SavedModel) -> Generator:
    from stablelm_jax.generation.generator import Generator
    from stablelm_jax.parallel.mesh import make_mesh
    from stablelm_jax.parallel.sharding import batch_parts

    mesh, length = make_mesh(model=arguments.model), arguments.max_length or saved.max_positions
    return Generator(
        saved.model,
        saved.load(mesh),
        mesh=mesh,
        dtype=arguments.dtype,
        batch_size=max(1, arguments.batch_tokens // length) * batch_parts(mesh),
        max_length=length,
        num_valid_ids=saved.num_valid_ids,
    )


def _held_out(arguments: argparse.Namespace, saved: SavedModel, template: Any) -> dict[str, Any]:
    from stablelm_jax.evaluation.other_program import held_out_run, open_gguf
    from stablelm_jax.reporting.console import show_evaluation

    names = ("config", "data", "tokenizer", "dtype", "model", "batch_tokens", "max_rows")
    run = held_out_run(saved, **{name: getattr(arguments, name) for name in names})
    llama = open_gguf(arguments.gguf, run) if arguments.gguf else None
    line = _means(saved, run, llama)
    what = Path(arguments.gguf).name if arguments.gguf else saved.run["step"]
    show_evaluation(make_console(stderr=True), run, what, line)
    return line | (_answers(arguments, saved, template, run) if template else {})


def _means(saved: SavedModel, run: Run, llama: LlamaCpp | None) -> dict[str, Any]:
    """Over held-out text or pairs; without rewards where the reference of DPO is gone."""
    from stablelm_jax.evaluation.other_program import eval_step_of
    from stablelm_jax.training.held_out import evaluate_held_out
    from stablelm_jax.training.reference import NoParent, compute_held_out

    left_out: tuple[str, ...] = ()
    if run.reference is not None:
        try:
            compute_held_out(run, saved.path.parent.parent)
        except NoParent as error:  # its NaN reach what is left out, and nothing else
            left_out = ("eval/loss", "eval/rewards/")
            print(f"evaluate: loss and rewards are left out: {error}", file=sys.stderr)
    parameters = saved.load(run.mesh) if llama is None else None
    eval_step = run.eval_step if llama is None else eval_step_of(llama.logits, run)
    line = evaluate_held_out(eval_step, parameters, run.held_out(), run.mesh, run.objective)
    return {key: value for key, value in line.items() if not key.startswith(left_out)}


def _answers(
    arguments: argparse.Namespace, saved: SavedModel, template: ChatTemplate, run: Run
) -> dict[str, Any]:
    """What the model answers to held-out conversations of the run's data, where there are some."""
    from stablelm_jax.evaluation.answers import (
        MAX_NEW_TOKENS,
        held_out_questions,
        measure_answers,
    )
    from stablelm_jax.reporting.evaluations import table_of_answers

    chats = [source.manifest.chat for source in run.sources.values()]
    if other := [chat["name"] for chat in chats if chat and chat["jinja"] != template.jinja]:
        print(
            f"held-out conversations are prepared in the template {other[0]}, not in "
            f"{template.name}: none are answered; name theirs with --chat, or prepare them anew",
            file=sys.stderr,
        )
        return {}
    tokenizer, limit = saved.tokenizer, arguments.limit or _CONVERSATIONS
    questions = held_out_questions(run.sources.values(), tokenizer, limit)
    if not questions:
        print("no held-out conversations in the run's data: none are answered", file=sys.stderr)
        return {}
    most = {"max_new_tokens": arguments.max_new_tokens or MAX_NEW_TOKENS}
    generator = _generator(arguments, saved)
    numbers, samples = measure_answers(generator, tokenizer, template, questions, **most)
    make_console(stderr=True).print(table_of_answers(numbers))
    return {f"chat/{name}": value for name, value in numbers.items()} | {
        "chat/samples": samples[:16]
    }


if __name__ == "__main__":
    run_verb(main, "evaluate", prints_result=True, interrupted=_INTERRUPTED)
