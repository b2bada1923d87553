"""Personal pharmacokinetics: from five blood samples of a new patient to the hours that follow.

The anaesthetic remifentanil in 65 volunteers (Minto et al. 1997). A task is a patient: the first
five measured concentrations are given, all later ones are predicted, the washout included.

What is meta-learned is a population model of three compartments: the logarithms of three gains and
three rate constants, how they depend on age, sex and size, and the directions in which patients
differ. Six numbers of a patient's own start near zero and take five steps of gradient descent on
his five samples; how far is learned too. First order needs no derivative through these steps.

Run it: python examples/pharmacokinetics.py --data FOLDER
where FOLDER/remifentanil/remifentanil.csv is, or without to use $FOMAML_JAX_DATA. The gradient
boosting among the baselines needs scikit-learn and is left out without.

This is an example of a method on volunteers in a laboratory. It may not be used to dose anybody:
it knows one drug given at one constant rate to healthy people, no other medicine, illness or
operation, nobody below 20 or above 85; it was never tested on another hospital's data, and it has
been judged by its mean error, where an anaesthetist has to fear the largest.
"""

import argparse
import csv
import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import patient_baselines as baselines
import patient_reports as reports

import fomaml_jax as fj

SHOTS, INNER_STEPS, DELTA, DECAY = 5, 5, 0.2, 0.1
STRENGTHS = (30.0, 60.0, 120.0)
"""What five samples weigh against the population: chosen for each split on training patients."""

FOLDS = 5


class Patients(NamedTuple):
    """Every patient's measured samples, padded.

    Attributes:
        x: `[patients, samples, 8]`: minutes, log of the infusion's rate (ug/min), its end (min), log
            age, sex (1 is male), log weight, log lean mass, log height.
        y: `[patients, samples]`: log of the concentration (ng/ml).
        counts: `[patients]`.
        names: of the patients.
    """

    x: np.ndarray
    y: np.ndarray
    counts: np.ndarray
    names: tuple[str, ...]


