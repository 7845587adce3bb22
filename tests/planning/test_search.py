"""Which ways to divide a step are tried, in which order, and which are left out; no compiler."""

import types

import jax
import pytest

from stablelm_jax import config as config_lib
from stablelm_jax import configs_folder
from stablelm_jax.planning.compile import DoesNotFit
from stablelm_jax.planning.search import candidates, divided, search
from stablelm_jax.planning.targets import parse_target

GIB = 2**30


@pytest.fixture
def config():
    return config_lib.load(configs_folder() / "stablelm_2_1_6b.py")


def key(candidate):
    layout = candidate.layout
    return layout.model, layout.fsdp, layout.remat, layout.rows


class Compiler:
    """Stands in for the target's: a step fits unless `refuses` says otherwise."""

    def __init__(self, refuses=lambda config: False):
        self.refuses = refuses
        self.configs = []

    def __call__(self, config, target):
        self.configs.append(config)
        if self.refuses(config):
            raise DoesNotFit("too much")
        return types.SimpleNamespace(collectives=[])


def run(config, target_name, compiler):
    target = parse_target(target_name)
    return list(search(config, target, candidates(config, target), compiler))


def test_rows_remat_model_and_fsdp_are_tried_in_every_combination_that_divides(config):
    found = {key(c) for c in candidates(config, parse_target("a100-40gb:64x8"))}
    # 2048 rows over 512 devices: 4 on a device, 8 where two share theirs, and so on
    for model, most in ((1, 4), (2, 8), (4, 16), (8, 32)):
        rows = {row for m, _, _, row in found if m == model}
        assert rows == {2**i for i in range(10) if 2**i <= most}
    assert {remat for _, _, remat, _ in found} == {"none", "dots", "attention", "full"}
    assert (1, True, "dots", 4) in found and (1, True, "none", 4) not in found


def test_sizes_of_model_divide_heads_and_stay_in_a_host(config):
    def sizes(target):
        return {key(c)[0] for c in candidates(config, parse_target(target))}

    assert sizes("v5p:4x4x4") == {1, 2, 4}  # hosts of 4
    config_lib.set_value(config, "model.num_kv_heads", 2)
    assert sizes("h100:1x8") == {1, 2}


def test_fsdp_is_not_tried_on_one_device_nor_without_zero1(config):
    assert not any(c.layout.fsdp for c in candidates(config, parse_target("h200:1x1")))
    config.parallel.zero1 = False
    assert not any(c.layout.fsdp for c in candidates(config, parse_target("h200:1x8")))


def test_the_least_estimated_time_comes_first(config):
    times = [c.expected.total for c in candidates(config, parse_target("h100:8x8"))]
    assert times == sorted(times) and times[0] < times[-1]


def test_a_batch_that_no_mesh_divides_is_refused(config):
    with pytest.raises(config_lib.ConfigError, match="config.data.batch_size=2048: does not"):
        candidates(config, parse_target("h100:1x7"))


def test_what_cannot_fit_by_its_shapes_is_never_compiled(config):
    target = parse_target("h200:1x1")
    ordered = candidates(config, target)
    hopeless = {key(c) for c in ordered if c.needed > target.available_bytes}
    outcomes = run(config, "h200:1x1", Compiler(lambda config: True))
    assert hopeless and not hopeless & {key(o.candidate) for o in outcomes}


def test_what_needs_more_than_something_that_did_not_fit_is_not_compiled(config):
    tried = [key(o.candidate) for o in run(config, "h200:1x8", Compiler(lambda config: True))]
    order = ("full", "attention", "dots", "none")
    for i, (model, fsdp, remat, rows) in enumerate(tried):
        for other_model, other_fsdp, other_remat, other_rows in tried[i + 1 :]:
            more = other_rows >= rows and order.index(other_remat) >= order.index(remat)
            assert not (more and (model, fsdp) == (other_model, other_fsdp))
    assert (1, False, "full", 1) in tried  # the smallest is given its chance


def test_fewer_rows_than_what_fits_are_not_compiled(config):
    few = lambda config: config.training.accumulation < 64  # noqa: E731
    outcomes = run(config, "h200:1x8", Compiler(few))
    for model in (1, 2):
        rows = [
            o.candidate.layout.rows
            for o in outcomes
            if o.time and key(o.candidate)[:3] == (model, False, "none")
        ]
        assert rows == [4 * model]  # 2048 rows over 8 devices in 64 microbatches


def test_what_is_far_behind_the_best_is_not_compiled(config):
    outcomes = run(config, "a100-40gb:64x8", Compiler())
    best = min(o.time.total for o in outcomes)
    assert all(o.candidate.expected.total <= 1.5 * best for o in outcomes)
    everything = candidates(config, parse_target("a100-40gb:64x8"))
    assert max(c.expected.total for c in everything) > 1.5 * best


def test_an_error_of_the_compiler_ends_no_sweep_and_says_nothing_of_memory(config):
    first = []

    def refuses(config):
        if not first:
            first.append(config)
            raise jax.errors.JaxRuntimeError("INTERNAL: no such layout\nmore")
        return False

    outcomes = run(config, "h200:1x1", Compiler(refuses))
    assert outcomes[0].problem == "INTERNAL: no such layout" and not outcomes[0].too_large
    assert outcomes[1].time  # more rows of the same would have been left out if it were


def test_what_is_compiled_is_the_config_divided_as_the_candidate_says(config):
    compiler = Compiler()
    outcomes = run(config, "h100:2x8", compiler)
    for outcome, compiled in zip(outcomes, compiler.configs, strict=True):
        layout = outcome.candidate.layout
        assert compiled.training.remat == layout.remat
        assert compiled.parallel.model == layout.model and compiled.parallel.fsdp == layout.fsdp
        data = 16 // layout.model
        assert layout.rows * compiled.training.accumulation * data == 2048
    assert config.parallel.model == 1  # the config given stays as it is


def test_a_division_is_applied_to_a_copy(config):
    changed = divided(config, {"parallel.model": 4})
    assert (changed.parallel.model, config.parallel.model) == (4, 1)
