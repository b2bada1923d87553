"""The three operations of a convolution, in every form they take, against JAX's own convolution."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolution_problems import array
from jax import lax

from fomaml_jax.convolution_primitives import _MAX_BLOW_UP, Geometry, convolve

STRIDES = [(1, 1), (2, 1), (1, 2), (2, 2)]
PADDINGS = [((1, 1), (1, 1)), ((0, 0), (0, 0)), ((2, 0), (-1, 3)), ((2, 0), (1, 2))]
# Few and many channels, odd and even widths, less than a tile of examples and more than two.
IMAGES = [(2, 6, 9, 3), (11, 7, 8, 9)]


def native(images, kernel, geometry):
    return lax.conv_general_dilated(
        images,
        kernel,
        geometry.strides,
        geometry.padding,
        rhs_dilation=geometry.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def problem(
    shape,
    out_channels,
    strides=(1, 1),
    padding=PADDINGS[0],
    dilation=(1, 1),
    dtype=None,
    window=(3, 3),
):
    images = array(*shape, dtype=dtype)
    kernel = array(*window, shape[-1], out_channels, seed=1, dtype=dtype)
    return images, kernel, Geometry(shape[1:-1], window, strides, padding, dilation)


def value_and_transposes(fn, images, kernel):
    value, transpose = jax.vjp(fn, images, kernel)
    return value, *transpose(array(*value.shape, seed=2, dtype=value.dtype))


def assert_close(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        scale = np.abs(other).max()
        np.testing.assert_allclose(one / scale, other / scale, atol=tolerance)


@pytest.mark.parametrize(("shape", "out_channels"), list(itertools.product(IMAGES, (4, 64))))
@pytest.mark.parametrize("dilation", [(1, 1), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_every_form_agrees_with_the_native_convolution(shape, out_channels, dilation):
    def both(geometry):
        ours = functools.partial(convolve, geometry=geometry)
        return ours, functools.partial(native, geometry=geometry)

    for strides, padding in itertools.product(STRIDES, PADDINGS):
        images, kernel, geometry = problem(shape, out_channels, strides, padding, dilation)
        ours, theirs = (
            jax.jit(functools.partial(value_and_transposes, fn)) for fn in both(geometry)
        )
        assert_close(ours(images, kernel), theirs(images, kernel), 1e-5)
        assert geometry.positions == theirs(images, kernel)[0].shape[1:-1]


@pytest.mark.parametrize("padding", [((4, 1), (4, 1)), ((-1, 1), (0, 0)), ((0, 0), (1, -1))])
def test_padding_beyond_the_window_or_of_both_signs(padding):
    """Where XLA:CPU's own convolution, or its derivative, is wrong."""
    images, kernel, geometry = problem((4, 7, 7, 9), 4, padding=padding)

    def padded_apart(images, kernel):
        pads = [(0, 0, 0), *((*pad, 0) for pad in padding), (0, 0, 0)]
        images = lax.pad(images, np.float32(0), pads)
        unpadded = geometry._replace(spatial=images.shape[1:-1], padding=((0, 0), (0, 0)))
        return native(images, kernel, unpadded)

    fns = functools.partial(convolve, geometry=geometry), padded_apart
    ours, theirs = (jax.jit(functools.partial(value_and_transposes, fn)) for fn in fns)
    assert_close(ours(images, kernel), theirs(images, kernel), 1e-5)


