"""What `adapt` and `predict` have in common: query pictures in, predictions out."""

import csv
import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from fomaml_jax import contact_sheets, options, pictures, runs
from fomaml_jax.classifiers import QUERIES_AT_ONCE
from fomaml_jax.commands.tables import STATISTICS
from fomaml_jax.contact_sheets import Cell
from fomaml_jax.datasets import Pictures, few_pictures
from fomaml_jax.experiment import versions
from fomaml_jax.recognition import NONE, AdaptedClassifier, Background, Predictions

RESULT = "result.json"
SHEET = "contact_sheet.png"
FORMATS = ("csv", "jsonl")
FILES = (RESULT, SHEET, *(f"predictions.{name}" for name in FORMATS))

PRINTED = 40
"""Pictures that are told about one by one on the screen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recognise:
    """Where pictures come from and predictions go to."""

    out: Path | None = None
    """Folder for predictions, contact sheet and result, new or empty; predictions/<time> unless
    given."""
    statistics: Literal["one-at-a-time", "transductive"] = "one-at-a-time"
    """What a picture is normalised with: the support pictures alone, so that it matters not which
    others are asked about, or all query pictures together."""
    format: Literal["csv", "jsonl"] = "csv"
    """Of the predictions: a table, or a JSON object a line."""
    overwrite: bool = False
    """Replace what an earlier call has written."""
    compilation_cache: Path | None = None
    """Folder that keeps compiled programs, so that the next call starts sooner."""

    @property
    def folder(self) -> Path:
        """Where the predictions go."""
        return self.out or Path("predictions") / time.strftime("%Y%m%d-%H%M%S")


def check_out(folder: Path, *, overwrite: bool) -> None:
    """Refuses a folder with anything in it, or, to be overwritten, with anything else in it.

    Raises:
        ValueError: naming the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; pass --out with a folder, new or empty")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if there and not overwrite:
        raise ValueError(f"{folder} is not empty; pass --out with a folder, new or empty")
    if strange := sorted(there - set(FILES)):
        raise ValueError(f"{folder} holds {strange[0]}, which is no prediction; pass another --out")


def read(folder: Path, chosen: options.ImageOptions, background: Background) -> Pictures:
    """The pictures in a folder, as the network was shown its own."""
    if isinstance(chosen, options.Folder):
        if background != "as is":
            raise ValueError(
                f"--background {background}: the run was trained on pictures as they are; leave it "
                "out"
            )
        return few_pictures(folder, size=chosen.size, channels=chosen.channels, background="as is")
    return few_pictures(folder, background=background)


def how_read(found: Pictures, background: Background) -> str:
    """What was done to the pictures, for people."""
    _, height, width, channels = found.images.shape
    size = f"{height} x {width}, {'grey' if channels == 1 else 'colour'}"
    if background == "as is":
        return f"{size}, the middle square of each"
    turned = f"{found.inverted} of {len(found.images)} dark on light, so inverted"
    return f"{size}, light strokes on dark: {turned}"


def recognise(adapted: AdaptedClassifier, query: Path, asked: Recognise, folder: Path) -> None:
    """Reads the query pictures, says what they are of, and writes it down."""
    found = read(query, adapted.chosen, adapted.background)
    said = predictions(adapted, found.images, asked.statistics)
    rows = described(adapted, found, said, query)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    write(folder / f"predictions.{asked.format}", rows)
    pictures.save(_sheet(adapted, found, rows), folder / SHEET)
    runs.write_json(folder / RESULT, _result(adapted, found, asked, rows))
    print(_shown(adapted, found, asked, rows))
    print(f"\nThe predictions are in {folder}: predictions.{asked.format}, {SHEET}, {RESULT}.")


def predictions(adapted: AdaptedClassifier, x: np.ndarray, statistics: Any) -> Predictions:
    """Of any number of pictures, compiled for whole batches of them where each is alone."""
    predict = jax.jit(functools.partial(AdaptedClassifier.predict, statistics=statistics))
    if statistics == "transductive":
        return jax.device_get(predict(adapted, x))
    more = -len(x) % QUERIES_AT_ONCE
    filled = np.concatenate([x, np.repeat(x[:1], more, 0)])
    return jax.tree.map(lambda leaf: leaf[: len(x)], jax.device_get(predict(adapted, filled)))


def described(
    adapted: AdaptedClassifier, found: Pictures, said: Predictions, query: Path
) -> list[dict[str, Any]]:
    """One row a picture."""
    rows = []
    for place, file in enumerate(found.files):
        probabilities = dict(zip(adapted.names, said.probabilities[place].tolist(), strict=True))
        nearest = max(probabilities, key=lambda name: probabilities[name])
        row = {
            "picture": file.relative_to(query.expanduser()).as_posix(),
            "prediction": nearest if said.is_known[place] else NONE,
            "class": nearest,
            "probability": probabilities[nearest],
            "similarity": float(said.similarity[place]),
        }
        if found.labels is not None:
            row["folder"] = found.names[found.labels[place]]
        rows.append(row | {"probabilities": probabilities})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """As a table with a column for every class, or as JSON lines."""
    with runs.replacing(path) as temporary, temporary.open("w", newline="") as file:
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


