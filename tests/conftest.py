"""A strict JAX for every test: no silent promotion of dtypes or ranks, and two CPU devices."""

import contextlib
import dataclasses
import gc
import os
import signal
from pathlib import Path

import jax
import pytest
from command_line import SMALL_GLYPHS, TINY, SmallNetwork, call, noise, trained
from jax.experimental.compilation_cache import compilation_cache
from omniglot_archives import SMALL, write_small

from fomaml_jax import baselines, classifiers, datasets, experiment
from fomaml_jax.datasets import Splits, _omniglot

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def compile_quickly():
    """Most of a test's time is compilation: XLA's older code generator takes half of it.

    Without optimisations even a fifth, in this process. Programs that tests start train for longer,
    and slowly without any: they have a few of them. With both variables set, even to nothing and
    to 0, all tests compile as users do.
    """
    quick = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"
    jax.config.update("jax_disable_most_optimizations", quick)
    # jax 0.12 no longer knows the flag, is about as quick without, and ends where it is set.
    if "XLA_FLAGS" not in os.environ and jax.__version_info__ < (0, 11):
        os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
        jax.jit(lambda: 0)()  # XLA reads its flags once
        os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=1"


compile_quickly()
gc.set_threshold(100_000, 50, 100)  # traces are many objects and few cycles: 6 % of the time

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for what a shell runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


UNWATCHED = {
    "makes_nans": jax.debug_nans,
    "reuses_keys": jax.debug_key_reuse,
}
"""Marks of tests that do on purpose what JAX's checks for mistakes look for, and those checks."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Under JAX_DEBUG_NANS and the like, a test is watched as far as that makes sense."""
    with contextlib.ExitStack() as stack:
        for mark, watching in UNWATCHED.items():
            if item.get_closest_marker(mark) is not None:
                stack.enter_context(watching(False))
        return (yield)


MOST_MAPPINGS = 3_000
"""Of memory, after which compiled programs are let go of: Linux ends a process at 65,530.

Long before, as to compile one takes the longer the more of them are alive.
"""


@pytest.fixture(scope="module", autouse=True)
def _programs_in_bounds():
    """A compiled program has dozens of mappings, and a worker compiles thousands of programs."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def float64():
    """Runs a test in double precision, so that closed forms hold to 1e-10."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """For optax's own Adam, which raises a float to an int32 power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def omniglot_folder():
    """The folder of Omniglot's two archives, below `$FOMAML_JAX_DATA`."""
    folder = Path(os.environ.get("FOMAML_JAX_DATA", "")) / "omniglot"
    if not (folder / "images_background.zip").is_file():
        pytest.skip("needs $FOMAML_JAX_DATA with Omniglot in it")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _kept_compiles(tmp_path_factory):
    """What one test compiled serves the next of its worker, also after programs were let go of."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def small_world():
    """A small network learns small pictures, so that a run takes seconds."""
    small = Splits(noise(8), noise(5), noise(7))
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(classifiers, "network", lambda chosen, n: SmallNetwork(n, chosen.width))
        patch.setattr(datasets, "glyphs", lambda: small)
        patch.setattr(experiment, "VALIDATION_TASKS", 4)
        patch.setattr(baselines, "FINE_TUNING_FACTORS", (1.0,))
        yield


@pytest.fixture(scope="session")
def made_runs():
    """Those that this worker has trained, for whatever module reads them: copy what you change."""
    return {}


@pytest.fixture(scope="module")
def glyphs(small_world, made_runs, tmp_path_factory):
    """A run of the default data set, into the default folder, with everything it draws."""
    if "glyphs" not in made_runs:
        home = tmp_path_factory.mktemp("glyphs")
        with contextlib.chdir(home):
            run = call("train", *SMALL_GLYPHS)
        assert run.code == 0, run.err
        (folder,) = (home / "runs").iterdir()
        made_runs["glyphs"] = dataclasses.replace(run, folder=folder)
    return made_runs["glyphs"]


@pytest.fixture(scope="module")
def sinusoid(small_world, made_runs, tmp_path_factory):
    if "sinusoid" not in made_runs:
        folder = tmp_path_factory.mktemp("sinusoid")
        made_runs["sinusoid"] = trained(folder, "sinusoid", *TINY, "--eval-steps", "2")
    return made_runs["sinusoid"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The package's own folder, for one test."""
    monkeypatch.setenv("FOMAML_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder of two archives, which are all of Omniglot while a test runs."""
    monkeypatch.setattr(_omniglot, "_ALPHABETS", SMALL)
    monkeypatch.delenv("FOMAML_JAX_DATA", raising=False)
    return write_small(tmp_path / "small")
