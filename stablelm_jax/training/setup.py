"""From a config to everything the loop needs, decided once and said aloud."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.data.batches import BatchSpec, held_out_batches, train_batches
from stablelm_jax.data.manifest import Source, SourceManifest, data_hash, open_sources
from stablelm_jax.data.mixture import Mixture
from stablelm_jax.data.shard_cache import ShardCache
from stablelm_jax.kernels.attention import choose
from stablelm_jax.kernels.check import check_attention
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.optimizer.adamw import make_optimizer
from stablelm_jax.optimizer.schedule import make_schedule
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer
from stablelm_jax.training.data_position import DataPosition
from stablelm_jax.training.held_out import EvalStep, HeldOut, make_eval_step
from stablelm_jax.training.state import TrainState, abstract_state
from stablelm_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything about a run that does not change while it trains."""

    config: ConfigDict
    model: ModelConfig
    mesh: Mesh
    tokenizer: Tokenizer
    sources: Mapping[str, Source]
    origin: DataPosition
    mixture: Mixture
    spec: BatchSpec
    optimizer: optax.GradientTransformation
    abstract: TrainState
    eval_step: EvalStep

    @property
    def dtype(self) -> Any:
        """The compute type."""
        return jnp.dtype(self.config.training.dtype)

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
        return {
            "model_config": dataclasses.asdict(self.model),
            "tokenizer_sha256": self.tokenizer.sha256,
            "data_hash": data_hash(self.manifests),
            "source_hashes": {name: data_hash({name: m}) for name, m in self.manifests.items()},
            "row_order": {
                "seed": self.spec.seed,
                "sequence_length": self.spec.sequence_length,
                "loss_on_first_token": self.spec.loss_on_first_token,
                "stages": [list(span) for span in self.mixture.spans()],
            },
        }

    def last_row(self) -> int:
        """The row after the last one that the run consumes."""
        return self.origin.first_row(self.config.training.num_steps, self.spec.batch_size)

    def tokens_by_source(self, rows: int) -> dict[str, int]:
        """The ledger: tokens each source has given in the first `rows` rows of the mixture."""
        seen = self.mixture.rows_before(rows)
        return {name: int(n) * self.spec.sequence_length for name, n in zip(self.sources, seen)}

    def batches(self, start_row: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's share of each batch from row `start_row` on."""
        return train_batches(
            self.sources,
            self.mixture,
            self.spec,
            start_row=start_row,
            process_index=self.share[0],
            process_count=self.share[1],
            prefetch=self.config.data.prefetch_batches,
        )

    def held_out(self) -> dict[str, HeldOut]:
        """The held-out text of each source."""
        return {name: self._held_out(name) for name in self.sources}

    def _held_out(self, name: str) -> HeldOut:
        manifest = self.manifests[name]
        languages, part = manifest.languages, manifest.held_out
        language = languages[0] if len(languages) == 1 else None
        return HeldOut(self._held_out_batches(name), part.tokens / part.text_bytes, language)

    def _held_out_batches(self, name: str) -> Iterator[dict[str, np.ndarray]]:
        """Opens the shards when the first batch is asked for, so that all errors are met there."""
        index, count = self.share
        yield from held_out_batches(
            self.sources,
            name,
            self.spec,
            max_rows=self.config.evaluation.max_rows,
            process_index=index,
            process_count=count,
        )

    def check_attention(self) -> str:
        """Says which attention runs here and why; a kernel is first tried out on this device.

        Raises:
          WrongKernel: its results are not right.
        """
        device = jax.local_devices()[0]
        name, why = attention_for(self.config, device)
        if device.platform == "cpu":
            return f"attention: {name} ({why})"
        sizes = self.model
        error = check_attention(
            name, sizes.num_heads, sizes.num_kv_heads, sizes.head_size, self.dtype
        )
        return (
            f"attention: {name} ({why}); tried out here, it errs {error:.2f} times the plain form"
        )

    def compile_eval(self) -> EvalStep:
        """The evaluation's step, compiled ahead."""
        batch = abstract_batch(self.config, self.mesh)
        return self.eval_step.lower(self.abstract.params, batch).compile()

    def prepare_samples(self) -> Callable[[Any], dict[str, str]]:
        """f(params) -> {prompt: continuation} of the group `samples`, compiled ahead."""
        from stablelm_jax.generation.text import prepare_texts

        settings = self.config.samples
        return prepare_texts(
            self.model,
            self.abstract.params,
            self.tokenizer,
            settings.prompts,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=self.config.seed,
            dtype=self.dtype,
            num_valid_ids=self.config.training.num_valid_ids,
        )

    def compile_step(self) -> Any:
        """The train step, compiled ahead for this run's shapes."""
        return lower_step(self.config, self.mesh, len(self.sources)).compile()


def lower_step(config: ConfigDict, mesh: Mesh, num_sources: int) -> jax.stages.Lowered:
    """The train step of `config` for the devices of `mesh`, here or elsewhere, not yet compiled."""
    model, parallel, training = (
        config_lib.model_config(config),
        config.parallel,
        config.training,
    )
    schedule = make_schedule(config.schedule)
    optimizer = make_optimizer(config.optimizer, schedule, model)
    abstract = abstract_state(model, optimizer, mesh, parallel.zero1)
    step = make_train_step(
        model,
        optimizer,
        schedule,
        mesh,
        abstract,
        num_sources=num_sources,
        zero1=parallel.zero1,
        fsdp=parallel.fsdp,
        float32_reduce=parallel.float32_reduce,
        unroll=training.unroll,
        accumulation=training.accumulation,
        dtype=jnp.dtype(training.dtype),
        remat=training.remat,
        attention=training.attention,
        cross_entropy=training.cross_entropy,
        num_valid_ids=training.num_valid_ids,
        guard={**config.guard, "stop_after": training.stop_after_skipped},
    )
    return step.lower(abstract, abstract_batch(config, mesh))


def attention_for(config: ConfigDict, device: Any) -> tuple[str, str]:
    """The attention that `config` runs on a kind of device, and why, for a person."""
    if config.training.attention != "auto":
        return config.training.attention, "as the config says"
    sizes, dtype = config_lib.model_config(config), jnp.dtype(config.training.dtype)
    q, k = (
        jax.ShapeDtypeStruct((1, config.data.sequence_length, heads, sizes.head_size), dtype)
        for heads in (sizes.num_heads, sizes.num_kv_heads)
    )
    return choose(device, q, k)


def abstract_batch(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Contract 1's arrays with their shardings."""
    rows, length = config.data.batch_size, config.data.sequence_length
    place = sharding.batch_sharding(mesh)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    return {
        "tokens": array(jnp.int32, rows, length),
        "targets": array(jnp.int32, rows, length),
        "segment_ids": array(jnp.int32, rows, length),
        "positions": array(jnp.int32, rows, length),
        "loss_mask": array(jnp.float32, rows, length),
        "source_ids": array(jnp.int32, rows),
    }


def prepare_run(config: ConfigDict, origin: DataPosition | None = None) -> Run:
    """Checks the config against devices and data; touches no accelerator memory.

    `origin`: of a run that has begun; by default that of one which has not.

    Raises:
      ValueError: with what is wrong, where, and what to do.
    """
    config_lib.validate(config)
    sizes = config_lib.validate_mesh(config, jax.device_count())
    model = config_lib.model_config(config)
    mesh = make_mesh(**sizes)
    tokenizer = load_tokenizer(config.data.tokenizer)
    origin = DataPosition.of_config(config) if origin is None else origin
    mixture = origin.mixture(config)
    sources = open_data(config, tokenizer, mixture.sources)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.schedule), model)
    return Run(
        config=config,
        model=model,
        mesh=mesh,
        tokenizer=tokenizer,
        sources=sources,
        origin=origin,
        mixture=mixture,
        spec=batch_spec(config, tokenizer),
        optimizer=optimizer,
        abstract=abstract_state(model, optimizer, mesh, config.parallel.zero1),
        eval_step=make_eval_step(
            model,
            mesh,
            num_sources=len(sources),
            dtype=jnp.dtype(config.training.dtype),
            attention=config.training.attention,
            cross_entropy=config.training.cross_entropy,
            num_valid_ids=config.training.num_valid_ids,
        ),
    )


