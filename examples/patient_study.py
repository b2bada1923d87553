"""A model of patients against what else there is, from the command line: numbers and a picture."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import patient_reports as reports
from patient_models import Model, Patients


class Study(NamedTuple):
    """What is compared, on whom."""

    file: str
    """The data, below their folder."""
    read: Callable[[Path], Patients]
    trained: int
    """Patients of each split to train on; the others are unseen."""
    model: Model
    usual: Callable[[Patients, np.ndarray, np.ndarray, int], dict[str, np.ndarray]]
    """`(patients, train, unseen, steps) ->` predictions of everything to be beaten, by name."""
    steps: int
    metric: str
    against: tuple[str, ...]
    """What is drawn beside the model: the first of these that there is."""
    times: Callable[[Patients], np.ndarray]
    labels: tuple[str, str]


def main(study: Study, name: str, description: str | None) -> None:
    """Meta-trains, runs the baselines on the same patients, reports and draws."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of the data (or $FOMAML_JAX_DATA)")
    parser.add_argument("--splits", type=int, default=20, help="random splits (20)")
    parser.add_argument("--seeds", type=int, default=3, help="meta-trainings a split (3)")
    parser.add_argument("--steps", type=int, default=study.steps, help="outer steps (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for result and pictures")
    asked = parser.parse_args()

    patients = study.read(_found(asked.data, study.file, parser))
    order = orders(len(patients.counts), asked.splits)
    train, unseen = order[:, : study.trained], order[:, study.trained :]
    usual = study.usual(patients, train, unseen, asked.steps)
    judged = reports.judge(study.model, patients, train, unseen, usual, asked.steps, asked.seeds)
    result = judged.result | {"metric": f"mean absolute error of {study.metric}"}
    print(reports.text(result))
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        reports.draw(
            asked.out / f"{name}.png",
            judged,
            patients,
            unseen[0],
            against=next(found for found in study.against if found in usual),
            times=study.times(patients),
            labels=study.labels,
        )


def orders(patients, splits, seed=0):
    """Random orders of the patients, `[splits, patients]`, to be cut in two."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(patients) for _ in range(splits)])


def _found(data: str | None, name: str, parser: argparse.ArgumentParser) -> Path:
    """A file in a folder, else in $FOMAML_JAX_DATA."""
    folder = data or os.environ.get("FOMAML_JAX_DATA", "")
    path = Path(folder).expanduser() / name
    if not folder or not path.is_file():
        parser.error(
            f"--data or $FOMAML_JAX_DATA must be a folder that holds {name}, got {folder or None}"
        )
    return path
