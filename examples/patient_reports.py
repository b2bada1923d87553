"""How models of patients are compared: the same patients, intervals over patients, pictures."""

from typing import Any, NamedTuple

import numpy as np
from patient_baselines import later_error
from patient_models import cross_validate, ensemble

OWN_MEAN = "patient's own mean"
"""What knows nothing but the patient."""


class Judged(NamedTuple):
    """A comparison: plain JSON, predictions by name, and half the width of the 90% intervals."""

    result: dict[str, Any]
    predicted: dict[str, np.ndarray]
    half: np.ndarray


def judge(model, patients, train, unseen, usual, steps, seeds):
    """Meta-trains, and compares with the predictions of others on the same patients.

    What the given rows weigh is chosen in every split by cross-validation over its training
    patients, whose held-out errors are the width of the intervals too.

    Args:
        model: a `Model`.
        patients: everybody's rows.
        train: `[splits, m]`, who is trained on.
        unseen: `[splits, n]`, who is judged on.
        usual: predictions `[splits, n, rows]` of others, by name.
        steps: outer steps.
        seeds: meta-trainings whose mean is the prediction.
    """
    shots, counts = model.shots, patients.counts
    held, cross = cross_validate(model, patients, train, steps)
    scores = later_error(patients.y[held], cross, counts[held], shots).mean(-1)
    choice = scores.argmin(0)  # one for each split
    strengths = np.array(model.strengths)[choice]
    found = ensemble(model, patients, train, unseen, strengths, steps, seeds)
    predicted = {
        "meta-learned": found[:, :, 1].mean(0),
        "meta-learned, one seed": found[0, :, 1],
        "population model, not adapted": found[:, :, 0].mean(0),
    } | usual
    errors = {
        name: later_error(patients.y[unseen], p, counts[unseen], shots)
        for name, p in predicted.items()
    }
    half = half_widths(patients, held, cross[choice, np.arange(len(train))], shots)
    ours, spread = predicted["meta-learned"], found[:, :, 1].std(0)
    result = {
        "splits": len(train),
        "trained_on": train.shape[1],
        "seeds": seeds,
        "steps": steps,
        "strengths_chosen": strengths.tolist(),
        "error_of_held_out_training_patients": scores.min(0).mean().item(),
        "coverage_of_the_90_percent_intervals": coverage(patients, unseen, ours, half, shots),
        "half_width_of_the_90_percent_intervals": half.mean().item(),
        "coverage_of_the_ensemble_alone": coverage(patients, unseen, ours, 1.645 * spread, shots),
    }
    return Judged(summary(errors, unseen, patients.names) | result, predicted, half)


def _by_patient(values, unseen):
    """The mean over the splits in which a patient is unseen; NaN where in none."""
    of = np.arange(unseen.max() + 1)
    where = unseen[..., None] == of
    with np.errstate(invalid="ignore"):
        return (values[..., None] * where).sum((0, 1)) / where.sum((0, 1))


def _interval(values):
    """Mean and half the normal 95% interval over patients."""
    values = values[np.isfinite(values)]
    return {"mean": values.mean().item(), "ci95": _half(values)}


def _half(values):
    return (1.96 * values.std(ddof=1) / np.sqrt(len(values))).item()


def summary(rows, unseen, names):
    """Errors and paired differences.

    The splits share patients, and so do their errors. So every patient counts once: his error, or
    difference, is the mean over the splits in which he is unseen, and the interval is that of the
    mean over patients. What the splits differ in is reported beside it.

    Args:
        rows: `[splits, n]` errors for each model, the one to be compared first.
        unseen: `[splits, n]`, of whom they are.
        names: of the patients.

    Returns:
        Plain JSON.
    """
    ours, *others = rows
    table = {}
    for name, errors in rows.items():
        table[name] = _interval(_by_patient(errors, unseen)) | {
            "mean_over_splits": errors.mean().item(),
            "sd_over_splits": errors.mean(1).std(ddof=1).item() if len(errors) > 1 else None,
        }
        if name in others:
            apart = _by_patient(rows[ours] - errors, unseen)
            table[name]["ours_minus_this"] = _interval(apart)
        if OWN_MEAN in rows and name != OWN_MEAN:
            table[name]["this_minus_own_mean"] = _interval(
                _by_patient(errors - rows[OWN_MEAN], unseen)
            )
    tested = int(np.isfinite(_by_patient(rows[ours], unseen)).sum())
    return {"patients": len(names), "patients_tested": tested, "models": table}