def _all_weights(config: ConfigDict) -> Iterator[tuple[str, float]]:
    for _, weights in [(0, config_lib.mixture_weights(config)), *config_lib.mixture_stages(config)]:
        yield from weights.items()


def open_data(config: ConfigDict, tokenizer: Tokenizer, names: Iterable[str]) -> dict[str, Source]:
    """The sources of these names, as the config says where they lie.

    Raises:
      ValueError: one of them is not as it should be.
    """
    data = config.data
    cache = ShardCache(data.cache, 1e9 * data.cache_gb)
    return open_sources(data.root, names, tokenizer_sha256=tokenizer.sha256, cache=cache)


def fingerprints(config: ConfigDict) -> dict[str, str]:
    """What every process of a run must share: config, code and data, each as a hash.

    Where the data lies may differ from host to host.

    Raises:
      ValueError: the data is not as the config says.
    """
    values = dict(config_lib.flatten(config))
    places = ("data.root", "data.cache", "data.cache_gb", "data.tokenizer", "evaluation.task_data")
    for key in places:
        del values[key]
    tokenizer = load_tokenizer(config.data.tokenizer)
    names = {name for name, weight in _all_weights(config) if weight}
    sources = open_data(config, tokenizer, names)
    manifests = {name: source.manifest for name, source in sources.items()}
    return {
        "config": hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest(),
        "code": code_hash(),
        "data": data_hash(manifests) + tokenizer.sha256,
    }


def code_hash() -> str:
    """Of the package's Python files and the version of jax."""
    digest = hashlib.sha256(jax.__version__.encode())
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def batch_spec(config: ConfigDict, tokenizer: Tokenizer) -> BatchSpec:
    """Shape and order of the batches."""
    return BatchSpec(
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
        seed=config.seed,
        eod=tokenizer.eod,
        loss_on_first_token=config.data.loss_on_first_token,
    )
