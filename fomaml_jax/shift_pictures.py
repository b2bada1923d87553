"""The shift report for people: a picture of every shift, and lines of text."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fomaml_jax.pictures import ACCENT, INK
from fomaml_jax.robustness import ADAPTED, FEATURES, PIXELS, verdict

Rows = Sequence[Mapping[str, Any]]

COLUMNS, LABEL_WIDTH = 3, 13

STYLES: Mapping[str, dict[str, Any]] = {
    PIXELS: {"color": "#999999", "ls": ":", "marker": "."},
    FEATURES: {"color": INK, "ls": "--", "marker": "."},
    ADAPTED: {"color": ACCENT, "ls": "-", "marker": "o"},
}

NAMES = {
    ADAPTED: "adapted",
    FEATURES: "nearest class mean of features, no adaptation",
    PIXELS: "nearest class mean of pixels",
}

MARKS = {"helps": ACCENT, "not shown": "white", "hurts": INK}
"""The inside of an adapted point's mark, by what adaptation adds to the network's features."""


def draw(rows: Rows) -> Figure:
    """A panel a shift, accuracy against its strength, each with its 95% interval."""
    shifts = by_shift(rows)
    lines = -(-len(shifts) // COLUMNS)
    figure = Figure(figsize=(9.5, 2.5 * lines + 0.6), layout="constrained")
    grid = figure.subplots(lines, COLUMNS, sharey=True, squeeze=False)
    for axes, (shift, found) in zip(grid.flat, shifts.items(), strict=False):
        _panel(axes, shift, found)
    for axes in grid.flat[len(shifts) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy", fontsize=8)
    figure.legend(handles=_legend(), loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def by_shift(rows: Rows) -> dict[str, Rows]:
    """The rows of each shift."""
    names = dict.fromkeys(row["shift"] for row in rows)
    return {name: [row for row in rows if row["shift"] == name] for name in names}


BY_CHANCE = (
    "Each condition by a 95 % interval of its own: where nothing differs, one in twenty is ahead "
    "or behind by chance."
)


def conclusions(rows: Rows) -> list[str]:
    """Where adaptation adds to what the network and the pixels give without it, in sentences."""
    distinct = list({condition_of(row): row for row in reversed(rows)}.values())[::-1]
    lines = []
    for baseline in (FEATURES, PIXELS):
        found: dict[str, list[str]] = {name: [] for name in MARKS}
        for row in distinct:
            found[verdict(row["ahead"][baseline])].append(f"{row['shift']} {row['label']}")
        name = NAMES[baseline].removesuffix(", no adaptation")
        helps, level, hurts = (_listed(found[kind], len(distinct)) for kind in MARKS)
        lines.append(
            f"Of {len(distinct)} conditions, adaptation is ahead of the {name} under {helps}, "
            f"behind under {hurts}, and by its interval neither under {level}."
        )
    return [*lines, BY_CHANCE]


def condition_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """By which rows of the same tasks are known: that without a shift stands under many."""
    strengths = tuple(sorted(row["strengths"].items()))
    setting = tuple(row[name] for name in ("data", "ways", "shots", "support"))
    return (*setting, strengths, row["steepness"])


def _listed(conditions: Sequence[str], total: int) -> str:
    """How many, and which if they are few."""
    count = str(len(conditions) or "none")
    few = 0 < len(conditions) <= total / 2
    return f"{count} ({', '.join(conditions)})" if few else count


def _panel(axes: Any, shift: str, rows: Rows) -> None:
    place = np.arange(len(rows))
    for name, style in STYLES.items():
        mean, ci95 = ([row[name][key] for row in rows] for key in ("mean", "ci95"))
        axes.errorbar(place, mean, ci95, lw=1.2, ms=4, capsize=2, **style)
    for at, row in zip(place, rows, strict=True):
        inside = MARKS[verdict(row["ahead"][FEATURES])]
        axes.plot(at, row[ADAPTED]["mean"], "o", color=ACCENT, mfc=inside, ms=5, zorder=3)
    axes.plot(place, [1 / row["ways"] for row in rows], color="#cccccc", lw=1, zorder=0)
    labels = [textwrap.fill(row["label"], LABEL_WIDTH) for row in rows]
    axes.set_xticks(place, labels, fontsize=6.5)
    axes.tick_params("y", labelsize=7)
    axes.set_ylim(0, 1.02)
    axes.set_title(shift, fontsize=9)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)


def _legend() -> list[Line2D]:
    lines = [Line2D([], [], ms=4, label=NAMES[name], **STYLES[name]) for name in NAMES]
    said = {"helps": "ahead of features", "not shown": "level with them", "hurts": "behind them"}
    marks = [
        Line2D([], [], ls="", marker="o", color=ACCENT, mfc=MARKS[name], ms=5, label=text)
        for name, text in said.items()
    ]
    return [handle for pair in zip(lines, marks, strict=True) for handle in pair]
