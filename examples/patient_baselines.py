"""What a personal model has to beat: the patient's own rows, and the usual models of a population."""

import importlib.util

import numpy as np

FOLDS = 5
ALPHAS = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Ridge penalties, chosen by cross-validation over training patients."""


def of_tables(x, y, counts, train, unseen, shots):
    """Every baseline's predictions of unseen patients from their first rows.

    Args:
        x: `[patients, rows, features]`.
        y: `[patients, rows]`.
        counts: `[patients]`, real rows.
        train: `[splits, m]`, who is trained on.
        unseen: `[splits, n]`, who is predicted.
        shots: rows given.

    Returns:
        `[splits, n, rows]` for each by name.
    """
    given = y[unseen, :shots]
    shape = (*unseen.shape, y.shape[1])
    found = {
        "patient's own mean": np.broadcast_to(given.mean(-1, keepdims=True), shape),
        "patient's last value": np.broadcast_to(given[..., -1:], shape),
    }
    models = {"ridge": _ridge(x)}
    if importlib.util.find_spec("sklearn"):
        models["gradient boosting"] = _boosting(x)
    else:
        print("gradient boosting is left out: it needs scikit-learn (pip install scikit-learn)")
    for name, fit in models.items():
        each = [
            _with_offsets(fit, y, counts, t, u, shots) for t, u in zip(train, unseen, strict=True)
        ]
        for i, kind in enumerate(("", ", offset", ", shrunk offset")):
            found[name + kind] = np.stack([predictions[i] for predictions in each])
    return found


def _with_offsets(fit, y, counts, train, unseen, shots):
    """A model's predictions, and the same moved by the residuals of the patient's own rows."""
    population = fit(y, counts, train)
    held = np.empty_like(y[train], float)
    for fold in np.array_split(np.arange(len(train)), FOLDS):
        held[fold] = fit(y, counts, np.delete(train, fold))(train[fold])

    def moved(groups, plain, shrink):
        return plain + shrink * (y[groups] - plain)[:, :shots].mean(1, keepdims=True)

    def error(shrink):
        return later_error(y[train], moved(train, held, shrink), counts[train], shots).mean()

    shrink = min(np.linspace(0, 1, 21), key=error)
    plain = population(unseen)
    return plain, moved(unseen, plain, 1.0), moved(unseen, plain, shrink)


def later_error(y, predicted, counts, shots):
    """Mean absolute error of each patient's later rows, `[..., patients]`."""
    places = np.arange(y.shape[-1])
    later = (places >= shots) & (places < counts[..., None])
    return (np.abs(y - predicted) * later).sum(-1) / later.sum(-1)


def _real(x, y, counts, groups):
    real = np.arange(x.shape[1]) < counts[groups][:, None]
    return x[groups][real], y[groups][real]


def _second_order(x):
    """The features, their squares and their products."""
    upper = np.triu_indices(x.shape[-1])
    return np.concatenate([x, x[..., upper[0]] * x[..., upper[1]]], -1)


def _ridge(x):
    """`(y, counts, patients) -> (patients -> predictions)`, its penalty chosen among the patients."""

    def with_alpha(y, counts, groups, alphas):
        inputs, targets = _real(x, y, counts, groups)
        mean, scale = inputs.mean(0), inputs.std(0) + 1e-9
        design = _second_order((inputs - mean) / scale)
        centre, spread = design.mean(0), design.std(0) + 1e-9
        design, offset = (design - centre) / spread, targets.mean()
        gram, moment = design.T @ design, design.T @ (targets - offset)
        solved = [np.linalg.solve(gram + a * np.eye(len(gram)), moment) for a in alphas]

        def predict(others):
            of_others = (_second_order((x[others] - mean) / scale) - centre) / spread
            return [of_others @ weights + offset for weights in solved]

        return predict

    def fit(y, counts, groups):
        errors = np.zeros(len(ALPHAS))
        for fold in np.array_split(np.arange(len(groups)), FOLDS):
            held = groups[fold]
            for i, p in enumerate(with_alpha(y, counts, np.delete(groups, fold), ALPHAS)(held)):
                errors[i] += later_error(y[held], p, counts[held], 0).sum()
        best = with_alpha(y, counts, groups, [ALPHAS[int(errors.argmin())]])
        return lambda others: best(others)[0]

    return fit


def _boosting(x):
    def fit(y, counts, groups):
        from sklearn.ensemble import HistGradientBoostingRegressor

        inputs, targets = _real(x, y, counts, groups)
        model = HistGradientBoostingRegressor(learning_rate=0.05, max_iter=200, random_state=0)
        model.fit(inputs, targets)
        return lambda others: model.predict(x[others].reshape(-1, x.shape[-1])).reshape(
            len(others), -1
        )

    return fit