@pytest.mark.parametrize(
    ("window", "strides", "dilation", "channels"),
    [
        ((4, 4), (1, 1), (1, 1), 3),
        ((1, 5), (1, 1), (1, 1), 9),
        ((5, 2), (1, 1), (2, 3), 3),
        ((5, 5), (2, 2), (1, 1), 9),
    ],
    ids=["even", "flat", "dilated", "strided"],
)
def test_windows_of_any_size_agree_where_they_stay_native(window, strides, dilation, channels):
    """The native forms pad, mirror and cut by the window: not by three, as all others here are."""
    padding = ((3, 1), (2, 0))
    images, kernel, geometry = problem(
        (2, 8, 9, channels), 4, strides, padding, dilation, window=window
    )
    assert geometry.blow_up > _MAX_BLOW_UP
    ours, theirs = (
        jax.jit(functools.partial(value_and_transposes, functools.partial(fn, geometry=geometry)))
        for fn in (convolve, native)
    )
    assert_close(ours(images, kernel), theirs(images, kernel), 1e-5)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_third_derivatives_agree(float64, strides):
    images, kernel, geometry = problem((2, 4, 5, 2), 3, strides, dtype=np.float64)

    def third(fn):
        def loss(images, kernel):
            return jnp.sum(jnp.sin(fn(images, kernel, geometry)))

        def along(images, kernel):
            return jnp.sum(jax.grad(loss, 1)(images, kernel) ** 2)

        forwards = functools.partial(jax.jvp, jax.grad(along, (0, 1)), (images, kernel))
        return forwards((jnp.cos(images), jnp.sin(kernel)))[1]

    ours, theirs = (jax.jit(functools.partial(third, fn))() for fn in (convolve, native))
    assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0), (3, 2)])
def test_derivatives_of_batches_agree(float64, axes):
    def batched(fn, images, kernel, geometry):
        def loss(images, kernel):
            return jnp.sum(jnp.sin(fn(images, kernel, geometry)), (0, 1, 2, 3))

        each = jax.vmap(jax.value_and_grad(loss, (0, 1)), axes)
        all_of_them = jax.grad(lambda *args: jax.vmap(loss, axes)(*args).sum(), (0, 1))
        return [*jax.tree.leaves(each(images, kernel)), *all_of_them(images, kernel)]

    images, kernel, geometry = problem((2, 4, 5, 2), 3, dtype=np.float64)
    stacked = [
        x if axis is None else jnp.stack([x, 2 * x, -x], axis)
        for x, axis in zip((images, kernel), axes, strict=True)
    ]
    ours, theirs = (
        jax.jit(functools.partial(batched, fn, geometry=geometry))(*stacked)
        for fn in (convolve, native)
    )
    assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_kernels_of_tasks_never_make_grouped_convolutions(strides):
    images, kernel, geometry = problem((2, 6, 8, 4), 5, strides)
    kernels = jnp.stack([kernel, kernel])

    def gradients(kernels):
        return jax.grad(
            lambda k: jnp.sum(jax.vmap(convolve, (None, 0, None))(images, k, geometry))
        )(kernels)

    text = jax.jit(gradients).lower(kernels).as_text()
    assert "stablehlo.convolution" not in text
    assert "dot_general" in text


def test_one_kernel_for_all_stays_one_product():
    images, kernel, geometry = problem((2, 6, 8, 4), 5, (2, 2))
    many = jnp.stack([images, images, images])
    each = jax.vmap(functools.partial(convolve, geometry=geometry), (0, None))
    text = jax.jit(each).lower(many, kernel).as_text()
    assert "(tensor<72x36xf32>, tensor<36x5xf32>)" in text


@pytest.mark.parametrize(("strides", "count"), [((1, 1), 3), ((2, 2), 0)])
def test_windows_that_overlap_much_stay_native_on_cpu(strides, count):
    images, kernel, geometry = problem((2, 8, 8, 16), 64, strides)
    run = functools.partial(value_and_transposes, functools.partial(convolve, geometry=geometry))
    text = jax.jit(run).lower(images, kernel).as_text()
    assert text.count("stablehlo.convolution") == count


@pytest.mark.parametrize("out_channels", [32, 64])
def test_large_images_are_not_copied_for_the_kernel_gradient(out_channels):
    images, kernel, geometry = problem((61, 32, 32, 8), out_channels)
    outputs = array(61, 32, 32, out_channels)

    def kernel_gradient(images, outputs):
        return jax.vjp(lambda k: convolve(images, k, geometry), kernel)[1](outputs)

    memory = jax.jit(kernel_gradient).lower(images, outputs).compile().memory_analysis()
    assert memory.temp_size_in_bytes < outputs.nbytes / 2


