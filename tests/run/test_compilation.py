"""A process of its own for each start: jax sets its cache up once."""

import os
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
