import pytest

from stablelm_jax.parallel.chips import peak_flops
from stablelm_jax.planning.targets import CompilerError, TargetError, chips, parse_target


@pytest.mark.parametrize(
    "text, devices, hosts",
    [
        ("v4:4x8x8", 256, 64),
        ("v5e:16x16", 256, 64),
        ("v5p:4x4x4", 64, 16),
        ("a100-40gb:64x8", 512, 64),
        ("h200:1x1", 1, 1),
    ],
)
def test_a_name_gives_chips_and_hosts(text, devices, hosts):
    target = parse_target(text)
    assert (target.num_devices, target.num_hosts, str(target)) == (devices, hosts, text)


@pytest.mark.parametrize(
    "text, said",
    [
        ("v3:4x4", "no chip 'v3'; known are a100-40gb,"),
        ("v5p:4x4", "v5p needs 3 sizes, as in v5p:4x4x4"),
        ("h100:8", "h100 needs 2 sizes, as in h100:64x8"),
        ("h100:0x8", "h100 needs 2 sizes"),
        ("h100", "h100 needs 2 sizes"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused_with_what_there_is(text, said):
    with pytest.raises(TargetError, match=said):
        parse_target(text)


def test_every_chip_says_where_its_figures_come_from():
    for facts in chips().values():
        assert facts["source"] and facts["memory_gib"] > 0 and peak_flops(facts["name"]) > 0


def test_a_program_may_not_use_all_of_a_gpus_memory():
    assert parse_target("h200:1x1").available_bytes < 141 * 2**30


@pytest.mark.aot
@pytest.mark.parametrize("text, kind", [("v5e:2x4", "TPU v5 lite"), ("a100-40gb:2x4", "A100")])
def test_its_own_compiler_describes_the_devices(text, kind):
    devices = parse_target(text).devices()
    assert len(devices) == 8
    assert kind in devices[0].device_kind


@pytest.mark.aot
def test_a_slice_that_cannot_be_built_is_refused():
    with pytest.raises(CompilerError, match="its compiler refuses it"):
        parse_target("v5e:3x5").devices()