def read(path: Path) -> Patients:
    """The table as arrays; rows without a concentration are those of doses, and say when it ends."""
    by_patient: dict[str, list[dict[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            by_patient.setdefault(row["ID"], []).append(row)
    measured = [[row for row in rows if row["conc"]] for rows in by_patient.values()]
    counts = np.array([len(rows) for rows in measured])
    x, y = np.ones((len(counts), counts.max(), 8)), np.zeros((len(counts), counts.max()))
    for p, (rows, samples) in enumerate(zip(by_patient.values(), measured, strict=True)):
        end = next(float(row["Time"]) for row in rows if float(row["Rate"]) == 0)
        age, weight, lean, height = (float(rows[0][c]) for c in ("Age", "Wt", "LBM", "Ht"))
        male = float(rows[0]["Sex"] == "Male")
        about = np.log(age), male, *np.log([weight, lean, height])
        x[p, :, 1:] = np.log(float(rows[0]["Rate"])), end, *about
        x[p, : counts[p], 0] = [float(row["Time"]) for row in samples]
        y[p, : counts[p]] = np.log([float(row["conc"]) for row in samples])
    return Patients(x.astype(np.float32), y.astype(np.float32), counts, tuple(by_patient))


def log_concentration(params, x):
    """The log of the response of three exponentials to an infusion at a constant rate.

    The covariates are the same in all rows of a patient.
    """
    minutes, log_rate, end, about = x[:, :1], x[:, 1], x[:, 2:3], x[0, 3:]
    logs = params["base"] + about @ params["about"] + params["directions"] @ params["patient"]
    gains, constants = jnp.exp(logs[:3]), jnp.exp(logs[3:])
    since_end = jnp.maximum(minutes - end, 0.0)
    response = (jnp.exp(-constants * since_end) - jnp.exp(-constants * minutes)) / constants
    return log_rate + jnp.log(response @ gains + 1e-6)


def loss_fn(params, batch, strength):
    """The misfit, and how far a patient and the covariates may take one from the population."""
    (x, y), weights = batch
    misfit = optax.huber_loss(log_concentration(params, x), y, delta=DELTA)
    far = jnp.sum(params["patient"] ** 2) + DECAY * strength * jnp.sum(params["about"] ** 2)
    return strength * fj.uneven.weighted_mean(misfit, weights) + 0.5 * far


def is_patient(path):
    """What the inner loop adapts."""
    return path == "patient"


def inner(log_rate):
    """Gradient descent at a learned rate."""
    return optax.chain(optax.clip_by_global_norm(10.0), optax.sgd(jnp.exp(log_rate)))


def first_params(key):
    """Gains and rate constants of a fast, a middle and a slow compartment, and some noise."""
    base_key, directions_key = jax.random.split(key)
    usual = jnp.log(jnp.array([0.15, 0.03, 0.001, 0.8, 0.15, 0.02]))
    return {
        "base": usual + 0.2 * jax.random.normal(base_key, (6,)),
        "about": jnp.zeros((5, 6)),
        "directions": 0.2 * jnp.eye(6) + 0.06 * jax.random.normal(directions_key, (6, 6)),
        "patient": jnp.zeros(6),
    }


def fit_and_predict(patients, train, unseen, key, strength, *, steps):
    """Meta-trains on some patients; predicts all samples of others from their first five.

    Args:
        patients: everybody's.
        train: `[m]`, which to train on.
        unseen: `[n]`, which to predict.
        key: of the first parameters.
        strength: what five samples weigh.
        steps: outer steps, each on all patients to train on.

    Returns:
        `[2, n, samples]` log concentrations: of the population's model, and after adaptation.
    """
    about = patients.x[train, 0, 3:]
    centre, spread = about.mean(0), about.std(0)
    x = jnp.concatenate([patients.x[..., :3], (patients.x[..., 3:] - centre) / spread], -1)
    tasks = fj.tasks.each_group((x[train], patients.y[train]), patients.counts[train], shots=SHOTS)
    loss = functools.partial(loss_fn, strength=strength)
    meta_gradient = fj.learned_rates(loss, inner, INNER_STEPS, trainable=is_patient)
    learner = fj.meta_learner(
        fj.over_tasks(meta_gradient, tasks_at_once=None),
        optax.adam(optax.cosine_decay_schedule(1e-2, steps, alpha=0.01)),
    )
    state = learner.init(fj.WithRates(first_params(key), jnp.log(0.1)))
    state, _ = jax.lax.scan(lambda s, _: (learner.step(s, tasks)[0], None), state, length=steps)
    shared, optimizer = state.params.params, inner(state.params.rates)

    def predict(x, y):
        support = (x[:SHOTS], y[:SHOTS]), jnp.ones(SHOTS)
        adapted, _ = fj.adapt(loss, shared, support, optimizer, INNER_STEPS, trainable=is_patient)
        return jnp.stack([log_concentration(params, x) for params in (shared, adapted)])

    return jax.vmap(predict, out_axes=1)(x[unseen], patients.y[unseen])


def all_at_once(patients, train, unseen, keys, strengths, steps):
    """`fit_and_predict` for many trainings in one program: `[trainings, 2, n, samples]`."""
    on_device = patients._replace(
        x=jnp.asarray(patients.x), y=jnp.asarray(patients.y), counts=jnp.asarray(patients.counts)
    )
    fit = jax.vmap(lambda *each: fit_and_predict(on_device, *each, steps=steps))
    return np.asarray(jax.jit(fit)(train, unseen, keys, jnp.asarray(strengths, jnp.float32)))


def cross_validate(patients, train, steps):
    """Errors on held-out training patients, for every strength.

    Args:
        patients: everybody's.
        train: `[splits, m]`, with m a multiple of the folds.
        steps: outer steps.

    Returns:
        The held-out patients `[splits, m]`, and predictions `[strengths, splits, m, samples]`.
    """
    splits, m = train.shape
    held = train.reshape(splits, FOLDS, m // FOLDS)
    others = np.stack(
        [np.delete(held, f, axis=1).reshape(splits, -1) for f in range(FOLDS)], axis=1
    )
    count = len(STRENGTHS) * splits * FOLDS
    repeated = [np.tile(a.reshape(splits * FOLDS, -1), (len(STRENGTHS), 1)) for a in (others, held)]
    keys = jnp.broadcast_to(jax.random.key(0), (count,))
    found = all_at_once(patients, *repeated, keys, np.repeat(STRENGTHS, splits * FOLDS), steps)
    return train, found[:, 1].reshape(len(STRENGTHS), splits, m, -1)


def ensemble(patients, train, unseen, strengths, steps, seeds):
    """Predictions `[seeds, splits, 2, n, samples]` of as many meta-trainings as seeds."""
    keys = jnp.repeat(jax.random.split(jax.random.key(1), seeds), len(train))
    repeated = [np.tile(a, (seeds, 1)) for a in (train, unseen)]
    found = all_at_once(patients, *repeated, keys, np.tile(strengths, seeds), steps)
    return found.reshape(seeds, len(train), *found.shape[1:])


def features(x):
    """What the baselines see of a sample: time, dose and person, as in the data's own page."""
    minutes, log_rate, end = x[..., 0], x[..., 1], x[..., 2]
    on = (minutes <= end).astype(float)
    dose = log_rate + np.log(np.minimum(minutes, end))
    since_end = np.log1p(np.maximum(minutes - end, 0))
    age, male, weight, lean = (x[..., i] for i in (3, 4, 5, 6))
    person = np.exp(age), male, np.exp(weight), np.exp(lean)
    return np.stack([np.log(minutes), since_end, on, dose, log_rate, end, *person], -1)


def main():
    """Meta-trains, runs the baselines on the same patients, reports and draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of the data (or $FOMAML_JAX_DATA)")
    parser.add_argument("--splits", type=int, default=20, help="random splits (20)")
    parser.add_argument("--seeds", type=int, default=3, help="meta-trainings a split (3)")
    parser.add_argument("--steps", type=int, default=300, help="outer steps (300)")
    parser.add_argument("--out", type=Path, help="folder for result and pictures")
    asked = parser.parse_args()

    patients = read(reports.find(asked.data, "remifentanil/remifentanil.csv", parser))
    orders = reports.orders(len(patients.counts), asked.splits)
    train, unseen = orders[:, :50], orders[:, 50:]

    def errors(groups, predicted):
        return reports.absolute_errors(
            patients.y[groups], predicted, patients.counts[groups], SHOTS
        )

    held, cross = cross_validate(patients, train, asked.steps)
    scores = np.stack([errors(held, p).mean(-1) for p in cross])  # [strengths, splits]
    choice = scores.argmin(0)
    strengths = np.array(STRENGTHS)[choice]
    found = ensemble(patients, train, unseen, strengths, asked.steps, asked.seeds)
    predicted = found[:, :, 1].mean(0)
    table = {
        "meta-learned": predicted,
        "one meta-training": found[0, :, 1],
        "population model, not adapted": found[:, :, 0].mean(0),
    } | baselines.of_tables(features(patients.x), patients.y, patients.counts, train, unseen, SHOTS)
    rows = {name: errors(unseen, p) for name, p in table.items()}
    chosen_cross = cross[choice, np.arange(asked.splits)]
    half = reports.half_widths(patients, held, chosen_cross, SHOTS)
    result = reports.summary(rows, unseen, patients.names) | {
        "metric": "mean absolute error of log concentration",
        "splits": asked.splits,
        "seeds": asked.seeds,
        "steps": asked.steps,
        "strengths_chosen": strengths.tolist(),
        "held_out_training_patients": scores.min(0).mean().item(),
        "coverage_of_90_percent": reports.coverage(patients, unseen, predicted, half, SHOTS),
        "coverage_of_ensemble_alone": reports.coverage(
            patients, unseen, predicted, 1.645 * found[:, :, 1].std(0, ddof=1), SHOTS
        )
        if asked.seeds > 1
        else None,
    }
    print(reports.text(result))
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "pharmacokinetics.json").write_text(json.dumps(result, indent=2) + "\n")
        reports.draw(
            asked.out / "pharmacokinetics.png",
            times=patients.x[..., 0],
            patients=patients,
            unseen=unseen[0],
            curves={
                "meta-learned": predicted[0],
                "ridge, shrunk offset": table["ridge, shrunk offset"][0],
            },
            half=half[0],
            shots=SHOTS,
            labels=("minutes", "log concentration (ng/ml)"),
        )


if __name__ == "__main__":
    main()
