"""Few-shot regression of sine waves: a network that fits a new wave from five points.

The library's functions in the order in which one meets them; nothing else is needed to
meta-train a model of your own. Run it: python examples/sinusoid.py
"""

import argparse

import jax
import jax.numpy as jnp
import optax

import fomaml_jax as fj

# A task is five points of one wave to adapt on, and ten more to be judged on.
sample_task = fj.tasks.sinusoid(shots=5, queries=10)

net = fj.models.mlp(hidden=(40, 40), outputs=1)


def loss_fn(params, batch):
    """Mean squared error."""
    x, y = batch
    return jnp.mean((net.apply(params, x) - y) ** 2)


# Without clipping, five points near the ends of a steep wave make the inner loop diverge.
inner = optax.chain(optax.clip_by_global_norm(10.0), optax.sgd(0.01))


def train(steps, seed=0):
    """Meta-trains for `steps` meta-batches of 25 waves; returns the shared parameters."""
    meta_gradient = fj.over_tasks(fj.fomaml(loss_fn, inner, num_steps=5), tasks_at_once=None)
    learner = fj.meta_learner(meta_gradient, optax.adam(optax.cosine_decay_schedule(1e-3, steps)))
    init_key, task_key = jax.random.split(jax.random.key(seed))

    def step(state, _):
        tasks = jax.vmap(sample_task)(fj.tasks.task_keys(task_key, state.step, 25))
        state, info = learner.step(state, tasks)
        return state, info.loss

    state = learner.init(net.init(init_key, jnp.zeros((1, 1))))
    state, losses = jax.jit(lambda state: jax.lax.scan(step, state, length=steps))(state)
    return state.params, losses


def error_after(params, num_steps, num_tasks=1000, seed=1):
    """The error on waves never seen, after so many steps on five points of each."""
    unseen = fj.tasks.sinusoid(shots=5, queries=100)

    def adapt_fn(params, support):
        return fj.adapt(loss_fn, params, support, inner, num_steps)[0]

    evaluate = jax.jit(
        lambda params: fj.evaluate(
            adapt_fn,
            loss_fn,
            params,
            unseen,
            jax.random.key(seed),
            num_tasks=num_tasks,
            tasks_at_once=None,
        )
    )
    return evaluate(params)


def main():
    """Trains, and prints the error before and after adaptation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000, help="outer steps (default: 20000)")
    steps = parser.parse_args().steps
    if steps < 1:
        parser.error(f"--steps must be at least 1, got {steps}")
    params, losses = train(steps)
    part = max(1, steps // 20)
    print(f"query loss while training: {losses[:part].mean():.2f} in the first twentieth,")
    print(f"                           {losses[-part:].mean():.2f} in the last")
    for num_steps in (0, 1, 5, 10):
        report = error_after(params, num_steps)
        print(
            f"mean squared error after {num_steps:2} steps: {report.mean:.2f} ± {report.ci95:.2f}"
        )


if __name__ == "__main__":
    main()