def judged(adapted: AdaptedClassifier, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the folders say what is right: of the known how many are, of strangers how many."""
    if not rows or "folder" not in rows[0]:
        return {}
    known = [row for row in rows if row["folder"] in adapted.names]
    strangers = [row for row in rows if row["folder"] not in adapted.names]
    right = sum(row["class"] == row["folder"] for row in known)
    return {
        "accuracy": right / len(known) if known else None,
        "known": len(known),
        "known_right": right,
        "known_taken_for_none": sum(row["prediction"] == NONE for row in known),
        "strangers": len(strangers),
        "strangers_recognised": sum(row["prediction"] == NONE for row in strangers),
    }


def threshold_in_words(adapted: AdaptedClassifier) -> str:
    """Where "none of these" begins, and how that was found."""
    threshold, strangers, held_out = map(float, adapted.calibration)
    where = f'"{NONE}" below a similarity of {threshold:.2f}: '
    left_out = f"examples of a class that was left out are at {strangers:.2f}"
    if np.isnan(held_out):
        return (
            f"{where}{left_out}, and with one example a class nothing tells how alike two pictures "
            "of a class are, so it is put 0.3 of the way from there to 1"
        )
    return f"{where}midway, as {left_out}, examples that were held out at {held_out:.2f}"


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
        "also_in_support": _known_already(adapted, found),
        "versions": versions(),
    }


def _known_already(adapted: AdaptedClassifier, found: Pictures) -> int:
    """How many query pictures are support pictures too."""
    support = {np.asarray(x).tobytes() for x in adapted.support[0]}
    return sum(x.tobytes() in support for x in found.images)


def _shown(
    adapted: AdaptedClassifier, found: Pictures, asked: Recognise, rows: list[dict[str, Any]]
) -> str:
    statistics = "transductive" if asked.statistics == "transductive" else "one query at a time"
    lines = [
        "",
        f"{len(rows)} pictures ({how_read(found, adapted.background)}); {STATISTICS[statistics]}",
        threshold_in_words(adapted),
        "",
    ]
    width = max(len(row["picture"]) for row in rows[:PRINTED])
    for row in rows[:PRINTED]:
        nearest = f", nearest {row['class']}" if row["prediction"] == NONE else ""
        sure = f"{row['probability']:.3f}, similarity {row['similarity']:.2f}"
        lines.append(f"  {row['picture']:<{width}}  {row['prediction']}{nearest}  {sure}")
    if len(rows) > PRINTED:
        lines.append(f"  and {len(rows) - PRINTED} more")
    if again := _known_already(adapted, found):
        lines.append(f"\n{again} of them are support pictures too, and prove nothing")
    if accuracy := judged(adapted, rows):
        lines += ["", *_accuracy_in_words(accuracy)]
    return "\n".join(lines)


def _accuracy_in_words(found: dict[str, Any]) -> list[str]:
    lines = []
    if found["known"]:
        lines.append(
            f"accuracy {100 * found['accuracy']:.1f} %: {found['known_right']} of {found['known']} "
            f'by the nearest class; "{NONE}" was said of {found["known_taken_for_none"]} of them'
        )
    if found["strangers"]:
        lines.append(
            f'of {found["strangers"]} pictures in folders of other names, "{NONE}" was said of '
            f"{found['strangers_recognised']}"
        )
    return lines


def _sheet(adapted: AdaptedClassifier, found: Pictures, rows: list[dict[str, Any]]) -> Any:
    support, labels = (np.asarray(part) for part in adapted.support)
    first = [int(np.flatnonzero(labels == c)[0]) for c in range(len(adapted.names))]
    classes = [
        Cell(support[place], (name,), pictures.INK)
        for place, name in zip(first, adapted.names, strict=True)
    ]
    return contact_sheets.contact_sheet(
        classes,
        [_cell(adapted, x, row) for x, row in zip(found.images, rows, strict=True)],
    )


def _cell(adapted: AdaptedClassifier, image: np.ndarray, row: dict[str, Any]) -> Cell:
    truth, said = row.get("folder"), row["prediction"]
    right = None if truth is None else said == (truth if truth in adapted.names else NONE)
    sure = f"{100 * row['probability']:.0f} %"
    lines = (NONE, f"nearest {row['class']}", sure) if said == NONE else (said, sure)
    return Cell(image, lines, contact_sheets.colour_of(said, right, NONE))
