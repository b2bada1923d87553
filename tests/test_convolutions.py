"""`matmul_convolutions` against the native convolution, wherever JAX lets one stand."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import primitives
from jax.sharding import PartitionSpec

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


# Inside of other primitives


def in_jit(kernel, images):
    return jax.jit(jax.jit(loss))(kernel, images)


def in_checkpoint(kernel, images):
    policy = jax.checkpoint_policies.dots_saveable
    return jax.checkpoint(loss, policy=policy, prevent_cse=False)(kernel, images)


def in_scan(kernel, images):
    def step(total, image):
        return total + loss(kernel, image[None]), jnp.max(image)

    return lax.scan(step, 0 * jnp.sum(images), images, reverse=True, unroll=2)


def in_scan_that_carries_the_kernel(kernel, images):
    def step(kernel, image):
        return kernel - jax.grad(loss)(kernel, image[None]), None

    return lax.scan(step, kernel, images)[0]


def in_cond(kernel, images):
    return lax.cond(
        jnp.sum(images) > 0, loss, lambda kernel, images: jnp.sum(images), *(kernel, images)
    )


def in_switch(kernel, images):
    def dilated(kernel, images):
        return jnp.sum(conv(images, kernel, (1, 1), rhs_dilation=(2, 2)))

    return lax.switch(jnp.int32(1), [loss, dilated, in_jit], kernel, images)


def in_vmap(kernel, images):
    return jax.vmap(loss, (None, 0))(kernel, images[:, None])


def in_everything(kernel, images):
    return jax.checkpoint(jax.jit(in_scan))(kernel, images), in_cond(kernel, images)


@pytest.mark.parametrize(
    "fn",
    [
        in_jit,
        in_checkpoint,
        in_scan,
        in_cond,
        in_switch,
        in_vmap,
        in_everything,
    ],
)
def test_agrees_inside_of_other_primitives(fn):
    with jax.enable_x64(True):
        images, kernel = images_and_kernel()
        assert_agrees(fn, kernel, images)


def test_agrees_inside_of_while_loops():
    def in_while(kernel, images):
        def small(state):
            images, _ = state
            return loss(kernel[..., :2], images) < 100

        def step(state):
            images, count = state
            return conv(images, kernel[..., :2], (1, 1)) + images, count + 1

        return lax.while_loop(small, step, (images, 0))

    with jax.enable_x64(True):
        images, kernel = images_and_kernel()
        rewritten = matmul_convolutions(in_while)
        assert native_convolutions(jax.make_jaxpr(in_while)(kernel, images)) == 2
        assert_no_convolution(rewritten, kernel, images)
        assert_same(rewritten(kernel, images), in_while(kernel, images), 1e-10)


def test_gradient_steps_inside_of_the_function_agree():
    """A gradient taken inside leaves dilated convolutions; the results agree."""
    with jax.enable_x64(True):
        images, kernel = images_and_kernel()
        fn = in_scan_that_carries_the_kernel
        assert_same(matmul_convolutions(fn)(kernel, images), fn(kernel, images), 1e-12)


def test_the_surroundings_of_a_convolution_are_kept():
    images, kernel = images_and_kernel()
    equations = jax.make_jaxpr(matmul_convolutions(in_checkpoint))(kernel, images).eqns
    (remat,) = (e for e in equations if e.primitive is primitives.remat_p)
    assert remat.params["prevent_cse"] is False
    assert remat.params["policy"] is jax.checkpoint_policies.dots_saveable
    text = program(matmul_convolutions(in_scan), kernel, images)
    assert "reverse=True" in text
    assert "unroll=2" in text


def test_a_jitted_layer_is_compiled_once():
    layer = jax.jit(functools.partial(conv, strides=(1, 1)))

    def network(images, kernel):
        return layer(layer(images, kernel), kernel)

    def inner_jaxprs():
        jaxpr = jax.make_jaxpr(matmul_convolutions(network))(images, kernel[..., :2])
        return {id(equation.params["jaxpr"]) for equation in jaxpr.eqns}

    images, kernel = images_and_kernel()
    assert inner_jaxprs() == inner_jaxprs()
    assert len(inner_jaxprs()) == 1


# Custom derivatives


@jax.custom_jvp
def odd_jvp(kernel, images):
    return loss(kernel, images)


@odd_jvp.defjvp
def _odd_jvp_rule(primals, tangents):
    kernel, images = primals
    tangent, _ = tangents
    return loss(kernel, images), 7 * jnp.sum(conv(images, tangent) * conv(images, kernel))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def odd_vjp(kernel, images, factor):
    return factor * loss(kernel, images)


def _odd_vjp_forward(kernel, images, factor):
    return factor * loss(kernel, images), (conv(images, kernel), kernel, images)


def _odd_vjp_backward(factor, residuals, cotangent):
    result, kernel, images = residuals
    feature_maps = conv(images, kernel + jnp.mean(result), padding="VALID")
    return factor * cotangent * kernel * jnp.sum(feature_maps), None


odd_vjp.defvjp(_odd_vjp_forward, _odd_vjp_backward)


def in_scanned_rule(kernel, images):
    def step(total, image):
        return total + odd_jvp(kernel, image[None]) + odd_vjp(kernel, image[None], 3), None

    return lax.scan(step, jnp.zeros((), images.dtype), images)[0]


@pytest.mark.parametrize(
    "fn",
    [odd_jvp, lambda k, x: odd_vjp(k, x, 3), in_scanned_rule],
    ids=["custom_jvp", "custom_vjp", "in scan"],
)
def test_custom_derivatives_stay_the_users(fn):
    with jax.enable_x64(True):
        images, kernel = images_and_kernel()
        kernels = jnp.stack([kernel, -kernel])
        rewritten = jax.grad(matmul_convolutions(fn))
        assert_no_convolution(rewritten, kernel, images)
        gradients = jax.jit(jax.vmap(rewritten, (0, None)))(kernels, images)
        expected = jax.jit(jax.vmap(jax.grad(fn), (0, None)))(kernels, images)
        assert_same(gradients, expected, 1e-11)
        assert not np.allclose(gradients[0], jax.grad(loss)(kernel, images))


def test_symbolic_zeros_reach_the_rule():
    seen = []

    @jax.custom_jvp
    def fn(kernel, images):
        return conv(images, kernel)

    def rule(primals, tangents):
        seen.append([type(t) is jax.custom_derivatives.SymbolicZero for t in tangents])
        return fn(*primals), conv(primals[1], tangents[0])

    fn.defjvp(rule, symbolic_zeros=True)
    images, kernel = images_and_kernel()
    gradient = jax.grad(lambda k: jnp.sum(matmul_convolutions(fn)(k, images)))
    assert_same(gradient(kernel), jax.grad(lambda k: jnp.sum(conv(images, k)))(kernel), 1e-5)
    assert seen == [[False, True]]


# Under other transformations


def test_per_task_kernels_become_batched_products():
    images, kernel = images_and_kernel()
    kernels = jnp.stack([kernel, 2 * kernel, -kernel])
    gradients = jax.vmap(jax.grad(matmul_convolutions(loss)), (0, None))
    assert_no_convolution(gradients, kernels, images)
    one_by_one = [jax.grad(loss)(kernel, images) for kernel in kernels]
    assert_same(gradients(kernels, images), jnp.stack(one_by_one), 1e-4)


def test_works_in_the_body_of_a_scan():
    images, kernel = images_and_kernel()

    def step(kernel, image):
        return kernel - 0.1 * jax.grad(matmul_convolutions(loss))(kernel, image[None]), None

    native = kernel
    for image in images:
        native = native - 0.1 * jax.grad(loss)(native, image[None])
    assert_no_convolution(lambda k: lax.scan(step, k, images), kernel)
    assert_same(lax.scan(step, kernel, images)[0], native, 1e-4)


@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_equals_unsharded(check_vma):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("d")),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )
    def gradient(kernel, images):
        if check_vma:
            kernel = lax.pcast(kernel, "d", to="varying")
        return lax.psum(jax.grad(matmul_convolutions(in_everything_sum))(kernel, images), "d")

    def in_everything_sum(kernel, images):
        return jnp.sum(in_jit(kernel, images)) + in_scan(kernel, images)[0]

    images, kernel = images_and_kernel()
    assert_no_convolution(gradient, kernel, images)
    expected = 2 * jax.grad(loss)(kernel, images)
    assert_same(jax.jit(gradient)(kernel, images), expected, 1e-4)


def test_closed_over_tracers_keep_their_gradient():
    images, kernel = images_and_kernel()

    def scanned(kernel):
        per_image = matmul_convolutions(lambda image: loss(kernel, image[None]))
        return jnp.sum(lax.map(per_image, images))

    expected = jax.grad(loss)(kernel, images)
    assert_same(jax.grad(scanned)(kernel), expected, 1e-4)
    assert_same(jax.jit(jax.grad(scanned))(kernel), expected, 1e-4)


def test_composes_with_itself_and_with_gradients():
    images, kernel = images_and_kernel()
    twice = matmul_convolutions(lambda k, x: matmul_convolutions(loss)(k, x))
    expected = jax.grad(loss)(kernel, images)
    assert_same(matmul_convolutions(jax.grad(twice))(kernel, images), expected, 1e-4)
    assert_same(matmul_convolutions(jax.grad(loss))(kernel, images), expected, 1e-4)


def test_no_tracer_leaks():
    images, kernel = images_and_kernel()
    with jax.checking_leaks():
        jax.jit(jax.grad(matmul_convolutions(loss)))(kernel, images)


def test_works_where_jit_is_disabled():
    images, kernel = images_and_kernel()
    with jax.disable_jit():
        result = matmul_convolutions(in_scan)(kernel, images)
    assert_same(result, in_scan(kernel, images), 1e-5)


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
    with pytest.raises(TypeError, match=r"takes a function.*got 3"):
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
