"""The config tree: every field with its default, the values it may have and what it means."""

from __future__ import annotations

import dataclasses
import importlib
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from stablelm_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Field:
    """What one value of the config may be; the rules for several together are in `rules`.

    A text may be empty where its default is.
    """

    default: Any  # or a type (int, float, str) where there is none and a run must set it
    optional: bool = False  # it may stay unset
    least: float = -math.inf  # allowed itself, as `most` is
    most: float = math.inf
    above: float = -math.inf  # not allowed itself, as `below` is not
    below: float = math.inf
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] = ()  # or what gives them when asked

    @property
    def type(self) -> type:
        return self.default if isinstance(self.default, type) else type(self.default)

    def problem(self, value: Any) -> str:
        """Why a value is refused, and the remedy; '' where it is allowed."""
        if type(value) is not self.type and not (self.type is float and type(value) is int):
            return f"is of type {type(value).__name__}; give a value of type {self.type.__name__}"
        choices = self.choices() if callable(self.choices) else self.choices
        if choices and value not in choices:
            return f"is not known; use one of: {', '.join(choices)}"
        if isinstance(self.default, str) and self.default and not value:
            return "is empty; name one"
        if self.type is tuple and not all(isinstance(text, str) and text for text in value):
            return "one is empty or no text; give texts"
        if self.type not in (int, float):
            return ""
        if not math.isfinite(value):
            return "is not a finite number; give one"
        if self.least <= value <= self.most and self.above < value < self.below:
            return ""
        low = f"{self.least} or more" if self.least > -math.inf else f"a number above {self.above}"
        bounds = {f"up to {self.most}": self.most, f"below {self.below}": self.below}
        high = "".join(f" and {text}" for text, bound in bounds.items() if bound < math.inf)
        return f"is out of range; use {low}{high}"


def _kernels(name: str) -> Callable[[], tuple[str, ...]]:
    """What gives the names that kernels/<name>.py has: asked late, since importing loads jax."""
    module = f"stablelm_jax.kernels.{name}"
    return lambda: ("auto", *importlib.import_module(module).IMPLEMENTATIONS)


def _model_fields() -> dict[str, Field]:
    """Those of `ModelConfig`, which explains and checks them; what has no default must be set."""
    types = typing.get_type_hints(ModelConfig)
    return {
        own.name: Field(types[own.name] if own.default is dataclasses.MISSING else own.default)
        for own in dataclasses.fields(ModelConfig)
    }


OPTIMIZERS = ("adamw", "muon", "lion", "ademamix", "schedule_free_adamw")

