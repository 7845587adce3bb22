"""The tiles of BLOCKS as NVIDIA's compiler makes them: what would make them slow on a chip."""

from functools import cache
from pathlib import Path

import pytest

from stablelm_jax.kernels.attention_gpu import BLOCKS
from stablelm_jax.planning.targets import parse_target

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TARGETS = {"sm80": "a100-40gb:1x1", "sm90": "h100:1x1"}

# By generation and head size, for the forward kernel, key gradients and the query gradient: most
# instructions a score in tiles without a mask (jax 0.12 has some more than 0.10), and thread blocks
# that a core must hold.
EXPECTED = {
    ("sm80", 64): ((10.3, 14.0, 10.7), (2, 2, 2)),
    ("sm80", 80): ((11.8, 17.5, 12.1), (2, 2, 2)),
    ("sm80", 128): ((18.6, 24.2, 15.8), (2, 1, 1)),
    ("sm80", 160): ((19.3, 29.4, 22.6), (1, 2, 1)),
    ("sm90", 64): ((8.0, 11.2, 8.9), (2, 2, 2)),
    ("sm90", 80): ((11.6, 13.2, 10.8), (2, 2, 2)),
    ("sm90", 128): ((11.9, 12.6, 10.3), (1, 1, 1)),
    ("sm90", 160): ((14.0, 15.5, 12.4), (1, 1, 1)),
}
# There is no room for them; two blocks a core have something to do while one waits.
WITHOUT_LOADS_AHEAD = ("sm80", 160, "attention_key_gradients")
# Beside other tests two compilations are all there is time for.
ROWS = [
    pytest.param(*row, marks=() if row[1] == 64 else pytest.mark.by_hand, id=f"{row[0]} {row[1]}")
    for row in EXPECTED
]

pytestmark = pytest.mark.aot


@cache
def compiled(generation, size):
    """By kernel what was made of it, and the scores of a thread and tile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import attention_bound
        import sass
    if sass.tool("nvdisasm") is None:
        pytest.skip("nvdisasm is not installed (extra aot: launch/test.sh --all)")
    kernels = attention_bound.compiled(TARGETS[generation], size)
    products = {name: products for name, (_, products) in attention_bound.KERNELS.items()}
    return {name: (kernels[name], kernels[name].scores(products[name], size)) for name in products}


def test_every_tile_of_the_table_has_a_budget():
    assert set(EXPECTED) == {(name, size) for name, sizes in BLOCKS.items() for size in sizes}


@pytest.mark.parametrize("generation, size", ROWS)
def test_a_table_row_spills_little_loads_ahead_and_keeps_to_its_budget(generation, size):
    facts = parse_target(TARGETS[generation]).facts
    found = compiled(generation, size)
    for name, budget, blocks in zip(found, *EXPECTED[generation, size]):
        kernel, scores = found[name]
        assert kernel.spills <= 100 and kernel.count("STL", "LDL") == 0, name
        assert kernel.shared <= facts["shared_kib_per_block"] << 10, name
        assert kernel.blocks_a_core(facts) >= blocks, name
        assert not kernel.serialised, name
        assert "n16 ss" not in kernel.shapes, name  # waits for shared memory longer than it works
        assert kernel.loads_ahead > 0 or (generation, size, name) == WITHOUT_LOADS_AHEAD, name
        assert kernel.count() / scores <= budget, name


@pytest.mark.parametrize("generation, size", ROWS)
def test_a_score_takes_one_multiply_add_and_one_exponential_and_is_not_compared(generation, size):
    for name, (kernel, scores) in compiled(generation, size).items():
        # Forward a row's sums shrink as its maximum grows: one more, in each of its four threads.
        rows = 4 / BLOCKS[generation][size].forward.keys if name == "attention_forward" else 0
        most = (1 + rows) * scores
        for instruction in ("FFMA", "MUFU"):
            assert scores <= kernel.count(instruction) <= most, (name, instruction)
        assert kernel.count("FSETP", "FSEL") == 0, name
