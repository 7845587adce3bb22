import io

import jax
import jax.numpy as jnp
from rich.console import Console
from tiny import tiny_config, train, write_data

from stablelm_jax.run.profile import Profiler, top_operations


def test_a_run_leaves_a_trace_and_a_table_of_the_steps_asked_for(tmp_path):
    data = write_data(tmp_path / "sources")
    quiet = {"evaluation.every": 0, "samples.every": 0, "training.num_steps": 6}
    code, _ = train(tiny_config(data, **quiet, **{"profile.steps": "2:4"}), tmp_path / "run")
    assert code == 0
    text = (tmp_path / "run/profile/top_operations.txt").read_text()
    assert "what took the time in 2 steps" in text
    assert len(list((tmp_path / "run/profile").rglob("*.xplane.pb"))) == 1


def test_an_operation_is_counted_as_often_as_it_ran(tmp_path):
    step = jax.jit(lambda x: jnp.tanh(x @ x) + 1.0)
    x = jnp.ones((200, 200))
    step(x).block_until_ready()  # compiled outside of the trace
    profiler = Profiler(range(0, 3), tmp_path / "profile", Console(file=io.StringIO()))
    for number in range(5):
        profiler.before(number)
        x = step(x)
        profiler.after(number + 1, x)
    rows = top_operations(next((tmp_path / "profile").rglob("*.xplane.pb")))
    assert rows and all(seconds > 0 for _, seconds, _ in rows)
    assert {times for _, _, times in rows} == {3}
    assert [seconds for _, seconds, _ in rows] == sorted((s for _, s, _ in rows), reverse=True)


def test_without_steps_nothing_is_traced(tmp_path):
    profiler = Profiler(range(0), tmp_path / "profile", Console(quiet=True))
    profiler.before(0)
    profiler.after(1, jnp.ones(1))
    profiler.close()
    assert not (tmp_path / "profile").exists()
