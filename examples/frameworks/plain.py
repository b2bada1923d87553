"""Few-shot letters with a network in plain JAX."""

import functools
import sys

import jax
import jax.numpy as jnp
import optax

import fomaml_jax as fj

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 1000  # outer steps

he = jax.nn.initializers.he_normal()
keys = jax.random.split(jax.random.key(0), 4)
initial = {
    "kernels": [he(k, (3, 3, c, 32)) for k, c in zip(keys[:3], (1, 32, 32), strict=True)],
    "head": he(keys[3], (4 * 4 * 32, 5)),
}


def predict(params, x):
    for kernel in params["kernels"]:
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(jax.nn.standardize(x, (1, 2, 3)))
    return x.reshape(x.shape[0], -1) @ params["head"]


@fj.matmul_convolutions  # the one line that makes an unchanged network fast over tasks
def loss_fn(params, batch):
    logits = predict(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def accuracy(params, batch):
    return jnp.mean(predict(params, batch[0]).argmax(-1) == batch[1])


# Five characters a task, each shown once; those of the test are of scripts never seen.
letters = fj.datasets.glyphs()
episodes = functools.partial(fj.tasks.episodes, ways=5, shots=1, queries=3)
train, test = episodes(letters.train.images), episodes(letters.test.images)
inner = optax.sgd(0.1)
meta_gradient = fj.fomaml(loss_fn, inner, num_steps=3)
over_tasks = fj.over_tasks(lambda params, key: meta_gradient(params, train(key)))
learner = fj.meta_learner(over_tasks, optax.adam(3e-3))
keys = fj.tasks.task_keys(jax.random.key(1), 0, 8 * STEPS).reshape(STEPS, 8)
state, info = jax.lax.scan(learner.step, learner.init(initial), keys)


def adapted(params, support):
    return fj.adapt(loss_fn, params, support, inner, num_steps=3)[0]


report = fj.evaluate(adapted, accuracy, state.params, test, jax.random.key(2), num_tasks=200)
print(f"accuracy on unseen scripts: {100 * report.mean:.1f} ± {100 * report.ci95:.1f} %")
