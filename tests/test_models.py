"""The field's networks against plain numpy, and what makes their normalisation transductive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fomaml_jax as fj
from fomaml_jax.models import BatchStatistics, max_pool


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_like(shapes):
    """Parameters that differ everywhere, zeros and ones included."""
    leaves, structure = jax.tree.flatten(shapes)
    return structure.unflatten([draw(*x.shape, seed=i) for i, x in enumerate(leaves)])


def random_params(net, x):
    return random_like(jax.eval_shape(net.init, jax.random.key(0), x))


def count(net, *shape):
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *shape)))
    return sum(x.size for x in jax.tree.leaves(shapes))


# The multi-layer perceptron.


def test_mlp_is_products_and_relu_in_turn():
    net = fj.models.mlp(hidden=(5, 4), outputs=2)
    x = draw(7, 3)
    params = random_params(net, x)
    layers = params["params"]
    expected = x
    for name in ("Dense_0", "Dense_1", "head"):
        expected = expected @ layers[name]["kernel"] + layers[name]["bias"]
        expected = expected if name == "head" else np.maximum(expected, 0)
    np.testing.assert_allclose(jax.jit(net.apply)(params, x), expected, rtol=1e-5, atol=1e-5)


def test_mlp_takes_another_activation():
    net = fj.models.mlp(hidden=(3,), activation=jnp.tanh)
    x = draw(4, 2)
    params = random_params(net, x)
    hidden, head = (params["params"][name] for name in ("Dense_0", "head"))
    expected = np.tanh(x @ hidden["kernel"] + hidden["bias"]) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(jax.jit(net.apply)(params, x), expected, rtol=1e-5, atol=1e-5)


def test_mlp_of_the_sinusoid_problem_has_its_parameters():
    assert count(fj.models.mlp(), 1) == (1 + 1) * 40 + (40 + 1) * 40 + 40 + 1


# The four-block network.


def same_padding(size, stride):
    total = max((-(-size // stride) - 1) * stride + 3 - size, 0)
    return total // 2, total - total // 2


def convolve(x, kernel, stride):
    """A 3x3 convolution that pads as XLA's SAME, summed place by place of the kernel."""
    pads = [same_padding(size, stride) for size in x.shape[1:3]]
    padded = np.pad(x, [(0, 0), *pads, (0, 0)])
    height, width = (-(-size // stride) for size in x.shape[1:3])
    places = [
        padded[:, i : i + height * stride : stride, j : j + width * stride : stride] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    ]
    return sum(place[:, :height, :width] for place in places)


def normalise(x, scale, shift):
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / np.sqrt(variance + 1e-3) * scale + shift


def halve(x):
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    corners = [x[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]
    return np.max(corners, axis=0)


def plain_conv4(layers, x, pooling, features):
    for block in range(4):
        x = convolve(x, layers[f"conv{block}"]["kernel"], 2 if pooling == "stride" else 1)
        x = normalise(x, **layers[f"norm{block}"])
        if not (block == 3 and features == "scaled"):
            x = np.maximum(x, 0)
        if pooling == "max":
            x = halve(x)
    x = x.mean((1, 2)) if features == "mean" else x.reshape(len(x), -1)
    if features == "scaled":
        x = x / np.sqrt((x**2).mean(-1, keepdims=True))
    return x @ layers["head"]["kernel"] + layers["head"]["bias"]


@pytest.mark.parametrize("features", ["flat", "mean", "scaled"])
@pytest.mark.parametrize("pooling", ["stride", "max"])
def test_conv4_equals_plain_numpy(pooling, features):
    width = 5 if features == "flat" else (3, 4, 6, 5)
    net = fj.models.conv4(3, width=width, pooling=pooling, features=features)
    x = draw(4, 18, 33, 2)  # odd sizes on the way down, and not square
    params = random_params(net, x)
    expected = plain_conv4(params["params"], x, pooling, features)
    np.testing.assert_allclose(jax.jit(net.apply)(params, x), expected, rtol=1e-3, atol=1e-3)


def test_scaled_features_have_one_norm_whatever_the_image():
    width, size = 4, 16
    net = fj.models.conv4(width, width=width, features="scaled")  # one feature an output
    x = draw(6, size, size, 1) * np.float32([1, 10, 0.1, 1, 5, 2]).reshape(6, 1, 1, 1)
    params = random_params(net, x)
    identity = {"kernel": np.eye(width, dtype=np.float32), "bias": np.zeros(width, np.float32)}
    features = jax.jit(net.apply)({"params": params["params"] | {"head": identity}}, x)
    np.testing.assert_allclose(np.linalg.norm(features, axis=-1), np.sqrt(width), rtol=1e-4)
    assert np.unique(np.round(features, 3), axis=0).shape[0] == 6


def test_blank_images_leave_values_and_gradients_finite():
    net = fj.models.conv4(3, width=4, features="scaled")
    x = jnp.zeros((2, 16, 16, 1))
    params = random_params(net, x)
    value, grads = jax.jit(jax.value_and_grad(lambda p: net.apply(p, x).sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, grads)))


@pytest.mark.parametrize("features", ["flat", "scaled"])
def test_only_the_head_of_scaled_features_starts_at_zero(features):
    net = fj.models.conv4(3, width=4, features=features)
    head = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))["params"]["head"]
    assert (features == "scaled") == (not np.any(head["kernel"]))
    assert not np.any(head["bias"])


