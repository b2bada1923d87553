"""Pooling rewritten by `matmul_convolutions` against JAX's own, derivatives of ties included."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fomaml_jax.convolutions import matmul_convolutions


def images_and_kernel(shape=(2, 5, 6, 3)):
    rng = np.random.default_rng(0)
    # Few values, so that windows hold equal maxima: two, three or four of them.
    images = jnp.asarray(rng.integers(0, 3, size=shape).astype(np.float32))
    return images, jnp.asarray(rng.integers(-1, 2, size=(1, 1, shape[-1], 4)).astype(np.float32))


def by_reshape(x):
    n, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


def by_three(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 2, 1), (1, 3, 2, 1), "VALID")


def max_pool(x):
    return nn.max_pool(x, (2, 2), (2, 2))


def avg_pool(x):
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4


def one_by_one(x):
    return jax.vmap(lambda image: max_pool(image[None])[0])(x)


def padded(x):
    return nn.max_pool(x, (2, 2), (2, 2), padding="SAME")


def overlapping(x):
    return nn.max_pool(x, (3, 3), (2, 2))


TILED = [by_reshape, by_three, max_pool, avg_pool, one_by_one]


def network(pool):
    def loss(images, kernel):
        x = lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.sin(pool(x)))

    return loss


@pytest.mark.parametrize("pool", [*TILED, padded, overlapping])
def test_values_and_derivatives_agree(pool):
    args = images_and_kernel()
    loss, rewritten = network(pool), matmul_convolutions(network(pool))
    np.testing.assert_allclose(rewritten(*args), loss(*args), rtol=1e-6)
    ours, theirs = (jax.jit(jax.grad(fn, (0, 1)))(*args) for fn in (rewritten, loss))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", [by_reshape, max_pool, avg_pool])
def test_second_and_forward_derivatives_agree(float64, pool):
    args = tuple(x.astype(np.float64) for x in images_and_kernel())

    def directional(fn):
        return jax.jvp(jax.grad(lambda *a: jnp.sum(fn(*a) ** 2), (0, 1)), args, args)[1]

    ours, theirs = (directional(fn) for fn in (matmul_convolutions(network(pool)), network(pool)))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", TILED[1:])
def test_slow_derivatives_are_gone(pool):
    args = images_and_kernel()
    gradient = str(jax.make_jaxpr(jax.grad(matmul_convolutions(network(pool))))(*args))
    assert "select_and_scatter" not in gradient
    assert "reduce_window" not in gradient


@pytest.mark.parametrize("pool", [padded, overlapping])
def test_other_windows_stay_native(pool):
    args = images_and_kernel()
    program = str(jax.make_jaxpr(matmul_convolutions(network(pool)))(*args))
    assert "reduce_window_max" in program


def test_batches_over_tasks_agree():
    images, kernel = images_and_kernel()
    kernels = jnp.stack([kernel, -kernel])
    ours, theirs = (
        jax.vmap(jax.grad(fn, 1), (None, 0))(images, kernels)
        for fn in (matmul_convolutions(network(max_pool)), network(max_pool))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_not_a_number_goes_on_backwards():
    images, kernel = images_and_kernel()
    images = images.at[0, 0, 0, 0].set(jnp.nan)
    ours, theirs = (
        jax.grad(fn)(images, kernel)
        for fn in (matmul_convolutions(network(max_pool)), network(max_pool))
    )
    # Which element of a window with NaN has the derivative is no one's promise.
    assert np.isnan(ours).any()
    assert np.isnan(theirs).any()


def test_what_is_split_over_an_explicit_axis_stays_native():
    mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Explicit,))
    images, kernel = images_and_kernel((2, 4, 4, 3))
    with jax.set_mesh(mesh):
        images = jax.device_put(images, jax.P("d"))
        kernel = jax.device_put(kernel, jax.P())
        out = jax.jit(matmul_convolutions(network(max_pool)))(images, kernel)
        np.testing.assert_allclose(out, network(max_pool)(images, kernel), rtol=1e-6)
