"""How models of patients are compared: the same patients, intervals over patients, pictures."""

import os
from pathlib import Path

import numpy as np
from patient_baselines import later_error as absolute_errors_of


def find(data, name, parser):
    """A file in a folder, else in $FOMAML_JAX_DATA."""
    folder = data or os.environ.get("FOMAML_JAX_DATA")
    if not folder or not (path := Path(folder).expanduser() / name).is_file():
        parser.error(f"--data or $FOMAML_JAX_DATA must be a folder that holds {name}, got {folder}")
    return path


def orders(patients, splits, seed=0):
    """Random orders of the patients, `[splits, patients]`, to be cut in two."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(patients) for _ in range(splits)])


def absolute_errors(y, predicted, counts, shots):
    """Mean absolute error of each patient's later rows."""
    return absolute_errors_of(y, predicted, counts, shots)


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
        if name.startswith("coverage") and result[name] is not None:
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


def draw(path, *, times, patients, unseen, curves, half, shots, labels, most=12):
    """A panel a patient: rows given, rows to predict, predictions, and the 90% band of the first."""
    from matplotlib.figure import Figure

    shown = unseen[:most]
    figure = Figure(figsize=(10, 2.1 * -(-len(shown) // 4)), layout="constrained")
    panels = np.ravel(figure.subplots(-(-len(shown) // 4), 4, squeeze=False))
    for place, (patient, axes) in enumerate(zip(shown, panels, strict=False)):
        count = patients.counts[patient]
        x, y = times[patient, :count], patients.y[patient, :count]
        for (name, curve), colour in zip(curves.items(), ("#c2410c", "#1d4ed8"), strict=False):
            axes.plot(x, curve[place, :count], color=colour, lw=1.2, label=name)
        ours = next(iter(curves.values()))[place, :count]
        width = np.broadcast_to(half, (1, len(ours)))[0]
        axes.fill_between(x, ours - width, ours + width, color="#c2410c", alpha=0.12, lw=0)
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
