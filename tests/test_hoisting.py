"""What does not depend on the argument is computed once, and nothing else changes."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import io_callback
from problems import assert_close

from fomaml_jax.hoisting import hoisted

BODY = jnp.linspace(-1.0, 1.0, 20).reshape(5, 4)
HEAD = jnp.linspace(-0.5, 1.0, 12).reshape(4, 3)
X = jnp.cos(jnp.arange(35.0)).reshape(7, 5)


def plain(body, head):
    features = jax.nn.relu(X @ body)
    return jnp.sum(jnp.tanh(features @ head)), features.mean()


@jax.jit
def jitted(body, head):
    return jax.jit(plain)(body, head)


def looped(body, head):
    def layer(x, _):
        return jnp.tanh(x @ body @ body.T), None

    x, _ = jax.lax.scan(layer, X, length=2)
    return jnp.sum(x @ body @ head), x.mean()


def descend(body, head, loss, hoist):
    fn = lambda head: loss(body, head)
    fn = hoisted(fn, head) if hoist else fn

    def step(head, _):
        (value, aux), grads = jax.value_and_grad(fn, has_aux=True)(head)
        return head - 0.1 * grads, (value, aux)

    return jax.lax.scan(step, head, length=3)


TRANSFORMED = {
    "plain": lambda fn: fn(BODY, HEAD),
    "jit": lambda fn: jax.jit(fn)(BODY, HEAD),
    "vmap": lambda fn: jax.vmap(fn)(jnp.stack([BODY, -BODY]), jnp.stack([HEAD, 2 * HEAD])),
    "grad": lambda fn: jax.grad(lambda *args: fn(*args)[0].sum(), (0, 1))(BODY, HEAD),
    "jvp": lambda fn: jax.jvp(fn, (BODY, HEAD), (jnp.ones_like(BODY), HEAD)),
}


@pytest.mark.parametrize("loss", [plain, jitted, looped])
@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=TRANSFORMED)
def test_equal_under_every_transformation(loss, transformed):
    ours, theirs = (
        transformed(lambda body, head, hoist=hoist: descend(body, head, loss, hoist))
        for hoist in (True, False)
    )
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("loss", [plain, jitted, looped])
def test_constants_leave_the_loop(loss):
    program = jax.make_jaxpr(lambda b, h: descend(b, h, loss, True))(BODY, HEAD)
    (loop,) = [e for e in program.eqns if e.primitive.name == "scan" and e.params["length"] == 3]
    assert "5,4" not in str(loop.params["jaxpr"])  # the body's kernel is not seen inside


def test_effects_stay_where_they_are():
    calls = []

    def loss(head):
        io_callback(lambda: calls.append(1), None)
        return jnp.sum(head), jnp.zeros(())

    fn = hoisted(loss, HEAD)
    jax.lax.scan(lambda head, _: (head + fn(head)[0], None), HEAD, length=3)
    jax.effects_barrier()
    assert len(calls) == 3


def test_a_function_that_needs_no_argument():
    total, mean = hoisted(lambda head: (jnp.sum(BODY), jnp.mean(BODY)), HEAD)(HEAD)
    assert_close((total, mean), (BODY.sum(), BODY.mean()))
