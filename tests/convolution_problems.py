"""What tests of `matmul_convolutions` share: a convolution, and whether two functions agree."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fomaml_jax.convolutions import matmul_convolutions, native_convolutions

NHWC = ("NHWC", "HWIO", "NHWC")


def array(*shape, seed=0, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def conv(images, kernel, strides=(2, 2), padding="SAME", **options):
    options.setdefault("dimension_numbers", NHWC)
    return lax.conv_general_dilated(images, kernel, strides, padding, **options)


def loss(kernel, images):
    return jnp.sum(jnp.sin(conv(images, kernel)))


def images_and_kernel(dtype=None):
    return array(2, 5, 5, 2, dtype=dtype), array(3, 3, 2, 3, seed=1, dtype=dtype)


def program(fn, *args):
    """All the text of the traced function, inner jaxprs included."""
    return str(jax.make_jaxpr(fn)(*args))


def assert_no_convolution(fn, *args):
    assert "conv_general_dilated" not in program(fn, *args)
    assert native_convolutions(jax.make_jaxpr(fn)(*args)) == 0


def assert_same(one, other, tolerance):
    def same(a, b):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(same, one, other)


def derivatives(fn):
    """The value, and the gradients along a fixed cotangent."""

    @jax.jit
    def all_of(*args):
        value, pull_back = jax.vjp(fn, *args)
        return value, pull_back(jax.tree.map(jnp.cos, value))

    return all_of


def assert_agrees(fn, *args, tolerance=1e-12):
    """Values and derivatives are the native ones, and no convolution is left in either."""
    rewritten = matmul_convolutions(fn)
    assert_no_convolution(derivatives(rewritten), *args)
    assert_same(derivatives(rewritten)(*args), derivatives(fn)(*args), tolerance)