TREE = {
    "name": Field("run"),  # shown in logs and by the writers
    "seed": Field(1234, least=0, most=2**32 - 1),  # of the initial weights and the data order
    "model": _model_fields(),
    "data": {
        "root": Field("data"),  # folder or URL that holds what `prepare` wrote
        "cache": Field("~/.cache/stablelm_jax/shards"),  # of shards behind a URL
        "cache_gb": Field(50.0, least=0),  # its bound in 10^9 bytes; past it: read by range
        "tokenizer": Field("arcade100k"),  # or the path of a tokenizer.json
        "weights": {},  # source name -> weight; only their ratios matter; 0 leaves a source out
        "stages": Field(""),  # later weights: 'STEP:a=0.7,b=0.3; STEP:b=1'
        # Not trained on: 'SOURCE:rows:FIRST-LAST' or 'SOURCE:documents:FIRST-LAST', as inspect_data
        # counts them.
        "skip": Field(()),
        "check_shards": Field(True),  # on resuming, read shards whose time of change differs
        "sequence_length": Field(4096, least=1),  # tokens of a row
        "batch_size": Field(int, least=1),  # rows of the whole job in one step
        "batch_stages": Field(""),  # later batch sizes: 'STEP:rows; STEP:rows'
        # Rows cut into shorter ones from a step on: 'STEP:length; STEP:length', also from step 0.
        "sequence_stages": Field(""),
        "loss_on_first_token": Field(True),  # of a document, given the end of the one before it
        # 'concatenate' cuts documents at the end of a row; 'best_fit' puts whole ones together, as
        # conversations and pairs need it, and cuts only what no row holds; 'one': each in a row.
        "packing": Field("concatenate", choices=("concatenate", "best_fit", "one")),
        "loss_on": Field("answers", choices=("answers", "all")),  # tokens of a conversation
        "prefetch_batches": Field(2, least=0),  # batches made ahead by a thread; 0: none
    },
    "optimizer": {  # b1, b2 and epsilon are Adam's; 'lion' has its own
        "kind": Field("adamw", choices=OPTIMIZERS),
        "b1": Field(0.9, least=0, below=1),  # 'schedule_free_adamw': the share of the average
        "b2": Field(0.95, least=0, below=1),
        "epsilon": Field(1e-8, above=0),
        "muon_momentum": Field(0.95, least=0, below=1),
        "muon_steps": Field(5, least=1),  # of the Newton-Schulz iteration
        # 'moonlight': updates as large as AdamW's, for learning rates like AdamW's.
        "muon_scale": Field("moonlight", choices=("moonlight", "jordan")),
        "lion_b1": Field(0.9, least=0, below=1),  # of the update
        "lion_b2": Field(0.99, least=0, below=1),  # of the momentum
        "ademamix_b3": Field(0.9999, above=0, below=1),  # of the slow average
        "ademamix_alpha": Field(5.0, least=0),  # its weight beside the fast one
        "ademamix_warmup_steps": Field(int, optional=True, least=0),  # in which both rise
        "weight_decay": Field(0.1, least=0),  # decoupled; not on norms and biases
        "clip_norm": Field(1.0, above=0),  # global norm of the gradient
    },
    "schedule": {  # of the learning rate; the formulas are in optimizer/schedule.py
        # 'hybrid' is a cosine, then an inverse square root; 'wsd' is 'constant' with a cooldown.
        "kind": Field("hybrid", choices=("hybrid", "cosine", "constant", "wsd", "inverse_sqrt")),
        "peak": Field(float, above=0),
        # These two are of 'hybrid' and 'cosine' alone, which need them. 'hybrid': the cosine's
        # floor, not the last rate.
        "minimum": Field(float, optional=True, least=0),
        # N, the schedule's horizon; the run may end elsewhere.
        "total_steps": Field(int, optional=True, least=1),
        "warmup_steps": Field(int, least=0),
        "transition": Field(0.25, above=0, below=0.5),  # 'hybrid': the cosine's share of N
        "shift_warmup": Field(False),  # count from the end of the warmup, as stock GPT-NeoX does
        "cooldown_start": Field(int, optional=True, least=0),  # its first step; unset: none
        "cooldown_steps": Field(int, optional=True, least=1),
        # 'sqrt': first rate times 1 - sqrt(share of the cooldown done), steep at first.
        "cooldown_kind": Field("linear", choices=("linear", "sqrt", "cosine")),
        "cooldown_learning_rate": Field(float, optional=True, least=0),  # first; unset: no jump
        "cooldown_end": Field(0.0, least=0),  # learning rate at its end
    },
    "training": {
        "objective": Field("pretrain", choices=("pretrain", "sft", "dpo")),  # what it minimises
        "num_steps": Field(int, least=1),  # the run ends here
        "accumulation": Field(1, least=1),  # microbatches a step
        "dtype": Field("bfloat16", choices=("bfloat16", "float32")),  # of the matrix products
        # What backward computes again instead of keeping it.
        "remat": Field("none", choices=("none", "dots", "attention", "full")),
        "unroll": Field(1, least=1),  # layers compiled one after the other in a turn of the loop
        "attention": Field("auto", choices=_kernels("attention")),
        "cross_entropy": Field("auto", choices=_kernels("cross_entropy")),  # head and loss
        "norms": Field("xla", choices=("xla", "pallas_gpu")),  # of the layers; kernels/norms.py
        "num_valid_ids": Field(int, optional=True),  # rows of the softmax; unset: padding too
        "deterministic": Field(False),  # GPU: the same bits in every run, slower; else always so
        "log_every": Field(10, least=1),  # steps between two lines of metrics
        "layer_norms_every": Field(0, least=0),  # steps between two looks at each layer; 0: never
        "stop_after_skipped": Field(10, least=1),  # so many updates left out in a row end the run
        "hang_seconds": Field(300.0, least=0),  # leave if no step ends for so long; 0: never
        "check_replicas_every": Field(0, least=0),  # steps between two comparisons; 0: never
    },
    "dpo": {  # training.objective=dpo: direct preference optimisation
        "beta": Field(0.1, above=0),  # how dearly the model pays for leaving the reference
        "loss": Field("sigmoid", choices=("sigmoid", "ipo")),
        "label_smoothing": Field(0.0, least=0, below=0.5),  # share of preferences taken as wrong
        "length_normalised": Field(False),  # log-probabilities a token; ipo has them so always
        "sft_weight": Field(0.0, least=0),  # of the chosen answers' own loss, added
    },
    # Adapters of low rank on a model of branch.parent, whose weights stay as they are.
    "lora": {
        "rank": Field(0, least=0),  # 0: none, all weights are trained
        "alpha": Field(16.0, above=0),  # what the adapters add is multiplied by alpha / rank
        "targets": Field(("query", "key", "value", "out", "gate", "up", "down")),  # matrices
    },
    "parallel": {
        # Devices along the mesh axis `data`; -1: all that the others leave.
        "data": Field(-1, least=-1),
        "model": Field(1, least=1),  # devices along the mesh axis `model`
        "replica": Field(1, least=1),  # groups of data x model devices, each with all weights
        "target": Field(str, optional=True),  # the machine that it is for, as `plan` names it
        "zero1": Field(True),  # float32 weights and moments of the optimizer sharded over `data`
        "fsdp": Field(False),  # no device holds whole weights: a layer is gathered where used
        "float32_reduce": Field(True),  # gradients are summed in float32, not in `dtype`
    },
    "checkpoint": {
        "every": Field(1000, least=1),  # steps; the last step is always saved
        "every_minutes": Field(0.0, least=0),  # temporary ones between them, by time; 0: none
        "asynchronous": Field(True),  # files are written beside the training
        "timeout_seconds": Field(1800, least=1),  # a save that takes longer has failed
        "keep_latest": Field(3, least=1),
        "keep_every": Field(int, optional=True, least=1),  # multiples of this stay for good
        "save_initial": Field(True),  # global_step0
    },
    "evaluation": {
        "every": Field(1000, least=0),  # steps; 0: never
        "max_rows": Field(256, least=1),  # held-out rows a source
        "tasks": Field(()),  # of lm-eval, or our groups in evaluation/tasks/; needs extra `eval`
        "tasks_every": Field(0, least=0),  # steps between two evaluations on them; 0: never
        "tasks_limit": Field(500, least=0),  # items of each task, its first ones; 0: all
        "task_data": Field(""),  # made by launch/corpora/task_data.py; '': the Hugging Face Hub
    },
    "samples": {  # the last three are the model card's example
        "every": Field(1000, least=0),  # steps; 0: never
        "prompts": Field(("A short history of the bicycle:",)),
        "max_new_tokens": Field(64, least=1),
        "temperature": Field(0.7, least=0),  # 0: the likeliest token
        "top_p": Field(0.95, above=0, most=1),  # temperature 0 is the likeliest token alone
    },
    "writers": {  # beside metrics.jsonl, which is always written
        "tensorboard": Field(False),
        "wandb": Field(False),
        "wandb_project": Field("stablelm_jax"),
    },
    "report": {  # report.html, the page of the run
        "every": Field(int, optional=True, least=0),  # steps; unset: at each evaluation; 0: never
    },
    "guard": {  # against spikes of the loss
        "kind": Field("off", choices=("off", "skip", "stop")),  # skip the update, stop the run
        "sigmas": Field(6.0, above=0),  # a spike is so many standard deviations above the mean
        "window": Field(128, least=2),  # about how many steps the mean and deviation look back
    },
    "branch": {
        # A checkpoint that a new run starts from, or a run or an import: its newest; '': none.
        "parent": Field(""),
        # 'all': state and place in the data, of an import its weights; 'weights': of any parent.
        "state": Field("all", choices=("all", "weights")),
    },
    "profile": {"steps": Field("")},  # FIRST:LAST traces the updates first to last - 1; '': none
}


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every field, by name; a group without fields gives (key, {})."""
    for name in sorted(config.keys()):
        key, value = prefix + name, config[name]
        group = isinstance(value, ConfigDict | Mapping)
        if group and len(value):
            yield from flatten(value, key + ".")
        else:
            yield key, {} if group else value


# By dotted key; without the sources of `data.weights`.
FIELDS = {key: entry for key, entry in flatten(TREE) if isinstance(entry, Field)}


def default_config() -> ConfigDict:
    """The whole tree, locked but for the names of sources."""

    def values(entry):
        if not isinstance(entry, Field):
            return {name: values(part) for name, part in entry.items()}
        # A plain None could not be set by a flag.
        return placeholder(entry.default) if isinstance(entry.default, type) else entry.default

    return locked(ConfigDict(values(TREE)))


def locked(config: ConfigDict) -> ConfigDict:
    """`config` with its fields fixed, though not the names of sources."""
    config.lock()
    config.data.weights.unlock()
    return config
