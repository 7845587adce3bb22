import jax
import pytest

from stablelm_jax.parallel.mesh import make_mesh


@pytest.mark.parametrize("data, model", [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_a_mesh_uses_every_device_once(data, model):
    mesh = make_mesh(data, model)
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.shape == (data, model)
    assert set(mesh.devices.flat) == set(jax.devices())


def test_minus_one_takes_the_devices_that_model_leaves():
    assert make_mesh(-1, 2).shape == {"data": 4, "model": 2}


def test_sizes_that_do_not_use_every_device_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="3 x 2 = 6, but there are 8 devices; set parallel"):
        make_mesh(3, 2)
