"""The shifts that a run is put to: which test classes there are, and a table of conditions."""

import collections
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from fomaml_jax import datasets, options
from fomaml_jax.datasets import GroupSplits, ImageClasses, Splits
from fomaml_jax.robustness import Condition, Pool, Setting

ANGLES = (0, 15, 30, 45, 90, 180)

STRENGTHS: Mapping[str, tuple[tuple[float, ...], str]] = {
    "rotation of the queries": (ANGLES, "{:g}°"),
    "rotation of the whole task": (ANGLES, "{:g}°"),
    "noise": ((0, 0.1, 0.2, 0.4, 0.8), "std {:g}"),
    "blur": ((0, 0.5, 1, 2, 3), "std {:g} px"),
}
"""Strengths of the shifts that one example a class is enough for, and how they are written."""

SHARES = (0, 0.12, 0.2, 0.28)
"""Of wrong labels: whole examples of 25."""

STEEPNESSES: Mapping[str, float] = {"even": 0.0, "from 1 to 5": 1.0, "1 or 5": 1000.0}
"""Of the numbers of support examples that the classes have."""

SEVERAL = 5
"""Shots where one is not enough: with one wrong label a class, or one example to lose."""

WAYS, SHOTS = (5, 10, 20), (1, 5, 10)


class Suite(NamedTuple):
    """What there is to measure.

    Attributes:
        pools: test classes by name.
        conditions: of each shift the one without it first.
        left_out: what cannot be measured, and why, a line each.
    """

    pools: Mapping[str, Pool]
    conditions: list[Condition]
    left_out: list[str]


def suite(chosen: options.Options, splits: Splits | GroupSplits | None) -> Suite:
    """The suite of a run; reads the other data sets that are there, and downloads none.

    Raises:
        ValueError: for a run without pictures.
    """
    if not (isinstance(splits, Splits) and isinstance(chosen, options.ImageOptions)):
        raise ValueError(f"--shift: {options.name_of(chosen)} has no pictures to shift")
    pools, left_out = _pools(chosen, splits)
    conditions = []
    for condition in _every_condition(chosen, list(pools)):
        lacks = _lacking(chosen, pools[condition.setting.data], condition.setting)
        if lacks is None:
            conditions.append(condition)
        else:
            left_out.append(f"{condition.shift}, {condition.label}: {lacks}")
    return Suite(pools, conditions, left_out)


def _every_condition(chosen: options.ImageOptions, pools: list[str]) -> list[Condition]:
    base = Setting(pools[0], chosen.ways, chosen.shots)
    several = base._replace(shots=SEVERAL)
    thinned = several._replace(thinned=True)
    table = [Condition("test classes", name, base._replace(data=name)) for name in pools]
    for ways in sorted({*WAYS, chosen.ways}):
        table.append(Condition("ways", f"{ways}-way", base._replace(ways=ways)))
    for shots in sorted({*SHOTS, chosen.shots}):
        table.append(Condition("shots", f"{shots}-shot", base._replace(shots=shots)))
    for shift, (strengths, form) in STRENGTHS.items():
        for strength in strengths:
            table.append(Condition(shift, form.format(strength), base, _only(shift, strength)))
    for share in SHARES:
        whole = round(share * several.support) / several.support
        label = f"{100 * whole:.3g} % of {SEVERAL}-shot"
        table.append(Condition("label noise", label, several, _only("label noise", share)))
    for label, steepness in STEEPNESSES.items():
        table.append(Condition("class imbalance", label, thinned, {}, steepness))
    return table


def _only(shift: str, strength: float) -> dict[str, float]:
    return {shift: float(strength)} if strength else {}


def _lacking(chosen: options.ImageOptions, pool: Pool, setting: Setting) -> str | None:
    """Why a setting cannot be had, if so."""
    if chosen.head == "learned" and setting.ways != chosen.ways:
        return f"the head is learned for {chosen.ways} ways"
    if setting.ways > pool.most_ways:
        return f"there are {pool.most_ways} test classes"
    fewest = int(pool.classes.counts.min())
    if setting.shots + chosen.queries > fewest:
        return (
            f"{setting.shots} shots and {chosen.queries} queries are more than the {fewest} "
            "pictures of the smallest class"
        )
    return None


def _pools(chosen: options.ImageOptions, splits: Splits) -> tuple[dict[str, Pool], list[str]]:
    own = options.name_of(chosen)
    if own not in KINDS:
        pools = {"own pictures": Pool(splits.test, turned=False)}
        return pools, ["test classes: there are no other pictures like those of a folder"]
    seen = {KINDS[own].group(name) for part in splits[:2] for name in part.names}
    pools, left_out = KINDS[own].pools(splits.test, seen, chosen.ways), []
    for other in KINDS.keys() - {own}:
        try:
            test = KINDS[other].load().test
        except (OSError, ValueError, ImportError) as error:
            left_out.append(f"test classes, {other}: {' '.join(str(error).split())}")
        else:
            pools |= KINDS[other].pools(test, set(), chosen.ways)
    return pools, left_out


class _Kind(NamedTuple):
    """A data set whose classes are of alphabets or scripts."""

    load: Callable[[], Splits]
    group: Callable[[str], str]
    name: str
    name_of_groups: str
    turned: bool

    def pools(self, test: ImageClasses, seen: set[str], ways: int) -> dict[str, Pool]:
        """All classes together, and those of unseen groups with enough of them, group by group."""
        pools = {self.name: Pool(test, turned=self.turned)}
        group_of = [self.group(name) for name in test.names]
        enough = {g for g, n in collections.Counter(group_of).items() if n >= ways} - seen
        if chosen := [number for number, g in enumerate(group_of) if g in enough]:
            classes = ImageClasses(
                test.images[chosen], test.counts[chosen], tuple(test.names[n] for n in chosen)
            )
            numbers = {g: number for number, g in enumerate(sorted(enough))}
            groups = np.array([numbers[group_of[n]] for n in chosen])
            pools[self.name_of_groups] = Pool(classes, self.turned, groups)
        return pools


KINDS: Mapping[str, _Kind] = {
    "glyphs": _Kind(
        load=lambda: datasets.glyphs(),
        group=lambda name: name.split()[0],
        name="print (glyphs)",
        name_of_groups="print, one script a task",
        turned=False,
    ),
    "omniglot": _Kind(
        load=lambda: datasets.omniglot(download=False),
        group=lambda name: name.split("/")[0],
        name="handwriting (Omniglot)",
        name_of_groups="handwriting, one alphabet a task",
        turned=True,
    ),
}
"""The data sets whose pictures have the same form, and how their unseen tasks are drawn."""
