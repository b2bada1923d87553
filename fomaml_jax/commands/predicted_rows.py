"""`fomaml-jax predict RUN --file FILE`: the rows of new groups, from the few that are known."""

import csv
import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tyro.conf import Positional

from fomaml_jax import runs
from fomaml_jax.commands.endings import plain_warnings, refusing, say
from fomaml_jax.commands.words import check_file, parse
from fomaml_jax.datasets import FURTHEST, FewRows, few_rows
from fomaml_jax.devices import keep_compiled_programs
from fomaml_jax.regressors import Regressor, load_regressor
from fomaml_jax.wording import caveat, counted

FAR = 10.0
"""Standard deviations from the mean in training: a value is then hardly in the same unit."""

GROUPS_AT_ONCE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictRows:
    """Predicts rows of a table by a run of fomaml-jax train table, adapted to each group."""

    run: Positional[Path]
    """The folder that training wrote."""
    file: Path
    """A CSV file with the columns of training: of each group some rows whose target is known, and
    others where it is empty and predicted."""
    out: Path = Path("predictions.csv")
    """The file, again with all that is in it, and the predictions in a column of their own."""
    overwrite: bool = False
    """Replace what is there."""
    compilation_cache: Path | None = None
    """Folder that keeps compiled programs, so that the next call starts sooner."""


def main(words: list[str]) -> None:
    """Predicts, as the words after `predict` say."""
    asked = parse(PredictRows, "fomaml-jax predict", words)
    with refusing(), plain_warnings():
        _check_out(asked)
        keep_compiled_programs(asked.compilation_cache)
        regressor = load_regressor(asked.run)
        chosen = regressor.chosen
        found = few_rows(
            asked.file,
            group=chosen.group,
            target=chosen.target,
            features=chosen.features,
            missing=chosen.missing,
        )
        column = f"predicted {chosen.target}"
        if column in found.header:
            raise ValueError(f"{asked.file} has a column {column!r} already; take it out")
        _tell_of_other_units(regressor, found)
        predicted = predictions(regressor, found)
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        _write(asked.out, found, column, predicted, decimals_for(float(regressor.scale[0])))
        print(_told(regressor, found, runs.judged(asked.run)))
        print(f"\nThe predictions are in {asked.out}, in the column {column!r}.")


def _check_out(asked: PredictRows) -> None:
    check_file(asked.out)
    if asked.out.exists() and asked.file.exists() and asked.out.samefile(asked.file):
        raise ValueError(f"{asked.out} is the table itself; pass --out with another file")
    if asked.out.exists() and not asked.overwrite:
        raise ValueError(f"{asked.out} is there already; pass another --out, or --overwrite")


def predictions(regressor: Regressor, found: FewRows) -> np.ndarray:
    """`[rows of the file]` targets, NaN where none was asked for."""
    known, asked = (regressor.standardised(x) for x in (found.known, found.asked))
    targets = regressor.standardised(found.targets, of_target=True)
    groups = (known, targets), asked, jnp.asarray(found.weights)

    @jax.jit
    def of_groups(groups):
        def of_group(group):
            known, asked, weights = group
            return regressor.standardised_targets(known, asked, weights=weights)

        return jax.lax.map(of_group, groups, batch_size=GROUPS_AT_ONCE)

    # In float64: of a target that is large beside its deviation, float32 would leave nothing.
    by_group = regressor.mean[0] + regressor.scale[0] * np.asarray(of_groups(groups), np.float64)
    real = found.rows >= 0
    wild = (real & ~np.isfinite(by_group)).any(1)
    if wild.any():
        raise ValueError(
            f"adaptation to {found.names[int(wild.argmax())]!r} diverged: look at its known rows, "
            "or train with a smaller --inner-rate"
        )
    predicted = np.full(len(found.cells), np.nan)
    predicted[found.rows[real]] = by_group[real]
    return predicted


def _tell_of_other_units(regressor: Regressor, found: FewRows) -> None:
    known, asked = found.weights > 0, found.rows >= 0
    features = np.concatenate([found.known[known], found.asked[asked]])
    columns = [found.targets[known], *features.T]
    names = regressor.chosen.target, *regressor.chosen.features
    for name, column, mean, scale in zip(
        names, columns, regressor.mean, regressor.scale, strict=True
    ):
        far, too_far = (np.abs(column - mean) > limit * scale for limit in (FAR, FURTHEST))
        if scale > 0 and far.any():
            value = column[too_far if too_far.any() else far][0]
            seen = f"{mean:.4g} ± {scale:.2g}"
            told = f"{name} is {value:g} in a row, where it was {seen} in training"
            if too_far.any():
                raise ValueError(f"{told}: leave the cell empty if it has no value")
            say(f"fomaml-jax: {told}: is it in the same unit?")


def decimals_for(scale: float) -> int:
    """As many as show a hundred-thousandth of a standard deviation, of numbers of any size."""
    return max(0, 4 - math.floor(math.log10(scale)))


def _write(path: Path, found: FewRows, column: str, predicted: np.ndarray, decimals: int) -> None:
    with (
        runs.replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.writer(file)
        table.writerow([*found.header, column])
        for cells, value in zip(found.cells, predicted.tolist(), strict=True):
            table.writerow([*cells, "" if np.isnan(value) else f"{value:.{decimals}f}"])


def _told(regressor: Regressor, found: FewRows, result: dict | None) -> str:
    chosen, known = regressor.chosen, found.weights.sum(1).astype(int)
    few, many = int(known.min()), int(known.max())
    from_rows = f"{few} to " * (few < many) + counted(many, "known row")
    asked, groups = int((found.rows >= 0).sum()), len(found.names)
    said = [
        f"{chosen.target} of {counted(asked, 'row')} of {counted(groups, 'group')} "
        f"({chosen.group}), each from {from_rows} of its own"
    ]
    if alone := [name for name, count in zip(found.names, known, strict=True) if not count]:
        said.append(
            f"Of {len(alone)} of them no row is known, such as of {alone[0]!r}: theirs are the "
            "predictions without adaptation"
        )
    if many and few < chosen.shots:
        said.append(
            f"Training gave {counted(chosen.shots, 'row')} of a group; fewer mean larger errors"
        )
    if result is not None and None not in (result["mean"], result["ci95"]):
        said.append(
            f"In training's own table, the {result['metric']} was {result['mean']:.3g} ± "
            f"{result['ci95']:.2g} over {result['num_tasks']} unseen groups"
            f"{caveat(result['num_tasks'])}"
        )
    return "\n".join(said)
