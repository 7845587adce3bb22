"""The 1.6B's programs, two layers of them, compiled for chips that are not here (extra `aot`)."""

import dataclasses
import re

import jax
import pytest

from stablelm_jax.generation.generator import Generator
from stablelm_jax.model.config import STABLELM_2_1_6B
from stablelm_jax.model.parameters import nest, parameter_table
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.planning.targets import parse_target

pytestmark = pytest.mark.aot

MODEL = dataclasses.replace(STABLELM_2_1_6B, num_layers=2)
BATCH, CONTEXT, NEW, SLOTS = 8, 1000, 200, 1280


def writing_program(target, model_axis=1):
    """The program that writes tokens, compiled; and the bytes of the cache on a device."""
    mesh = make_mesh(1, model_axis, parse_target(target).devices()[:model_axis])
    table = parameter_table(MODEL)
    places = sharding.named(mesh, sharding.parameter_specs(table))
    shapes = nest({row.name: jax.ShapeDtypeStruct(row.shape, "float32") for row in table})
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )
    sizes = {"batch_size": BATCH, "max_length": CONTEXT + NEW}
    generator = Generator(MODEL, params, **sizes)
    generator.compile([[1] * CONTEXT], max_new_tokens=NEW)
    heads = MODEL.num_kv_heads // model_axis
    cache = 2 * 2 * MODEL.num_layers * BATCH * heads * SLOTS * MODEL.head_size
    _, following = generator._compiled.values()
    return following, cache


def copies_of_the_cache_in_the_loop(text, heads):
    """Instructions that do nothing but copy keys or values, in what a token runs."""
    body = re.search(r"while\(.*body=%?([\w.\-]+)", text)[1]
    lines = re.search(rf"^%?{re.escape(body)} \(.*?^}}", text, re.MULTILINE | re.DOTALL)[0]
    shape = rf"bf16\[{BATCH},{heads},{SLOTS},{MODEL.head_size}\]"
    return re.findall(rf"{shape}\S* (?:copy|copy-start|transpose)\(.*", lines)


def test_on_an_h200_a_token_copies_neither_cache_nor_weights():
    program, cache = writing_program("h200:1x1")
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= cache  # the cache is written in place
    assert memory.temp_size_in_bytes < 0.05 * cache
    text = program.as_text()
    assert not copies_of_the_cache_in_the_loop(text, MODEL.num_kv_heads)
    assert '"known_trip_count":{"n":"32"}' in text  # else the host would be asked at every token
    # matrices of bfloat16 that a step would write: none
    width, wide = MODEL.width, MODEL.feed_forward_width
    assert not re.search(rf"= bf16\[(1,)?{width},{wide}\]\S* fusion\(", text)


@pytest.mark.by_hand
def test_on_four_tpus_heads_are_split_and_a_token_copies_no_cache():
    program, cache = writing_program("v5e:2x2", model_axis=4)
    memory = program.memory_analysis()
    assert cache <= memory.alias_size_in_bytes < 1.1 * cache
    # once a chunk the cache is laid out as the loop wants it, heads of 64 padded to 128, and back
    assert memory.temp_size_in_bytes < 2.5 * cache
    assert not copies_of_the_cache_in_the_loop(program.as_text(), MODEL.num_kv_heads // 4)
