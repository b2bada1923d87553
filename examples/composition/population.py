"""A population of learners, each with an inner rate of its own, trained side by side by `vmap`.

Also shows a meta-step inside a `lax.scan` of one's own, and optax outside: a schedule, clipping, a
moving average of the parameters.
"""

import jax
import jax.numpy as jnp
import optax

import fomaml_jax as fj

RATES = jnp.array([0.001, 0.003, 0.01, 0.03])

net = fj.models.mlp()
sample_task = fj.tasks.sinusoid(shots=5, queries=10)


def loss_fn(params, batch):
    """Mean squared error."""
    return jnp.mean((net.apply(params, batch[0]) - batch[1]) ** 2)


def learner_with(rate):
    """A learner whose inner rate is a number that may be traced."""
    inner = optax.chain(optax.clip_by_global_norm(10.0), optax.sgd(rate))
    per_task = fj.fomaml(loss_fn, inner, num_steps=5)
    outer = optax.chain(
        optax.clip_by_global_norm(10.0),
        optax.adam(optax.cosine_decay_schedule(1e-3, 2000, alpha=0.1)),
    )
    return fj.meta_learner(
        fj.over_tasks(lambda params, key: per_task(params, sample_task(key)), tasks_at_once=None),
        outer,
    )


def train(rate, seed, steps):
    """One member of the population: the last parameters' moving average, and the losses."""
    learner, average = learner_with(rate), optax.ema(0.99)
    start, tasks = jax.random.split(jax.random.key(seed))
    state = learner.init(net.init(start, jnp.zeros((1, 1))))

    def step(carry, _):
        state, average_state, _ = carry
        state, info = learner.step(state, fj.tasks.task_keys(tasks, state.step, 25))
        averaged, average_state = average.update(state.params, average_state)
        return (state, average_state, averaged), info.loss

    carry = (state, average.init(state.params), state.params)
    (_, _, averaged), losses = jax.lax.scan(step, carry, length=steps)
    return averaged, losses


def main(steps=2000):
    """Trains all rates at once, and tells how each did."""
    members = jax.jit(jax.vmap(lambda rate: train(rate, 0, steps)))
    _, losses = members(RATES)
    for rate, loss in zip(RATES, losses, strict=True):
        print(
            f"inner rate {rate:.3f}: query loss {loss[:100].mean():.2f} -> {loss[-100:].mean():.2f}"
        )
    return losses


if __name__ == "__main__":
    main()
