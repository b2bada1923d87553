"""The same weights, data and algorithm in PyTorch: another framework's path to the same numbers."""

# pyright: reportMissingImports=false

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import fomaml_jax as fj

torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")

WAYS, STEPS, RATE = 3, 3, 0.1
LAYERS = range(2)
HEAD = ("kernel2", "bias2")


def numbers():
    """Two convolutions with batch statistics and a linear head; a task of pictures."""
    rng = np.random.default_rng(0)
    params = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise((1, 6, 6))):
        params[f"kernel{i}"] = rng.normal(size=(3, 3, fan_in, fan_out)) / np.sqrt(9 * fan_in)
        params[f"bias{i}"] = 0.1 * rng.normal(size=fan_out)
    params["kernel2"] = rng.normal(size=(3 * 3 * 6, WAYS)) / 7
    params["bias2"] = 0.1 * rng.normal(size=WAYS)
    x = rng.normal(size=(2, 4 * WAYS, 12, 12, 1))
    return params, x, np.stack([rng.permutation(np.tile(np.arange(WAYS), 4)) for _ in range(2)])


def jax_loss(params, batch):
    x, y = batch
    for i in LAYERS:
        x = lax.conv_general_dilated(
            x,
            params[f"kernel{i}"],
            (2, 2),
            [(1, 1), (1, 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = x + params[f"bias{i}"].reshape(1, 1, 1, -1)
        centred = x - x.mean((0, 1, 2), keepdims=True)
        x = jax.nn.relu(centred * lax.rsqrt(jnp.mean(centred**2, (0, 1, 2), keepdims=True) + 1e-5))
    logits = x.reshape(x.shape[0], -1) @ params["kernel2"] + params["bias2"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def torch_loss(params, x, y):
    x = x.permute(0, 3, 1, 2)
    for i in LAYERS:
        kernel = params[f"kernel{i}"].permute(3, 2, 0, 1)
        x = torch.nn.functional.conv2d(x, kernel, params[f"bias{i}"], stride=2, padding=1)
        x = torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True))
    flat = x.permute(0, 2, 3, 1).flatten(1)
    return torch.nn.functional.cross_entropy(flat @ params["kernel2"] + params["bias2"], y)


def torch_meta_gradient(params, rates, x, y, adapted, second_order):
    """As most PyTorch code has it, by `autograd.grad` with and without `create_graph`."""
    params, rates = (
        {name: torch.tensor(p, requires_grad=True) for name, p in tree.items()}
        for tree in (params, rates)
    )
    x, y = torch.tensor(x), torch.tensor(y)
    theta = dict(params)
    for _ in range(STEPS):
        value = torch_loss(theta, x[0], y[0])
        grads = torch.autograd.grad(value, [theta[n] for n in adapted], create_graph=second_order)
        for name, grad in zip(adapted, grads, strict=True):
            theta[name] = theta[name] - rates[name] * (grad if second_order else grad.detach())
    torch_loss(theta, x[1], y[1]).backward()
    return tuple(
        {n: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for n, p in tree.items()}
        for tree in (params, rates)
    )


ALL = ("kernel0", "bias0", "kernel1", "bias1", *HEAD)
SGD = optax.sgd(RATE)
ALGORITHMS = {
    "FOMAML": (lambda loss: fj.fomaml(loss, SGD, STEPS), ALL, False),
    "MAML": (lambda loss: fj.maml(loss, SGD, STEPS), ALL, True),
    "ANIL": (lambda loss: fj.fomaml(loss, SGD, STEPS, trainable=HEAD.__contains__), HEAD, False),
    "ANIL, second order": (
        lambda loss: fj.maml(loss, SGD, STEPS, trainable=HEAD.__contains__),
        HEAD,
        True,
    ),
}


def assert_agree(ours, theirs):
    for name, expected in theirs.items():
        scale = max(np.abs(expected).max(), 1e-6)
        np.testing.assert_allclose(ours[name] / scale, expected / scale, atol=1e-5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("matmul", [False, True])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_meta_gradients_agree(name, matmul):
    make, adapted, second_order = ALGORITHMS[name]
    params, x, y = numbers()
    rates = {name: np.array(RATE) for name in params}
    expected, _ = torch_meta_gradient(params, rates, x, y, adapted, second_order)
    loss = fj.matmul_convolutions(jax_loss) if matmul else jax_loss
    task = fj.Task(*((jnp.asarray(x[i]), jnp.asarray(y[i])) for i in range(2)))
    grads, _ = jax.jit(make(loss))(jax.tree.map(jnp.asarray, params), task)
    assert_agree(grads, expected)


@pytest.mark.usefixtures("float64")
def test_meta_sgd_agrees():
    params, x, y = numbers()
    rng = np.random.default_rng(1)
    rates = {name: rng.uniform(0.05, 0.2, size=p.shape) for name, p in params.items()}
    of_params, of_rates = torch_meta_gradient(params, rates, x, y, ALL, second_order=False)
    task = fj.Task(*((jnp.asarray(x[i]), jnp.asarray(y[i])) for i in range(2)))
    shared = fj.WithRates(*(jax.tree.map(jnp.asarray, tree) for tree in (params, rates)))
    grads, _ = jax.jit(fj.meta_sgd(jax_loss, STEPS))(shared, task)
    assert_agree(grads.params, of_params)
    assert_agree(grads.rates, of_rates)
