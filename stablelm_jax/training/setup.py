"""From a config to everything the loop needs, decided once and said aloud."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint.saved_model import saved_chat
from stablelm_jax.data.batches import BatchSpec, held_out_batches, packed_batches, train_batches
from stablelm_jax.data.fingerprints import check_whole, shard_samples
from stablelm_jax.data.manifest import Source, SourceManifest, data_hash, open_sources
from stablelm_jax.data.mixture import Mixture
from stablelm_jax.data.packing import PackedSources
from stablelm_jax.data.position import DataPosition
from stablelm_jax.data.rows import token_stream
from stablelm_jax.data.shard_cache import ShardCache
from stablelm_jax.data.skipping import LeftOut, open_skip
from stablelm_jax.model.compute import Compute
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.lora import Lora
from stablelm_jax.model.parameters import ParameterSpec, parameter_table
from stablelm_jax.optimizer.kinds import make_optimizer
from stablelm_jax.optimizer.parts import Optimizer
from stablelm_jax.optimizer.schedule import make_schedule
from stablelm_jax.parallel import distributed, sharding
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.tokenizer.chat import ChatTemplate
from stablelm_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer
from stablelm_jax.training.held_out import EvalStep, HeldOut, make_eval_step
from stablelm_jax.training.objectives import KINDS, Objective, make_objective
from stablelm_jax.training.reference import Reference
from stablelm_jax.training.state import TrainState, abstract_frozen, abstract_state

# Fields of a `BatchSpec` that the order of rows follows from.
ORDER = ("seed", "sequence_length", "loss_on_first_token", "packing", "loss_on")


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything about a run that does not change while it trains."""

    config: ConfigDict
    model: ModelConfig
    mesh: Mesh
    tokenizer: Tokenizer
    sources: Mapping[str, Source]
    data_position: DataPosition
    mixture: Mixture
    spec: BatchSpec
    packed: PackedSources | None  # None where rows are concatenated
    left_out: Mapping[str, LeftOut]  # by `data.skip`
    optimizer: Optimizer
    compute: Compute
    abstract: TrainState
    lora: Lora | None = None
    chat: ChatTemplate | None = None  # of its conversations, or what its parent was tuned on

    def joined(self, state: TrainState) -> Any:
        """The weights of a forward pass; adapters lie beside them, as `Lora.join` puts them."""
        return self.lora.join(state.frozen, state.params) if self.lora else state.params

    @property
    def objective(self) -> Objective:
        """What the run minimises."""
        return make_objective(self.config, len(self.sources))

    @property
    def num_pairs(self) -> int | None:
        """The most preference pairs that a row of the run holds."""
        return None if self.packed is None else self.packed.most_pairs

    @functools.cached_property
    def reference(self) -> Reference | None:
        """What DPO compares with: empty until `prepare_reference` has filled it."""
        if self.objective.name != "dpo":
            return None
        identity, order = self.identity(), self.identity()["row_order"]
        key = {
            "parent": self.data_position.parent_hash,
            "data": identity["source_hashes"],
            "templates": {name: dict(m.chat) for name, m in self.manifests.items()},
            **{name: order[name] for name in ("sequence_length", "packing", "loss_on")},
            "dtype": self.config.training.dtype,
            "num_valid_ids": self.config.training.num_valid_ids,
            "model": identity["model_config"],
        }
        pairs = {name: len(rows.lengths) for name, rows in self.packed.items() if rows.trained}
        return Reference(pairs, key)

    @functools.cached_property
    def eval_step(self) -> EvalStep:
        """Sums over one batch of held-out text; compiled when first called."""
        return make_eval_step(
            self.model,
            self.mesh,
            self.objective,
            eod=self.tokenizer.eod,
            packed=self.packed is not None,
            compute=self.compute,
        )

    @property
    def manifests(self) -> dict[str, SourceManifest]:
        """The manifest of each source."""
        return {name: source.manifest for name, source in self.sources.items()}

    @property
    def share(self) -> tuple[int, int]:
        """(index, count): which part of each batch this process feeds."""
        return sharding.process_share(self.mesh, self.spec.batch_size)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with this run to be continued by it."""
        lora = {"lora": self.lora.to_json()} if self.lora else {}
        return lora | {
            "model_config": dataclasses.asdict(self.model),
            "optimizer": {"kind": self.config.optimizer.kind},
            "tokenizer_sha256": self.tokenizer.sha256,
            "data_hash": data_hash(self.manifests),
            "source_hashes": {name: data_hash({name: m}) for name, m in self.manifests.items()},
            "row_order": {name: getattr(self.spec, name) for name in ORDER}
            | {"stages": [list(span) for span in self.mixture.spans]},
        }

    @property
    def tokens_per_epoch(self) -> dict[str, int]:
        """Tokens that each source gives before it begins anew; of packed rows, all their places."""
        if self.packed is None:
            return {name: manifest.train.tokens for name, manifest in self.manifests.items()}
        length = self.spec.sequence_length
        return {name: length * len(self.packed[name, "train"]) for name in self.sources}

    @functools.cached_property
    def batch_sizes(self) -> list[tuple[int, int]]:
        """(step, rows): from which step on a batch has so many."""
        return config_lib.batch_sizes(self.config)

    @functools.cached_property
    def sequence_lengths(self) -> list[tuple[int, int]]:
        """(step, tokens): from which step on rows are cut so short."""
        return config_lib.sequence_lengths(self.config)

    def pieces(self, step: int) -> int:
        """Into how many each row of a step is cut."""
        return self.spec.sequence_length // config_lib.at_step(self.sequence_lengths, step)

    def first_row(self, step: int) -> int:
        """The row of the mixture that step `step`, from 0, begins with."""
        return self.data_position.first_row(step, self.batch_sizes)

    def tokens_by_source(self, rows: int) -> dict[str, int]:
        """Tokens that each source has in the first `rows` rows of the mixture, left out or not."""
        seen = self.mixture.rows_before(rows)
        return {name: int(n) * self.spec.sequence_length for name, n in zip(self.sources, seen)}

    def left_out_tokens(self, first: int, last: int) -> dict[str, int]:
        """How many of these `data.skip` leaves out of the rows [first, last) of the mixture."""
        spans = zip(self.sources, self.mixture.rows_before(first), self.mixture.rows_before(last))
        kept = {name: range(*span) for name, *span in spans if name in self.left_out}
        return {name: self.left_out[name].tokens(drawn) for name, drawn in kept.items()}

    def batches(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's share of each batch from step `step` on, for DPO with "reference"."""
        batches = train_batches(
            self.sources,
            self.mixture,
            self.spec,
            first_row=lambda n: self.first_row(step + n),
            pieces=lambda n: self.pieces(step + n),
            share=self.share,
            prefetch=self.config.data.prefetch_batches,
            packed=self.packed,
            left_out=self.left_out,
        )
        return batches if self.reference is None else self.reference.joined(batches, "train")

    def held_out(self) -> dict[str, HeldOut]:
        """The held-out text of each source."""
        found = {}
        for name, manifest in self.manifests.items():
            language = manifest.languages[0] if len(manifest.languages) == 1 else None
            part, is_text = manifest.held_out, manifest.kind == "text"
            ratio = part.tokens / part.text_bytes if is_text else math.nan
            found[name] = HeldOut(self._held_out_batches(name), ratio, language)
        return found

    def packed_batches(
        self, name: str, split: str, max_rows: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """This process's share of the batches that hold each packed row of a split once."""
        return packed_batches(
            self.packed, name, split, self.spec, max_rows=max_rows, share=self.share
        )

    def _held_out_batches(self, name: str) -> Iterator[dict[str, np.ndarray]]:
        """Opens the shards when the first batch is asked for, so that all errors are met there."""
        how = {"max_rows": self.config.evaluation.max_rows, "share": self.share}
        if self.packed is None:
            batches = held_out_batches(self.sources, name, self.spec, **how)
        else:
            batches = packed_batches(self.packed, name, "held_out", self.spec, **how)
        yield from self.reference.joined(batches, "held_out") if self.reference else batches


def prepare_run(
    config: ConfigDict,
    data_position: DataPosition = DataPosition(),
    saved: Mapping[str, Any] = MappingProxyType({}),
) -> Run:
    """Checks the config against devices and data; touches no accelerator memory.

    `data_position`: of a run that has begun, or of a branch. `saved`: the item `run` of the
    checkpoint that it goes on from. ValueError: what is wrong, where, and what to do.
    """
    config_lib.validate(config)
    sizes = config_lib.validate_mesh(config, jax.device_count())
    model = config_lib.model_config(config)
    mesh = make_mesh(**sizes)
    tokenizer = load_tokenizer(config.data.tokenizer)
    mixture = mixture_of(config, data_position)
    optimizer, abstract = optimizer_and_state(config, mesh)
    sources = open_data(config, tokenizer, mixture.sources)
    _check_kinds(config, sources)
    spec = spec_of(config, tokenizer)
    packed = pack(sources, spec, held_out=config.evaluation.every > 0)
    return Run(
        config=config,
        model=model,
        mesh=mesh,
        tokenizer=tokenizer,
        sources=sources,
        data_position=data_position,
        mixture=mixture,
        spec=spec,
        packed=packed,
        left_out=left_out_of(config, sources, spec, packed),
        optimizer=optimizer,
        compute=compute_of(config),
        abstract=abstract,
        lora=lora_of(config),
        chat=_chat_of(sources) or saved_chat(saved, tokenizer),
    )


def _check_kinds(config: ConfigDict, sources: Mapping[str, Source]) -> None:
    """Each objective has kinds of source that it can be trained on."""
    objective = config.training.objective
    for name, source in sources.items():
        kind = source.manifest.kind
        if kind not in KINDS[objective]:
            fits = next(other for other, kinds in KINDS.items() if kind in kinds)
            raise config_lib.ConfigError(
                f"config.training.objective={objective}: source {name!r} holds {kind}, which are "
                f"for --config.training.objective={fits}; use that, or other sources"
            )


def lora_of(config: ConfigDict) -> Lora | None:
    """The adapters that a run of `config` trains; None where it trains all weights."""
    return Lora.from_json(config.lora) if config.lora.rank else None


def trained_table(config: ConfigDict) -> tuple[ParameterSpec, ...]:
    """What a run of `config` trains: adapters, or all parameters."""
    model, lora = config_lib.model_config(config), lora_of(config)
    return lora.table(model) if lora else parameter_table(model)


def optimizer_and_state(config: ConfigDict, mesh: Mesh) -> tuple[Optimizer, TrainState]:
    """The optimizer of a run of `config`, and its state as `abstract_state` gives it."""
    model, parallel, lora = config_lib.model_config(config), config.parallel, lora_of(config)
    table = trained_table(config)
    optimizer = make_optimizer(
        config.optimizer,
        make_schedule(config.schedule),
        table,
        on_whole_layers=sharding.layers_apart(table, mesh, parallel.zero1),
    )
    frozen = lora and abstract_frozen(model, mesh, compute_of(config).dtype, parallel.fsdp)
    return optimizer, abstract_state(model, optimizer, mesh, parallel.zero1, lora, frozen)


def _chat_of(sources: Mapping[str, Source]) -> ChatTemplate | None:
    """The template of all sources that hold conversations; ConfigError where they have several."""
    chats = {name: source.manifest.chat for name, source in sources.items()}
    templates = {name: ChatTemplate.from_json(chat) for name, chat in chats.items() if chat}
    if len(set(templates.values())) > 1:
        found = ", ".join(f"{name} in {template.name}" for name, template in templates.items())
        raise config_lib.ConfigError(
            f"config.data.weights: the sources hold conversations in several chat templates "
            f"({found}), and a model is tuned on one; prepare them all with the same"
        )
    return next(iter(templates.values()), None)


def spec_of(config: ConfigDict, tokenizer: Tokenizer) -> BatchSpec:
    """What the batches of a run of `config` look like."""
    fields = {name: config.data[name] for name in ("batch_size", *ORDER) if name != "seed"}
    return BatchSpec(seed=config.seed, eod=tokenizer.eod, **fields)


def pack(sources: Mapping[str, Source], spec: BatchSpec, held_out: bool) -> PackedSources | None:
    """The sources as packed rows; None where they are concatenated.

    Raises ValueError where they cannot be trained on so, or none can (if `held_out`: be scored).
    """
    if spec.packing == "concatenate":
        for name, source in sources.items():
            if (kind := source.manifest.kind) != "text":
                raise config_lib.ConfigError(
                    f"config.data.packing=concatenate: source {name!r} holds {kind}, which would be"
                    " cut, and see one another; use --config.data.packing=best_fit"
                )
        return None
    packed = PackedSources(sources, spec)
    for (name, split), rows in packed.items():
        if not rows.trained and (held_out or split == "train"):
            raise ValueError(
                f"{sources[name].directory}: no {split} token counts in {len(rows)} packed rows;"
                " prepare the source again, with more in it, or leave it out of data.weights"
            )
    return packed


def left_out_of(
    config: ConfigDict, sources: Mapping[str, Source], spec: BatchSpec, packed: PackedSources | None
) -> dict[str, LeftOut]:
    """What `data.skip` leaves out of each source; ConfigError: something that is not there."""
    skip, length = config.data.skip, spec.sequence_length
    try:
        return open_skip(skip, sources, length, spec.seed, packed)
    except ValueError as error:
        raise config_lib.ConfigError(f"config.data.skip={skip!r}: {error}") from error


def mixture_of(config: ConfigDict, data_position: DataPosition) -> Mixture:
    """The mixture of a whole run of `config`."""
    weights, stages = config_lib.mixture_weights(config), config_lib.mixture_stages(config)
    return data_position.mixture(weights, stages, config_lib.batch_sizes(config))


def compute_of(config: ConfigDict) -> Compute:
    """How the forward passes of a run are computed."""
    values = {field.name: config.training[field.name] for field in dataclasses.fields(Compute)}
    return Compute(**values | {"dtype": jnp.dtype(config.training.dtype)})


def open_data(config: ConfigDict, tokenizer: Tokenizer, names: Iterable[str]) -> dict[str, Source]:
    """The sources of these names; ValueError where one of them is not as it should be."""
    data = config.data
    cache = ShardCache(data.cache, 1e9 * data.cache_gb)
    return open_sources(data.root, names, tokenizer=tokenizer, cache=cache)


def fingerprints(config: ConfigDict) -> dict[str, dict[str, str]]:
    """What every process of a run must share besides its data: config and code, by part."""
    # Where the data lies may differ from host to host.
    places = ("data.root", "data.cache", "data.cache_gb", "data.tokenizer", "evaluation.task_data")
    values = {k: repr(value) for k, value in config_lib.flatten(config) if k not in places}
    package, code = Path(__file__).parents[1], {"jax": jax.__version__}
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        code[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"config": values, "code": code}


def _document_ends(sources: Mapping[str, Source]) -> dict[str, str]:
    """{"<source>/<split>, ends of documents": their hash}: packed rows follow from them."""
    found = {}
    for name, split in itertools.product(sources, ("train", "held_out")):
        offsets = token_stream(sources[name], split).document_offsets()
        digest = hashlib.sha256(offsets.tobytes()).hexdigest()[:16]
        found[f"{name}/{split}, ends of documents"] = digest
    return found


def check_data(config: ConfigDict) -> None:
    """Compares the data of all processes: their manifests, and blocks of every shard.

    The MeetingError, on all, says which of them has other data, and where.
    """
    with distributed.together_or_not():
        tokenizer = load_tokenizer(config.data.tokenizer)
        names = mixture_of(config, DataPosition()).sources
        sources = open_sources(config.data.root, names, tokenizer=tokenizer)
        mine = {"tokenizer": tokenizer.sha256} | shard_samples(sources)
        if config.data.packing != "concatenate":
            mine |= _document_ends(sources)
    digest = hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest()
    if len(set(distributed.gathered(digest))) == 1:
        return
    first, *others = distributed.gathered(mine)
    differ = {str(n): config_lib.differing(first, other) for n, other in enumerate(others, 1)}
    who = ", ".join(index for index, parts in differ.items() if parts)
    parts = sorted(set().union(*differ.values()))[:3]
    with distributed.together_or_not():
        check_whole(sources, parts)
    raise distributed.MeetingError(
        f"data differs: process(es) {who} not as process 0; give every host the same "
        f"data ({', '.join(parts)})"
    )
