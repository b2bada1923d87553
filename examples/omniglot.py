"""Few-shot recognition of handwritten characters with any Flax network, every layer adapting.

Shows what pictures need beyond the sine waves: episodes from arrays on the device, convolutions as
matrix products, a sampler inside the compiled step, and an evaluation after every inner step.

Run it: python examples/omniglot.py --data FOLDER
with the folder of Omniglot's two archives, or without to use $FOMAML_JAX_DATA or a download.
"""

import argparse

import jax
import jax.numpy as jnp
import optax

import fomaml_jax as fj


def build(ways):
    """The network's initial parameters, its loss and its accuracy."""
    net = fj.models.conv4(ways, width=32)
    params = net.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))

    # One call makes an unchanged network fast under vmap and in loops: see matmul_convolutions.
    @fj.matmul_convolutions
    def predict(params, images) -> jax.Array:
        return jnp.asarray(net.apply(params, images))

    def loss_fn(params, batch):
        images, labels = batch
        logits = predict(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def accuracy(params, batch):
        images, labels = batch
        return jnp.mean(predict(params, images).argmax(-1) == labels)

    return params, loss_fn, accuracy


def train(params, loss_fn, sample_task, inner, *, steps, tasks_per_step, num_steps):
    """First-order MAML; the tasks are sampled one by one inside the compiled step."""
    meta_gradient = fj.fomaml(loss_fn, inner, num_steps)
    learner = fj.meta_learner(
        fj.over_tasks(lambda params, key: meta_gradient(params, sample_task(key))),
        optax.adam(optax.cosine_decay_schedule(3e-3, steps, alpha=0.01)),
    )
    key = jax.random.key(1)

    @jax.jit
    def step(state):
        return learner.step(state, fj.tasks.task_keys(key, state.step, tasks_per_step))

    state = learner.init(params)
    for n in range(steps):
        state, info = step(state)
        if n % max(steps // 10, 1) == 0:
            print(f"step {n:5}  query loss {info.loss:.3f}  finite tasks {info.num_finite}")
    return state.params


def main():
    """Trains on the Vinyals training characters, and tests on characters never seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of Omniglot's archives")
    parser.add_argument("--ways", type=int, default=5, help="classes in an episode (5)")
    parser.add_argument("--shots", type=int, default=1, help="support examples a class (1)")
    parser.add_argument("--steps", type=int, default=1500, help="outer steps (1500)")
    parser.add_argument("--tasks", type=int, default=600, help="test tasks (600)")
    asked = parser.parse_args()

    splits = fj.datasets.omniglot(asked.data)
    episode = {"ways": asked.ways, "shots": asked.shots, "queries": 5}
    sample_train = fj.tasks.episodes(fj.tasks.rotated_classes(splits.train.images), **episode)
    sample_test = fj.tasks.episodes(splits.test.images, rotations=True, **episode)

    params, loss_fn, accuracy = build(asked.ways)
    inner = optax.sgd(0.1)
    params = train(
        params, loss_fn, sample_train, inner, steps=asked.steps, tasks_per_step=8, num_steps=3
    )
    for num_steps in (0, 1, 3):
        report = jax.jit(
            lambda params, num_steps=num_steps: fj.evaluate(
                lambda p, support: fj.adapt(loss_fn, p, support, inner, num_steps)[0],
                accuracy,
                params,
                sample_test,
                jax.random.key(2),
                num_tasks=asked.tasks,
            )
        )(params)
        print(
            f"accuracy after {num_steps} steps (transductive, {asked.tasks} tasks): "
            f"{100 * report.mean:.1f} ± {100 * report.ci95:.1f} %"
        )


if __name__ == "__main__":
    main()
