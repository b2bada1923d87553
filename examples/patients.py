"""Parkinson's disease at a distance: from a new patient's first recordings to his later scores.

42 patients recorded their voice at home for half a year (Tsanas et al. 2009). A task is a patient:
the first five recordings are given with the clinician's score (total UPDRS), the later ones are to
be scored from 16 measures of the voice, age, sex and the day. Patients are unseen in training.

What is meta-learned is a population: how a score drifts, what the voice, age and sex say about
level and drift, and how patients differ. Two numbers of a patient's own are adapted by five steps
of gradient descent on his five recordings; how far is learned too.

The first five recordings are of the first day but for two patients, so their scores are one score.
And scores were taken at three visits only and interpolated between: any two days' scores tell
the slope to the next visit, which is why recordings of several days are not given here, and why
a split at random inside of a patient, in which later scores surround a given one, is too easy.

Run it: python examples/patients.py --data FOLDER
where FOLDER/parkinsons/parkinsons_updrs.csv is, or without to use $FOMAML_JAX_DATA. The data are
UCI's Parkinsons Telemonitoring (https://doi.org/10.24432/C5ZS3N, CC BY 4.0), with its own header.
The mixed-effects models among the baselines need statsmodels (pip install 'fomaml-jax[patients]')
and are left out without.

This may not be used to judge how a patient fares, to change a treatment, or in the place of a
visit: 42 volunteers of one trial at an early stage, scores that are interpolated, and an error as
large as the change in half a year that it should find. It says what a score may be if nothing
happens; it cannot notice that something did.
"""

import csv
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import patient_baselines as baselines
from patient_models import Model, Patients
from patient_study import Study, main


def read(path: Path) -> Patients:
    """All recordings; the features are hundreds of days since the first, age, sex, and 16 of voice.

    Voice measures are positive with long tails: their logarithms are taken.
    """
    by_patient: dict[str, list[list[float]]] = {}
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    places = [header.index(name) for name in ("test_time", "total_UPDRS", "age", "sex")]
    for row in rows:
        voice = [float(cell) for cell in row[header.index("Jitter(%)") :]]
        numbers = [float(row[place]) for place in places]
        by_patient.setdefault(row[0], []).append([*numbers, *voice])
    found = [np.array(sorted(rows, key=lambda row: row[0])) for rows in by_patient.values()]
    counts = np.array([len(rows) for rows in found])
    x, y = np.ones((len(found), counts.max(), 19)), np.zeros((len(found), counts.max()))
    for p, rows in enumerate(found):
        x[p, : len(rows), 0] = (rows[:, 0] - rows[0, 0]) / 100
        x[p, : len(rows), 1:3], x[p, : len(rows), 3:] = rows[:, 2:4], np.log(rows[:, 4:])
        y[p, : len(rows)] = rows[:, 1]
    return Patients(x, y, counts, tuple(by_patient))


def first_params(key):
    """A score that does not drift, and patients who differ in level above all."""
    return {
        "level": 2.5 + 0.1 * jax.random.normal(key),
        "drift": jnp.zeros(()),
        "level_about": jnp.zeros(2),
        "drift_about": jnp.zeros(2),
        "voice": jnp.zeros(16),
        "directions": jnp.array([[2.0, 0.0], [0.0, 0.3]]),
        "patient": jnp.zeros(2),
    }


def score(params, x):
    """A level, a drift, and what the voice says, in points."""
    days, about, voice = x[:, 0], x[:, 1:3], x[:, 3:]
    own = params["directions"] @ params["patient"]
    level = params["level"] + about @ params["level_about"] + own[0]
    drift = params["drift"] + about @ params["drift_about"] + own[1]
    return 10 * (level + drift * days + voice @ params["voice"])


def penalty(params):
    """What age, sex and voice say must explain a good deal before it is believed, the voice most.

    With a lighter penalty predictions go up and down with every recording of a day.
    """
    about = jnp.sum(params["level_about"] ** 2) + jnp.sum(params["drift_about"] ** 2)
    return 0.1 * about + jnp.sum(params["voice"] ** 2)


def standardise(x, train):
    """Age, sex and voice, by the first recordings of the patients to train on."""
    first = x[train, 0, 1:]
    return jnp.concatenate([x[..., :1], (x[..., 1:] - first.mean(0)) / first.std(0)], -1)


MODEL = Model(
    init=first_params,
    predict=score,
    penalty=penalty,
    standardise=standardise,
    queries=20,
    strengths=(30.0,),
    delta=0.5,
    unit=10.0,
    # Levels are far apart: five steps must reach 30 points, and the last ones not overshoot.
    rate=0.01,
    clip=100.0,
)


def usual_models(patients, train, unseen, steps):
    """The predictions of everything that is to be beaten."""
    known = patients.x, patients.y, patients.counts, train, unseen, MODEL.shots
    found = baselines.of_tables(*known, second_order=False, boosted=False)
    found["network, fine-tuned"] = baselines.fine_tuned(*known, steps)
    if importlib.util.find_spec("statsmodels"):
        found["mixed effects"] = baselines.mixed_effects(*known, fixed=3)
        found["mixed effects, with voice"] = baselines.mixed_effects(*known, fixed=19)
    else:
        print(
            "mixed effects are left out: they need statsmodels (pip install 'fomaml-jax[patients]')"
        )
    return found


STUDY = Study(
    file="parkinsons/parkinsons_updrs.csv",
    read=read,
    trained=32,
    model=MODEL,
    usual=usual_models,
    steps=200,
    metric="total UPDRS",
    against=("mixed effects", "patient's own mean"),
    times=lambda patients: 100 * patients.x[..., 0],
    labels=("days since the first recording", "total UPDRS"),
)

if __name__ == "__main__":
    main(STUDY, "patients", __doc__)
