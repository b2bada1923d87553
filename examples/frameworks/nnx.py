"""Few-shot letters with a Flax NNX network, split into its graph and its parameters."""

import functools
import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import fomaml_jax as fj

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 1000  # outer steps

rngs, layers = nnx.Rngs(0), []
for channels in (1, 32, 32):
    layers += [nnx.Conv(channels, 32, (3, 3), strides=2, rngs=rngs)]
    layers += [nnx.GroupNorm(32, num_groups=8, rngs=rngs), nnx.relu]
layers += [lambda x: x.reshape(x.shape[0], -1), nnx.Linear(4 * 4 * 32, 5, rngs=rngs)]
graph, initial = nnx.split(nnx.Sequential(*layers))


def predict(params, images):
    return nnx.merge(graph, params)(images)


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
