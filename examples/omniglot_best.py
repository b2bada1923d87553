"""The recipe of `fomaml-jax train omniglot --recipe best`, written out in plain functions.

One network for any number of classes: the head starts at zero in every task, over features of one
norm, and its inner rate is learned. The one inner step moves the head alone (a head of zeros
sends no gradient down); what first order learns are the features that this step needs.

Run it: python examples/omniglot_best.py --data FOLDER
with the folder of Omniglot's two archives, or without to use $FOMAML_JAX_DATA or a download.
"""

import argparse
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fomaml_jax as fj

TRAIN_WAYS = 20
TASKS = 4  # of an outer step


def network(ways, width):
    """Four blocks, wider where pictures are small."""
    widths = (width, width, 2 * width, 4 * width)
    return fj.models.conv4(ways, width=widths, pooling="max", features="scaled")


@fj.matmul_convolutions
def logits(params, images):
    """For as many classes as the head has."""
    width = params["conv0"]["kernel"].shape[-1]
    ways = params["head"]["kernel"].shape[-1]
    return jnp.asarray(network(ways, width).apply({"params": params}, images))


def loss_fn(params, batch):
    """The mean cross-entropy."""
    images, labels = batch
    predicted = logits(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(predicted, labels).mean()


def accuracy(params, batch):
    """The share of right answers; the queries are normalised together."""
    images, labels = batch
    return jnp.mean(logits(params, images).argmax(-1) == labels)


def with_head(body, ways):
    """The network that a task starts from."""
    size = body["norm3"]["scale"].shape[0]
    return body | {"head": {"kernel": jnp.zeros((size, ways)), "bias": jnp.zeros(ways)}}


def inner(logarithms, ways):
    """Descent of the head alone, at learned rates: the logarithms of those for each way."""
    rates = jax.tree.map(lambda x: ways * jnp.exp(x), logarithms)
    return fj.rates.scale_by_rates(rates)


def in_head(path):
    """What the inner loop adapts."""
    return "head" in path


def meta_gradient(shared, task):
    """FOMAML of body and rates; the head is thrown away with its gradient."""
    algorithm = fj.learned_rates(
        loss_fn, lambda logs: inner(logs, TRAIN_WAYS), num_steps=1, trainable=in_head
    )
    params = with_head(shared.params, TRAIN_WAYS)
    grads, info = algorithm(fj.WithRates(params, shared.rates), task)
    body = {name: layer for name, layer in grads.params.items() if name != "head"}
    return fj.WithRates(body, grads.rates), info


def adapt_fn(ways):
    """Adaptation to a task of so many classes."""

    def adapt(shared, support):
        start, optimizer = with_head(shared.params, ways), inner(shared.rates, ways)
        return fj.adapt(loss_fn, start, support, optimizer, 1, trainable=in_head)[0]

    return adapt


def first_shared(width):
    """What training starts from."""
    params = network(TRAIN_WAYS, width).init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    body = {name: layer for name, layer in params.items() if name != "head"}
    rates = jax.tree.map(lambda x: jnp.log(jnp.full((), 0.15)), params)
    return fj.WithRates(body, rates)


def training_tasks(classes):
    """Each character turned and mirrored is a class of its own; pictures are shifted a little."""
    images = np.concatenate([classes.images, classes.images[:, :, :, ::-1]])
    return fj.tasks.episodes(
        fj.tasks.rotated_classes(images),
        ways=TRAIN_WAYS,
        shots=1,
        queries=5,
        augment=fj.tasks.random_shift(1),
    )


def main():
    """Trains on the Vinyals training characters, and tests on characters never seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of Omniglot's archives")
    parser.add_argument("--steps", type=int, default=10_000, help="outer steps (10000)")
    parser.add_argument("--width", type=int, default=32, help="channels of the first block (32)")
    parser.add_argument("--tasks", type=int, default=1000, help="test tasks (1000)")
    asked = parser.parse_args()

    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    devices = math.gcd(TASKS, jax.device_count())
    mesh = jax.make_mesh((devices,), ("tasks",), (jax.sharding.AxisType.Auto,))
    splits = fj.datasets.omniglot(asked.data)
    sample_task = training_tasks(splits.train)
    learner = fj.meta_learner(
        fj.over_tasks(lambda shared, key: meta_gradient(shared, sample_task(key)), mesh=mesh),
        optax.adam(optax.cosine_decay_schedule(1e-2, asked.steps, alpha=0.01)),
    )
    trained = fj.train(
        learner,
        first_shared(asked.width),
        lambda key: key,  # the tasks are keys, sampled one by one inside the step
        jax.random.key(1),
        tasks_per_step=TASKS,
        steps=asked.steps,
        mesh=mesh,
    )
    for ways, shots in ((5, 1), (5, 5), (20, 1), (20, 5)):
        test = fj.tasks.episodes(
            splits.test.images, ways=ways, shots=shots, queries=5, rotations=True
        )
        found = jax.jit(
            lambda shared, test=test, ways=ways: fj.evaluate(
                adapt_fn(ways),
                accuracy,
                shared,
                test,
                jax.random.key(2),
                num_tasks=asked.tasks,
                mesh=mesh,
            )
        )(trained.state.params)
        print(
            f"{ways}-way {shots}-shot, transductive, {asked.tasks} tasks: "
            f"{100 * found.mean:.2f} ± {100 * found.ci95:.2f} %"
        )


if __name__ == "__main__":
    main()