def text(result):
    """The summary as lines."""
    lines = [f"{result['metric']}, {result['splits']} splits, unseen patients", ""]
    for name, row in result["models"].items():
        apart = row.get("ours_minus_this")
        beside = f"   ours - this {apart['mean']:+.3f} ± {apart['ci95']:.3f}" if apart else ""
        lines.append(f"  {name:<34}{row['mean']:7.3f} ± {row['ci95']:.3f}{beside}")
    for name in result:
        if name.startswith("coverage"):
            lines.append(f"  {name.replace('_', ' ')}: {100 * result[name]:.1f} %")
    return "\n".join(lines)


def _later(patients, groups, shots):
    places = np.arange(patients.y.shape[1])
    return (places >= shots) & (places < patients.counts[groups][..., None])


def half_widths(patients, held, predicted, shots, level=0.9):
    """Half the width of an interval: a quantile of errors on held-out training patients.

    Every patient has the same weight, however many rows are his.

    Args:
        patients: everybody's.
        held: `[splits, m]`, who was held out.
        predicted: `[splits, m, rows]`.
        shots: rows given.
        level: the share of later rows that is to be covered.

    Returns:
        `[splits, 1, 1]`.
    """
    later = _later(patients, held, shots)
    errors = np.abs(patients.y[held] - predicted)
    weights = later / later.sum(-1, keepdims=True)
    found = []
    for e, w in zip(errors.reshape(len(held), -1), weights.reshape(len(held), -1), strict=True):
        order = np.argsort(e)
        found.append(e[order][np.searchsorted(np.cumsum(w[order]) / w.sum(), level)])
    return np.array(found)[:, None, None]


def coverage(patients, unseen, predicted, half, shots):
    """The share of later rows inside of the interval, each patient with the same weight."""
    later = _later(patients, unseen, shots)
    inside = (np.abs(patients.y[unseen] - predicted) <= half) & later
    return (inside.sum(-1) / later.sum(-1)).mean().item()


def draw(path, judged, patients, unseen, *, against, times, labels, most=12):
    """The first split's patients: rows given, rows to predict, two predictions, 90% intervals."""
    from matplotlib.figure import Figure

    shown, shots = unseen[:most], 5
    figure = Figure(figsize=(10, 2.1 * -(-len(shown) // 4)), layout="constrained")
    panels = np.ravel(figure.subplots(-(-len(shown) // 4), 4, squeeze=False))
    colours = {"meta-learned": "#c2410c", against: "#1d4ed8"}
    for place, (patient, axes) in enumerate(zip(shown, panels, strict=False)):
        count = patients.counts[patient]
        x, y = times[patient, :count], patients.y[patient, :count]
        for name, colour in colours.items():
            axes.plot(x, judged.predicted[name][0, place, :count], color=colour, lw=1, label=name)
        ours, half = judged.predicted["meta-learned"][0, place, :count], judged.half[0, 0, 0]
        axes.fill_between(x, ours - half, ours + half, color="#c2410c", alpha=0.12, lw=0)
        axes.plot(x[:shots], y[:shots], "^", color="#222222", ms=4, label="given")
        axes.plot(x[shots:], y[shots:], ".", color="#15803d", ms=3, label="to predict")
        axes.set_title(f"patient {patients.names[patient]}", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=6, frameon=False)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel(labels[0], fontsize=8)
    figure.supylabel(labels[1], fontsize=8)
    figure.savefig(path, dpi=80)
