"""`matmul_convolutions` against the native convolution: any that is plain, in any network."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolution_problems import (
    NHWC,
    array,
    assert_agrees,
    assert_no_convolution,
    assert_same,
    conv,
    derivatives,
    images_and_kernel,
    loss,
    program,
)
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec

from fomaml_jax.convolutions import matmul_convolutions, native_convolutions

# The convolution itself


@st.composite
def convolutions(draw):
    spatial = draw(st.integers(0, 3))

    def each(strategy):
        return draw(st.tuples(*[strategy] * spatial))

    def layout(sizes):
        """Sizes in an arbitrary order of dimensions, and the axis of each."""
        axes = draw(st.permutations(range(spatial + 2)))
        return [sizes[axes.index(axis)] for axis in range(spatial + 2)], tuple(axes)

    window, dilation = each(st.integers(1, 3)), each(st.integers(1, 2))
    extents = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    pads = each(st.tuples(st.integers(-1, 2), st.integers(-1, 2)))
    sizes = [e + draw(st.integers(0, 3)) + 2 for e in extents]  # room for negative padding
    batch, channels, features = (draw(st.integers(1, 3)) for _ in range(3))
    images_shape, images_axes = layout([batch, channels, *sizes])
    kernel_shape, kernel_axes = layout([features, channels, *window])
    _, result_axes = layout([0] * (spatial + 2))
    options = {
        "window_strides": each(st.integers(1, 3)),
        "padding": draw(st.sampled_from(["SAME", "VALID", pads])),
        "rhs_dilation": dilation,
        "dimension_numbers": lax.ConvDimensionNumbers(images_axes, kernel_axes, result_axes),
    }
    return images_shape, kernel_shape, options


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(convolutions())
def test_any_plain_convolution_agrees_with_the_native_one(convolution):
    images_shape, kernel_shape, options = convolution
    with jax.enable_x64(True):
        fn = functools.partial(lax.conv_general_dilated, **options)
        assert_agrees(fn, array(*images_shape), array(*kernel_shape, seed=1))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(jnp.float32, 1e-5), (jnp.complex64, 1e-5), (jnp.float16, 1e-2), (jnp.bfloat16, 1e-1)],
)
def test_dtypes_are_kept(dtype, tolerance):
    assert_agrees(conv, *images_and_kernel(dtype), tolerance=tolerance)


def test_integers_are_exact():
    images, kernel = (jnp.round(3 * x).astype(jnp.int8) for x in images_and_kernel())
    for element_type in (None, jnp.int32):
        fn = functools.partial(conv, preferred_element_type=element_type)
        assert_same(matmul_convolutions(fn)(images, kernel), fn(images, kernel), 0)


def test_preferred_element_type_is_kept():
    fn = functools.partial(conv, preferred_element_type=jnp.float32)
    assert_agrees(fn, *images_and_kernel(jnp.bfloat16), tolerance=1e-1)


@pytest.mark.parametrize("precision", ["highest", (lax.Precision.HIGH, lax.Precision.DEFAULT)])
def test_precision_is_kept(precision):
    fn = matmul_convolutions(functools.partial(conv, precision=precision))
    text = program(fn, *images_and_kernel())
    for name in {str(lax.Precision(p)).split(".")[-1] for p in np.atleast_1d(precision)}:
        assert f"Precision.{name}" in text


def test_weak_types_are_kept():
    ones = jnp.full((1, 3, 3, 1), 1.0)
    assert ones.weak_type
    assert matmul_convolutions(conv)(ones, ones.reshape(3, 3, 1, 1)).weak_type


def test_second_derivatives_agree():
    with jax.enable_x64(True):
        images, kernel = images_and_kernel()
        hessian = jax.jit(jax.hessian(matmul_convolutions(loss)))(kernel, images)
        assert_same(hessian, jax.jit(jax.hessian(loss))(kernel, images), 1e-12)


# What stays native


def depthwise(images, kernel):
    return conv(images, kernel.reshape(3, 3, 1, 6), feature_group_count=2)


def batch_grouped(images, kernel):
    return conv(images, kernel[..., :2], batch_group_count=2)


def transposed(images, kernel):
    return lax.conv_transpose(images, kernel, (2, 2), "SAME", dimension_numbers=NHWC)


def whole_image_window(images, kernel):
    del kernel
    return conv(jnp.tile(images, (1, 3, 3, 1)), array(12, 12, 2, 1, dtype=jnp.float32))


def empty_result(images, kernel):
    return conv(images[:, :2], kernel, padding="VALID")


@pytest.mark.parametrize(
    "fn",
    [depthwise, batch_grouped, transposed, whole_image_window, empty_result],
)
def test_other_convolutions_stay_native(fn):
    args = images_and_kernel()
    rewritten = matmul_convolutions(fn)
    assert native_convolutions(jax.make_jaxpr(fn)(*args)) == 0
    assert program(rewritten, *args).count("conv_general_dilated") == 1
    assert_same(rewritten(*args), fn(*args), 0)


def test_only_the_plain_convolutions_of_a_function_change():
    def separable(images, kernel):
        return conv(depthwise(images, kernel), array(1, 1, 6, 4, dtype=jnp.float32))

    args = images_and_kernel()
    assert native_convolutions(jax.make_jaxpr(separable)(*args)) == 1
    assert program(matmul_convolutions(separable), *args).count("conv_general_dilated") == 1
    assert_same(matmul_convolutions(separable)(*args), separable(*args), 1e-5)


def test_an_unknown_primitive_keeps_its_convolutions():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    shards = PartitionSpec("d")
    sharded = jax.shard_map(conv, mesh=mesh, in_specs=(shards, PartitionSpec()), out_specs=shards)
    args = images_and_kernel()
    assert "conv_general_dilated" in program(matmul_convolutions(sharded), *args)
    assert_same(matmul_convolutions(sharded)(*args), sharded(*args), 1e-5)


def test_nothing_changes_without_a_convolution():
    def mlp(x):
        return jax.nn.relu(lax.map(jnp.sin, x)) * 2, jax.checkpoint(jnp.exp)(x)

    assert program(matmul_convolutions(mlp), jnp.ones(3)) == program(mlp, jnp.ones(3))


# Arguments and results


def test_all_but_jax_arrays_passes_as_it_is():
    seen = []

    def fn(images, kernel, flag, *, name, options, table):
        seen.append((flag, name, options, type(table)))
        result = conv(images, kernel, strides=options["strides"], padding=name)
        return {"result": result if flag else None, "name": name, "rate": 0.1, "table": table}

    images, kernel = images_and_kernel()
    options = {"strides": (1, 1), "none": None, "module": nn.Dense(2)}
    table = np.arange(3)
    result = matmul_convolutions(fn)(
        images, kernel, True, name="VALID", options=options, table=table
    )
    assert seen == [(True, "VALID", options, np.ndarray)]
    assert_same(result.pop("result"), conv(images, kernel, (1, 1), "VALID"), 1e-5)
    assert result.pop("table") is table
    assert result == {"name": "VALID", "rate": 0.1}


def test_numpy_arrays_are_constants():
    images, kernel = images_and_kernel()
    rewritten = matmul_convolutions(conv)
    assert_same(rewritten(np.asarray(images), kernel), conv(images, kernel), 1e-5)
    assert_same(rewritten(images, np.asarray(kernel)), conv(images, kernel), 1e-5)


def test_keys_pass_through():
    def noisy(key, images, kernel):
        key, noise = jax.random.split(key)
        return key, conv(images + jax.random.normal(noise, images.shape), kernel)

    images, kernel = images_and_kernel()
    key, result = jax.jit(matmul_convolutions(noisy))(jax.random.key(3), images, kernel)
    expected_key, expected = noisy(jax.random.key(3), images, kernel)
    assert key == expected_key
    assert_same(result, expected, 1e-5)


def test_effects_happen_once(capsys):
    def verbose(images, kernel):
        jax.debug.print("seen {}", images.shape[0])
        return conv(images, kernel)

    jax.block_until_ready(jax.jit(matmul_convolutions(verbose))(*images_and_kernel()))
    jax.effects_barrier()
    assert capsys.readouterr().out == "seen 2\n"


def test_name_and_documentation_are_kept():
    assert matmul_convolutions(derivatives).__name__ == "derivatives"
    assert matmul_convolutions(derivatives).__doc__ == derivatives.__doc__


def test_refuses_what_is_not_a_function():
    with pytest.raises(TypeError, match=r"^fn must be a function .*, got 3"):
        matmul_convolutions(3)


# Networks of the usual libraries: each gives a function of (parameters, images), and parameters


def linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, images, train: bool):
            maps = nn.remat(nn.Conv)(4, (3, 3), strides=2)(images)
            maps = nn.relu(nn.BatchNorm(use_running_average=not train)(maps))
            return nn.Dropout(0.5, deterministic=not train)(nn.Conv(2, (2, 2))(maps))

    def apply(variables, images):
        rngs = {"dropout": jax.random.key(1)}
        return Net().apply(variables, images, True, rngs=rngs, mutable=["batch_stats"])

    init = jax.jit(Net().init, static_argnums=2)
    return apply, init(jax.random.key(0), IMAGES, False)


def flax_nnx():
    layers = nnx.Conv(1, 4, (3, 3), strides=2, rngs=nnx.Rngs(0)), nnx.relu
    net = nnx.Sequential(*layers, nnx.Conv(4, 2, (2, 2), rngs=nnx.Rngs(1)))
    graph, params = nnx.split(net, nnx.Param)
    return lambda params, images: nnx.merge(graph, params)(images), params


def equinox():
    def apply(net, images):
        return jax.vmap(net)(jnp.moveaxis(images, -1, 1))

    keys = jax.random.split(jax.random.key(0))
    layers = [
        eqx.nn.Conv2d(1, 4, 3, stride=2, padding=1, key=keys[0]),
        eqx.nn.LayerNorm((4, 3, 3)),
        eqx.nn.Conv2d(4, 2, 2, key=keys[1]),
    ]
    return apply, eqx.nn.Sequential(layers)


def haiku():
    def forward(images):
        return hk.Sequential([hk.Conv2D(4, 3, stride=2), jax.nn.relu, hk.Conv2D(2, 2)])(images)

    net = hk.without_apply_rng(hk.transform(forward))
    return net.apply, net.init(jax.random.key(0), IMAGES)


IMAGES = np.random.default_rng(0).normal(size=(2, 6, 6, 1)).astype(np.float32)


@pytest.mark.parametrize("library", [linen, flax_nnx, equinox, haiku])
def test_networks_agree(library):
    def objective(params, images):
        result = apply(params, images)
        maps = jax.tree.leaves(result)[0]
        return jnp.sum(maps**2), result

    apply, params = library()
    images = jnp.asarray(IMAGES)
    gradient = jax.grad(matmul_convolutions(objective), has_aux=True)
    native = jax.grad(objective, has_aux=True)
    assert native_convolutions(jax.make_jaxpr(objective)(params, images)) == 2
    assert_no_convolution(gradient, params, images)
    assert_same(jax.jit(gradient)(params, images), jax.jit(native)(params, images), 1e-4)