def test_what_is_before_a_kernel_gradient_is_computed_once():
    images, kernel, geometry = problem((4, 8, 8, 4), 8)

    def gradients(images, cotangent):
        transpose = jax.vjp(lambda *args: convolve(*args, geometry), images, kernel)[1]
        return transpose(jnp.abs(cotangent))

    program = jax.jit(gradients).lower(images, array(4, 8, 8, 8)).compile().as_text()
    assert program.count(" abs(") == 1


@pytest.mark.parametrize("per_device", [1, 6, 10])
@pytest.mark.parametrize("out_channels", [4, 64])
def test_sharded_gradients_are_checked_and_agree(per_device, out_channels):
    images, kernel, geometry = problem((2 * per_device, 4, 5, 3), out_channels)
    mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Auto,))
    one, each = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("d")

    def loss(kernel, images):
        return jnp.sum(jnp.sin(convolve(images, kernel, geometry)))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(one, each), out_specs=one)
    def gradient(kernel, images):
        kernel = lax.pcast(kernel, "d", to="varying")
        return lax.psum(jax.grad(loss)(kernel, images), "d")

    ours = jax.jit(gradient)(kernel, images)
    assert_close([ours], [jax.grad(loss)(kernel, images)], 1e-5)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("many", [False, True], ids=["one task", "many"])
def test_sharded_gradients_go_through_layers(strides, many):
    """JAX checks there what varies, in the gradient of the images between them, too."""
    images, kernel, geometry = problem((4, 4, 5, 3), 3, strides)
    other = geometry._replace(spatial=geometry.positions)
    mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Auto,))
    one, each = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("d")

    def loss(kernels, images):
        hidden = jnp.sin(convolve(images, kernels[0], geometry))
        return jnp.sum(jnp.sin(convolve(hidden, kernels[1], other)))

    def gradient_of(kernels, images):
        gradient = jax.grad(loss, (0, 1))
        if not many:
            return gradient(kernels, images)
        return jax.vmap(gradient, (None, 0))(kernels, images[:, None])

    def device(kernels, images):
        kernels = jax.tree.map(lambda k: lax.pcast(k, "d", to="varying"), kernels)
        of_kernels, of_images = gradient_of(kernels, images)
        if many:
            of_kernels = jax.tree.map(lambda k: k.sum(0), of_kernels)
        return lax.psum(of_kernels, "d"), of_images

    sharded = jax.shard_map(device, mesh=mesh, in_specs=(one, each), out_specs=(one, each))
    kernels = (kernel, kernel[::-1])
    of_kernels, of_images = jax.jit(sharded)(kernels, images)
    expected = jax.grad(loss, (0, 1))(kernels, images)
    assert_close([*of_kernels, of_images.reshape(images.shape)], [*expected[0], expected[1]], 1e-5)


@pytest.mark.parametrize("shape", [(0, 5, 5, 2), (2, 5, 5, 0)])
def test_nothing_in_nothing_out(shape):
    images, kernel, geometry = problem(shape, 3)
    ours = value_and_transposes(functools.partial(convolve, geometry=geometry), images, kernel)
    theirs = value_and_transposes(functools.partial(native, geometry=geometry), images, kernel)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        np.testing.assert_array_equal(one, other)


def test_sixteen_bits_lose_no_more_than_the_native_gradient():
    images, kernel, geometry = problem((4, 9, 9, 8), 8, (2, 2))
    cotangent = array(*native(images, kernel, geometry).shape, seed=2)

    def image_gradient(fn, dtype):
        args = (x.astype(dtype) for x in (images, kernel))
        return jax.vjp(lambda *a: fn(*a, geometry), *args)[1](cotangent.astype(dtype))[0]

    exact = image_gradient(native, jnp.float32)
    ours, theirs = (
        np.abs(image_gradient(fn, jnp.bfloat16).astype(jnp.float32) - exact).mean()
        for fn in (convolve, native)
    )
    assert ours < 1.2 * theirs
