import math
import random

import jax
import pytest

from stablelm_jax.parallel.mesh import make_mesh


@pytest.mark.parametrize("data, model", [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_a_mesh_uses_every_device_once(data, model):
    mesh = make_mesh(data, model)
    assert mesh.axis_names == ("replica", "data", "model")
    assert mesh.devices.shape == (1, data, model)
    assert set(mesh.devices.flat) == set(jax.devices())


def test_minus_one_takes_the_devices_that_model_leaves():
    assert make_mesh(-1, 2).shape == {"replica": 1, "data": 4, "model": 2}
    assert make_mesh(model=2, replica=2).shape == {"replica": 2, "data": 2, "model": 2}


def test_sizes_that_do_not_use_every_device_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="1 x 3 x 2 = 6, but there are 8 devices; set parallel"):
        make_mesh(3, 2)


class Chip:
    """As much of a TPU as the order of a mesh depends on."""

    platform, device_kind, core_on_chip = "tpu", "TPU v5 lite", 0

    def __init__(self, number, slice_index, coords):
        self.id, self.slice_index, self.coords = number, slice_index, (*coords, 0)
        self.process_index = number // 4


def two_slices():
    coords = [(x, y) for y in range(4) for x in range(2)]
    chips = [Chip(8 * s + i, s, at) for s in range(2) for i, at in enumerate(coords)]
    random.Random(0).shuffle(chips)
    return chips


@pytest.mark.parametrize("replica, data, model", [(1, 8, 2), (2, 4, 2), (2, 8, 1), (1, 4, 4)])
def test_several_slices_are_joined_along_the_outermost_axes(replica, data, model):
    grid = make_mesh(data, model, two_slices(), replica=replica).devices
    halves = grid.reshape(2, -1)
    assert [{chip.slice_index for chip in half} for half in halves] == [{0}, {1}]
    for line in grid.reshape(-1, model):  # each group along `model` is a block of the torus
        extents = [max(c) - min(c) + 1 for c in zip(*(chip.coords for chip in line))]
        assert math.prod(extents) == model


def test_slices_that_would_tear_a_model_group_apart_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="2 slices cannot share .* use parallel.replica=2"):
        make_mesh(1, 16, two_slices())