def test_predictions_depend_on_the_other_images_of_the_batch():
    net = fj.models.conv4(3, width=4)
    x = draw(4, 16, 16, 1)
    params = random_params(net, x)
    alone, beside = jax.jit(net.apply)(params, x[:2]), jax.jit(net.apply)(params, x)[:2]
    assert np.abs(alone - beside).max() > 0.1


def test_parameter_counts_of_the_five_way_omniglot_network():
    """112,261 in the published code, whose convolutions have biases that do nothing."""
    biases = 4 * 64
    assert count(fj.models.conv4(5, features="mean"), 28, 28, 1) + biases == 112_261
    flat = 64 * 2 * 2
    assert count(fj.models.conv4(5), 28, 28, 1) + biases == 112_261 + 5 * (flat - 64)


def test_pictures_too_small_to_be_halved_four_times_are_refused():
    net = fj.models.conv4(5, width=4, pooling="max")
    count(net, 16, 16, 1)
    with pytest.raises(ValueError, match="at least 16 x 16, got 20 x 15, or pooling='stride'"):
        count(net, 20, 15, 1)


def test_widths_are_one_number_or_four():
    with pytest.raises(ValueError, match=r"^width must be one number or four, got 3$"):
        fj.models.conv4(5, width=(4, 8, 16))
    with pytest.raises(ValueError, match=r"^width must be an integer of at least 1, got 0$"):
        fj.models.conv4(5, width=(4, 8, 0, 16))


# The layers.


def test_batch_statistics_normalise_each_channel_over_all_other_axes():
    x = draw(6, 5, 4, 3) * np.float32([1, 20, 300]) + np.float32([7, -8, 900])
    norm = BatchStatistics(epsilon=0.0)
    params = norm.init(jax.random.key(0), x)
    normal = np.asarray(norm.apply(params, x))
    np.testing.assert_allclose(normal.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(normal.std((0, 1, 2)), 1, atol=1e-4)
    assert set(params) == {"params"}  # no running averages
    moved = {"params": {"scale": np.float32([2, 3, 4]), "shift": np.float32([-1, 0, 1])}}
    expected = normal * np.float32([2, 3, 4]) + np.float32([-1, 0, 1])
    np.testing.assert_allclose(norm.apply(moved, x), expected, rtol=1e-4, atol=1e-4)


def test_a_constant_channel_is_normalised_to_its_shift():
    norm = BatchStatistics()
    params = {"params": {"scale": np.float32([5]), "shift": np.float32([0.5])}}
    np.testing.assert_array_equal(norm.apply(params, np.full((3, 2, 2, 1), 9.0, np.float32)), 0.5)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (2, 3)])
def test_max_pool_and_its_gradient_are_those_of_reduce_window(size):
    x, weights = draw(2, *size, 3), draw(2, size[0] // 2, size[1] // 2, 3, seed=1)

    def windowed(x):
        window = (1, 2, 2, 1)
        return jax.lax.reduce_window(x, -np.inf, jax.lax.max, window, window, "VALID")

    np.testing.assert_array_equal(max_pool(x), windowed(x), strict=True)

    def gradient(pool):
        return jax.grad(lambda x: (pool(x) * weights).sum())(x)

    np.testing.assert_array_equal(gradient(max_pool), gradient(windowed))


@pytest.mark.parametrize("shape", [(5, 28, 28), (2, 5, 28, 28, 1)])
def test_pictures_of_other_axes_are_refused(shape):
    """Five pictures without channels would be one picture five high."""
    with pytest.raises(ValueError, match=r"must be \[images, height, width, channels\], got"):
        fj.models.conv4(5, width=4).init(jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_of_large_numbers_in_float16(weighted):
    """Their squares are beyond it."""
    x = jnp.asarray(400 * draw(8, 4, 4, 3))
    net, weights = BatchStatistics(), jnp.ones(8) if weighted else None
    params = net.init(jax.random.key(0), x)
    half = fj.compute_in(jnp.float16, net.apply)(params, x, weights)
    np.testing.assert_allclose(half, net.apply(params, x, weights), atol=5e-3)


def test_scaled_features_of_large_numbers_in_float16():
    net, x = fj.models.conv4(3, width=4, features="scaled"), jnp.asarray(draw(4, 16, 16, 1))
    params = random_params(net, x)
    params["params"]["norm3"]["scale"] *= 1000
    full, half = (fj.compute_in(dtype, net.apply)(params, x) for dtype in ("float32", "float16"))
    np.testing.assert_allclose(half, full, atol=0.05)


def test_a_batch_in_which_no_example_counts_is_finite():
    net, x = BatchStatistics(), jnp.asarray(draw(3, 4, 4, 2))
    params = net.init(jax.random.key(0), x)
    out = lambda params: jnp.sum(net.apply(params, x, jnp.zeros(3)) ** 2)
    value, grads = jax.value_and_grad(out)(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((value, grads)))
