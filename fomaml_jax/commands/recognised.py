"""What was recognised: counted where the truth is known, in words, and in a picture."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fomaml_jax import contact_sheets, pictures
from fomaml_jax.batch_statistics import TRANSDUCTIVE
from fomaml_jax.commands.tables import STATISTICS
from fomaml_jax.contact_sheets import Cell
from fomaml_jax.datasets import Pictures
from fomaml_jax.recognition import NONE, AdaptedClassifier, Background
from fomaml_jax.thresholds import ONE_SHOT_SHARE

PRINTED = 40
"""Pictures that are told about one by one on the screen."""


def judged(adapted: AdaptedClassifier, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the folders say what is right: of the known how many are, of strangers how many.

    Support pictures that are asked about again prove nothing, and do not count.
    """
    if not rows or "folder" not in rows[0]:
        return {}
    rows = [row for row in rows if not row["in_support"]]
    known = [row for row in rows if row["folder"] in adapted.names]
    strangers = [row for row in rows if row["folder"] not in adapted.names]
    right = sum(row["class"] == row["folder"] for row in known)
    return {
        "accuracy": right / len(known) if known else None,
        "known": len(known),
        "known_right": right,
        "known_predicted": sum(row["prediction"] == row["folder"] for row in known),
        "known_taken_for_none": sum(row["prediction"] == NONE for row in known),
        "strangers": len(strangers),
        "strangers_recognised": sum(row["prediction"] == NONE for row in strangers),
    }


def known_already(adapted: AdaptedClassifier, found: Pictures) -> list[bool]:
    """Which query pictures are support pictures too, or the same to the network."""
    support = {x.tobytes() for x in np.asarray(adapted.support[0])}
    return [x.tobytes() in support for x in found.images]


def how_read(found: Pictures, background: Background) -> str:
    """What was done to the pictures, for people."""
    _, height, width, channels = found.images.shape
    size = f"{height} x {width}, {'grey' if channels == 1 else 'colour'}"
    if background == "as is":
        return f"{size}, the middle square of each"
    turned = f"{found.inverted} of {len(found.images)} dark on light, so inverted"
    return f"{size}, light strokes on dark: {turned}"


def threshold_in_words(adapted: AdaptedClassifier) -> str:
    """Where "none of these" begins, and how that was found."""
    threshold, strangers, held_out = map(float, adapted.calibration)
    where = f'"{NONE}" below a similarity of {threshold:.2f}: '
    left_out = f"examples of a class that was left out are at {strangers:.2f}"
    if np.isnan(held_out):
        return (
            f"{where}{left_out}, and with one example a class nothing tells how alike two pictures "
            f"of a class are, so it is put {ONE_SHOT_SHARE} of the way from there to 1"
        )
    return f"{where}midway, as {left_out}, examples that were held out at {held_out:.2f}"


def told(
    adapted: AdaptedClassifier, found: Pictures, statistics: str, rows: list[dict[str, Any]]
) -> str:
    """Each picture in a line, between how it was done and how good that is."""
    lines = [
        "",
        f"{len(rows)} pictures ({how_read(found, adapted.background)}); {STATISTICS[statistics]}",
        threshold_in_words(adapted),
    ]
    if statistics == TRANSDUCTIVE:
        lines.append("it was found with each picture normalised alone, and fits less well here")
    lines.append("")
    width = max(len(row["picture"]) for row in rows[:PRINTED])
    for row in rows[:PRINTED]:
        nearest = f", nearest {row['class']}" if row["prediction"] == NONE else ""
        sure = f"{row['probability']:.3f}, similarity {row['similarity']:.2f}"
        lines.append(f"  {row['picture']:<{width}}  {row['prediction']}{nearest}  {sure}")
    if len(rows) > PRINTED:
        lines.append(f"  and {len(rows) - PRINTED} more")
    if again := sum(row["in_support"] for row in rows):
        which = "support pictures too, or the same to the network: none counts"
        lines.append(f"\n{again} of them are {which}")
    if accuracy := judged(adapted, rows):
        lines += ["", *_accuracy_in_words(accuracy)]
    return "\n".join(lines)


def _accuracy_in_words(found: dict[str, Any]) -> list[str]:
    lines = []
    if found["known"]:
        lines.append(
            f"accuracy {100 * found['accuracy']:.1f} %: {found['known_right']} of {found['known']} "
            f"by the nearest class, {found['known_predicted']} of them as predicted, as "
            f'"{NONE}" was said of {found["known_taken_for_none"]} of {found["known"]}'
        )
    if found["strangers"]:
        lines.append(
            f'of {found["strangers"]} pictures in folders of other names, "{NONE}" was said of '
            f"{found['strangers_recognised']}"
        )
    return lines


def sheet(adapted: AdaptedClassifier, found: Pictures, rows: list[dict[str, Any]]) -> Figure:
    """The contact sheet."""
    support, labels = (np.asarray(part) for part in adapted.support)
    first = [int(np.flatnonzero(labels == c)[0]) for c in range(len(adapted.names))]
    classes = [
        Cell(support[place], (name,), pictures.INK)
        for place, name in zip(first, adapted.names, strict=True)
    ]
    return contact_sheets.contact_sheet(
        classes,
        [_cell(adapted, x, row) for x, row in zip(found.images, rows, strict=True)],
        of_strokes=adapted.background != "as is",
    )


def _cell(adapted: AdaptedClassifier, image: np.ndarray, row: dict[str, Any]) -> Cell:
    truth, said = row.get("folder"), row["prediction"]
    right = None if truth is None else said == (truth if truth in adapted.names else NONE)
    sure = f"{100 * row['probability']:.0f} %"
    lines = (NONE, f"nearest {row['class']}", sure) if said == NONE else (said, sure)
    return Cell(image, lines, contact_sheets.colour_of(said, right, NONE))
