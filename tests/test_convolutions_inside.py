"""`matmul_convolutions` inside of jit, scan, cond and custom rules, and under transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolution_problems import (
    assert_agrees,
    assert_no_convolution,
    assert_same,
    conv,
    images_and_kernel,
    loss,
    program,
)
from jax import lax
from jax.extend.core import primitives
from jax.sharding import PartitionSpec

from fomaml_jax.convolutions import matmul_convolutions, native_convolutions

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
