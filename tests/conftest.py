"""A strict JAX for every test: no silent promotion of dtypes or ranks, and two CPU devices."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


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


@pytest.fixture(scope="module")
def quick_compiles():
    """For tests whose time is compilation: few optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
