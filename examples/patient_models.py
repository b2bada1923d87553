"""A model of a population, meta-learned so that a patient's first rows make it his own."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fomaml_jax as fj

INNER_STEPS, FOLDS = 5, 5


class Patients(NamedTuple):
    """Every patient's rows in the order of time, padded.

    Attributes:
        x: `[patients, rows, features]`.
        y: `[patients, rows]`, what is to be predicted.
        counts: `[patients]`, real rows.
        names: of the patients.
    """

    x: Any
    y: Any
    counts: Any
    names: tuple[str, ...]


class Model(NamedTuple):
    """A population, in which `params["patient"]` alone is a patient's own.

    Attributes:
        init: `key -> params`.
        predict: `(params, x [rows, features]) -> [rows]`.
        penalty: `params -> []`, against which the population is fitted.
        standardise: `(x, train) -> x`, by the patients to train on alone.
        queries: rows a patient is judged on in a step of training, at random; `None` is all.
        strengths: what a patient's rows may weigh against the population.
        delta: errors beyond this count linearly.
        unit: what errors are counted in, so that one is large.
        rate: the first inner rate; it is learned.
        clip: the largest norm of an inner gradient.
        shots: rows given.
    """

    init: Callable[[jax.Array], dict[str, jax.Array]]
    predict: Callable[[Any, jax.Array], jax.Array]
    penalty: Callable[[Any], jax.Array]
    standardise: Callable[[Any, Any], Any]
    queries: int | None
    strengths: tuple[float, ...]
    delta: float
    unit: float = 1.0
    rate: float = 0.1
    clip: float = 10.0
    shots: int = 5


def is_patient(path: str) -> bool:
    """What the inner loop adapts."""
    return path == "patient"


def everybody_alike(shared: fj.WithRates) -> fj.WithRates:
    """What is not meta-learned: all start from the population, whose mean is zero."""
    return fj.WithRates({name: is_patient(name) for name in shared.params}, False)


def inner(log_rate: jax.Array, clip: float) -> optax.GradientTransformation:
    """Gradient descent at a learned rate."""
    return optax.chain(optax.clip_by_global_norm(clip), optax.sgd(jnp.exp(log_rate)))


def loss_fn(params, batch, model, strength):
    """The misfit, and how far a patient is from the population."""
    (x, y), weights = batch
    misfit = optax.huber_loss((model.predict(params, x) - y) / model.unit, delta=model.delta)
    far = 0.5 * jnp.sum(params["patient"] ** 2) + strength * model.penalty(params)
    return strength * fj.uneven.weighted_mean(misfit, weights) + far


def fit_and_predict(model, patients, train, unseen, key, strength, *, steps):
    """Meta-trains on some patients; predicts all rows of others from their first ones.

    Returns:
        `[2, n, rows]`: what the population's model predicts, and the patient's own.
    """
    x = model.standardise(patients.x, train)
    rows, counts = (x[train], patients.y[train]), patients.counts[train]
    task_key = jax.random.fold_in(key, 1)
    loss = functools.partial(loss_fn, model=model, strength=strength)
    descent = functools.partial(inner, clip=model.clip)
    learner = fj.meta_learner(
        fj.over_tasks(
            fj.learned_rates(loss, descent, INNER_STEPS, trainable=is_patient), tasks_at_once=None
        ),
        optax.chain(
            optax.adam(optax.cosine_decay_schedule(1e-2, steps, alpha=0.01)),
            optax.masked(optax.set_to_zero(), everybody_alike),
        ),
    )

    def step(state, _):
        if model.queries is None:
            tasks = fj.tasks.each_group(rows, counts, shots=model.shots)
        else:
            sample_task = fj.tasks.from_groups(
                rows, counts, shots=model.shots, queries=model.queries
            )
            tasks = jax.vmap(sample_task)(fj.tasks.task_keys(task_key, state.step, 16))
        return learner.step(state, tasks)[0], None

    state = learner.init(fj.WithRates(model.init(key), jnp.log(model.rate)))
    state, _ = jax.lax.scan(step, state, length=steps)
    shared, optimizer = state.params.params, descent(state.params.rates)

    def predict(x, y):
        support = (x[: model.shots], y[: model.shots]), jnp.ones(model.shots)
        own, _ = fj.adapt(loss, shared, support, optimizer, INNER_STEPS, trainable=is_patient)
        return jnp.stack([model.predict(params, x) for params in (shared, own)])

    return jax.vmap(predict, out_axes=1)(x[unseen], patients.y[unseen])


def all_at_once(model, patients, train, unseen, keys, strengths, steps):
    """`fit_and_predict` for many trainings in one program: `[trainings, 2, n, rows]`."""
    x, y = (jnp.asarray(a, jnp.float32) for a in (patients.x, patients.y))
    there = patients._replace(x=x, y=y, counts=jnp.asarray(patients.counts))
    fit = jax.vmap(functools.partial(fit_and_predict, model, there, steps=steps))
    return np.asarray(jax.jit(fit)(train, unseen, keys, jnp.asarray(strengths, jnp.float32)))


def cross_validate(model, patients, train, steps):
    """What each strength predicts of training patients who were held out.

    Args:
        model: the model.
        patients: everybody's rows.
        train: `[splits, m]`, who may be used.
        steps: outer steps.

    Returns:
        The held-out patients `[splits, k]`, all or but a few, and predictions
        `[strengths, splits, k, rows]`.
    """
    splits, m = train.shape
    held = train[:, : m // FOLDS * FOLDS].reshape(splits, FOLDS, -1)
    others = [[np.setdiff1d(train[s], held[s, f]) for f in range(FOLDS)] for s in range(splits)]
    count, strengths = splits * FOLDS, model.strengths
    known, new = (np.tile(np.reshape(a, (count, -1)), (len(strengths), 1)) for a in (others, held))
    keys = jnp.broadcast_to(jax.random.key(0), (count * len(strengths),))
    found = all_at_once(model, patients, known, new, keys, np.repeat(strengths, count), steps)
    kept = held.reshape(splits, -1)
    return kept, found[:, 1].reshape(len(strengths), *kept.shape, -1)


def ensemble(model, patients, train, unseen, strengths, steps, seeds):
    """Predictions `[seeds, splits, 2, n, rows]` of as many meta-trainings as seeds."""
    keys = jnp.repeat(jax.random.split(jax.random.key(1), seeds), len(train))
    known, new = (np.tile(a, (seeds, 1)) for a in (train, unseen))
    found = all_at_once(model, patients, known, new, keys, np.tile(strengths, seeds), steps)
    return found.reshape(seeds, len(train), *found.shape[1:])
