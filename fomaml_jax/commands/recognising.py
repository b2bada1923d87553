"""What `adapt` and `predict` have in common: query pictures in, predictions out."""

import csv
import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from fomaml_jax import options, pictures, runs
from fomaml_jax.batch_statistics import ONE_AT_A_TIME, TRANSDUCTIVE, Statistics
from fomaml_jax.classifiers import QUERIES_AT_ONCE
from fomaml_jax.commands.recognised import judged, known_already, sheet, told
from fomaml_jax.commands.words import check_folder, check_outside
from fomaml_jax.datasets import Pictures, few_pictures
from fomaml_jax.recognition import NONE, AdaptedClassifier, Background, Predictions

RESULT = "result.json"
SHEET = "contact_sheet.png"
FORMATS = ("csv", "jsonl")
FILES = (RESULT, SHEET, *(f"predictions.{name}" for name in FORMATS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recognise:
    """Where pictures come from and predictions go to."""

    out: Path | None = None
    """Folder for predictions, contact sheet and result, new or empty; predictions/<time> unless
    given."""
    statistics: Statistics = ONE_AT_A_TIME
    """What a picture is normalised with: the support pictures alone, so that it matters not which
    others are asked about, or all query pictures together."""
    format: Literal["csv", "jsonl"] = "csv"
    """Of the predictions: a table, or a JSON object a line."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """Files that are no pictures, drawings without strokes, or beside class folders: stop at the
    first, or leave them out and say so."""
    overwrite: bool = False
    """Replace what an earlier call has written."""
    compilation_cache: Path | None = None
    """Folder that keeps compiled programs, so that the next call starts sooner."""

    @property
    def folder(self) -> Path:
        """Where the predictions go."""
        return self.out or Path("predictions") / time.strftime("%Y%m%d-%H%M%S")


def check_out(folder: Path, *, overwrite: bool, apart: Sequence[Path]) -> None:
    """Refuses a folder with anything in it, or, to be overwritten, with anything else in it.

    Nor may it be inside of those of the pictures.

    Raises:
        ValueError: naming the folder.
    """
    for pictures_in in apart:
        check_outside(folder, pictures_in)
    check_folder(folder)
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    there = {name for name in there if name[0] != "."}  # such as what a file manager leaves
    if there and not overwrite:
        raise ValueError(f"{folder} is not empty; pass --out with a folder, new or empty")
    if strange := sorted(there - set(FILES)):
        raise ValueError(f"{folder} holds {strange[0]}, which is no prediction; pass another --out")


def read(
    folder: Path,
    chosen: options.ImageOptions,
    background: Background,
    unreadable: Literal["refuse", "skip"],
) -> Pictures:
    """The pictures in a folder, as the network was shown its own."""
    if isinstance(chosen, options.Folder):
        if background != "as is":
            raise ValueError(
                f"--background {background}: the run was trained on pictures as they are; leave it "
                "out"
            )
        return few_pictures(
            folder,
            size=chosen.size,
            channels=chosen.channels,
            background="as is",
            unreadable=unreadable,
        )
    return few_pictures(folder, background=background, unreadable=unreadable)


def recognise(
    adapted: AdaptedClassifier, found: Pictures, query: Path, asked: Recognise, folder: Path
) -> None:
    """Says what the pictures of the folder `query` are of, and writes it down."""
    said = predictions(adapted, found.images, asked.statistics)
    rows = described(adapted, found, said, query)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"predictions.{asked.format}", rows)
    pictures.save(sheet(adapted, found, rows), folder / SHEET)
    runs.write_json(folder / RESULT, _result(adapted, found, asked, rows))
    for other in {"csv", "jsonl"} - {asked.format}:  # of an earlier call
        (folder / f"predictions.{other}").unlink(missing_ok=True)
    print(told(adapted, found, asked.statistics, rows))
    print(f"\nThe predictions are in {folder}: predictions.{asked.format}, {SHEET}, {RESULT}.")


def predictions(adapted: AdaptedClassifier, x: np.ndarray, statistics: Any) -> Predictions:
    """Of any number of pictures, compiled for whole batches of them where each is alone."""
    predict = jax.jit(functools.partial(AdaptedClassifier.predict, statistics=statistics))
    if statistics == TRANSDUCTIVE:
        return jax.device_get(predict(adapted, x))
    more = -len(x) % QUERIES_AT_ONCE
    filled = np.concatenate([x, np.repeat(x[:1], more, 0)])
    return jax.tree.map(lambda leaf: leaf[: len(x)], jax.device_get(predict(adapted, filled)))


def described(
    adapted: AdaptedClassifier, found: Pictures, said: Predictions, query: Path
) -> list[dict[str, Any]]:
    """One row a picture."""
    rows, again = [], known_already(adapted, found)
    for place, file in enumerate(found.files):
        probabilities = dict(zip(adapted.names, said.probabilities[place].tolist(), strict=True))
        nearest = max(probabilities, key=lambda name: probabilities[name])
        row = {
            "picture": file.relative_to(query.expanduser()).as_posix(),
            "prediction": nearest if said.is_known[place] else NONE,
            "class": nearest,
            "probability": probabilities[nearest],
            "similarity": float(said.similarity[place]),
            "in_support": again[place],
        }
        if found.labels is not None:
            row["folder"] = found.names[found.labels[place]]
        rows.append(row | {"probabilities": probabilities})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """As a table with a column for every class, or as JSON lines."""
    with (
        runs.replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        *plain, _ = rows[0]
        names = rows[0]["probabilities"]
        table = csv.writer(file)
        table.writerow([*plain, *(f"probability of {name}" for name in names)])
        for row in rows:
            values = [*(row[column] for column in plain), *row["probabilities"].values()]
            table.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in values])


def _result(
    adapted: AdaptedClassifier, found: Pictures, asked: Recognise, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    calibration = {name: float(x) for name, x in adapted.calibration._asdict().items()}
    return {
        "classes": list(adapted.names),
        "support": len(adapted.support[1]),
        "pictures": len(rows),
        "none_of_these": sum(row["prediction"] == NONE for row in rows),
        **judged(adapted, rows),
        "statistics": asked.statistics,
        "calibration": calibration,
        "background": adapted.background,
        "inverted": found.inverted,
        "skipped": found.skipped,
        "also_in_support": sum(row["in_support"] for row in rows),
        "versions": runs.versions(),
    }
