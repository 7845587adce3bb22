"""A process of its own for each start: jax sets its cache up once."""

import os
import socket
import subprocess
import sys

SCRIPT = """
import sys
import jax, jax.numpy as jnp
from stablelm_jax.run.compilation import CompilationCache
cache = CompilationCache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(cache.hits, cache.misses, cache.folder)
"""


def start(workdir, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERSIST"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(workdir)],
        env=kept | {"XLA_FLAGS": ""} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    hits, misses, folder = done.stdout.split()
    return int(hits), int(misses), folder


def test_a_second_run_beside_the_first_compiles_nothing(tmp_path):
    hits, misses, folder = start(tmp_path / "first")
    assert hits == 0 and misses > 0
    assert folder.startswith(str(tmp_path / ".compilation_cache" / "cpu_"))
    assert start(tmp_path / "second") == (misses, 0, folder)


def test_a_cache_that_the_user_set_up_is_kept(tmp_path):
    given = str(tmp_path / "mine")
    assert start(tmp_path / "run", JAX_COMPILATION_CACHE_DIR=given)[2] == given


def test_beside_a_run_folder_in_a_bucket_it_lies_in_the_bucket(gcs):
    _, misses, folder = start("gs://compiled/runs/first")
    assert misses > 0 and folder.startswith("gs://compiled/runs/.compilation_cache/cpu_")
    assert any(f"gs://{key}".startswith(folder) for key in gcs.objects)


TOGETHER = """
import sys
import jax, jax.numpy as jnp
from stablelm_jax.run.compilation import CompilationCache
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
cache = CompilationCache(sys.argv[3])
mesh = jax.make_mesh((2,), ("data",))
x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("data")))
jax.jit(lambda x: jnp.sin(x).sum()).lower(x).compile()
print(cache)
"""


def test_every_process_finds_what_process_0_has_compiled(tmp_path):
    settings = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "XLA_FLAGS": ""}
    for expected in ("programs: 0 from", "programs: 1 from"):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{one.getsockname()[1]}"
        started = [
            subprocess.Popen(
                [sys.executable, "-c", TOGETHER, address, str(index), str(tmp_path / "run")],
                env=os.environ | settings,
                stdout=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        ]
        for process in started:
            assert expected in process.communicate(timeout=200)[0]
