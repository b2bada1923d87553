"""Personal pharmacokinetics: from five blood samples of a new patient to the next hour or two.

The anaesthetic remifentanil in 65 volunteers (Minto et al. 1997). A task is a patient: the first
five measured concentrations are given, most of them during the infusion, and all later ones are
predicted, the washout included.

What is meta-learned is a population model of three compartments: the logarithms of three gains and
three rate constants, how they depend on age, sex and size, and the directions in which patients
differ. Six numbers of a patient's own start at zero and take five steps of gradient descent on
his five samples; how far is learned too. First order needs no derivative through these steps.

Run it: python examples/pharmacokinetics.py --data FOLDER
where FOLDER/remifentanil/remifentanil.csv is, or without to use $FOMAML_JAX_DATA: the data set
Remifentanil of R's nlme as CSV (ID, Time, conc, Rate, Amt, Age, Sex, Ht, Wt, LBM). The gradient
boosting among the baselines needs scikit-learn (pip install 'fomaml-jax[patients]') and is left
out without.

This is an example of a method on volunteers in a laboratory. It may not be used to dose anybody:
it knows one drug given at one constant rate to healthy people, no other medicine, illness or
operation, nobody below 20 or above 85; it was never tested on another hospital's data, and it has
been judged by its mean error, where an anaesthetist has to fear the largest.
"""

import csv
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import patient_baselines as baselines
from patient_models import Model, Patients
from patient_study import Study, main


def read(path: Path) -> Patients:
    """The measured samples; rows without a concentration are of doses, and say when they end.

    The eight features are minutes, log of the infusion's rate (ug/min), its end (min), log age, sex
    (1 is male), log weight, log lean mass and log height; the target is the log of the
    concentration (ng/ml).
    """
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


def penalty(params):
    """What people are must explain a good deal before it is believed."""
    return 1e-3 * jnp.sum(params["about"] ** 2)


def standardise(x, train):
    """What people are, by the patients to train on alone."""
    about = x[train, 0, 3:]
    return jnp.concatenate([x[..., :3], (x[..., 3:] - about.mean(0)) / about.std(0)], -1)


MODEL = Model(
    init=first_params,
    predict=log_concentration,
    penalty=penalty,
    standardise=standardise,
    queries=None,
    strengths=(60.0, 120.0),
    delta=0.2,
)


def features(x):
    """What the baselines see of a sample: time, dose and person, as in the data's own page."""
    minutes, log_rate, end = x[..., 0], x[..., 1], x[..., 2]
    on = (minutes <= end).astype(float)
    dose = log_rate + np.log(np.minimum(minutes, end))
    since_end = np.log1p(np.maximum(minutes - end, 0))
    age, male, weight, lean = (x[..., i] for i in (3, 4, 5, 6))
    person = np.exp(age), male, np.exp(weight), np.exp(lean)
    return np.stack([np.log(minutes), since_end, on, dose, log_rate, end, *person], -1)


def usual_models(patients, train, unseen, steps):
    """The predictions of everything that is to be beaten."""
    del steps
    x = features(patients.x)
    return baselines.of_tables(x, patients.y, patients.counts, train, unseen, MODEL.shots)


STUDY = Study(
    file="remifentanil/remifentanil.csv",
    read=read,
    trained=50,
    model=MODEL,
    usual=usual_models,
    steps=300,
    metric="log concentration",
    against=("ridge, shrunk offset",),
    times=lambda patients: patients.x[..., 0],
    labels=("minutes since the infusion began", "log concentration (ng/ml)"),
)

if __name__ == "__main__":
    main(STUDY, "pharmacokinetics", __doc__)
