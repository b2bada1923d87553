"""What a personal model has to beat: the patient's own rows, usual models of a population."""

import importlib.util
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fomaml_jax as fj

FOLDS = 5
ALPHAS = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Ridge penalties, chosen by cross-validation over training patients."""


def of_tables(x, y, counts, train, unseen, shots, *, second_order=True, boosted=True):
    """Every baseline's predictions of unseen patients from their first rows.

    Args:
        x: `[patients, rows, features]`.
        y: `[patients, rows]`.
        counts: `[patients]`, real rows.
        train: `[splits, m]`, who is trained on.
        unseen: `[splits, n]`, who is predicted.
        shots: rows given.
        second_order: whether ridge regression sees squares and products.
        boosted: whether there is gradient boosting, where scikit-learn is.

    Returns:
        `[splits, n, rows]` for each by name.
    """
    given = y[unseen, :shots]
    shape = (*unseen.shape, y.shape[1])
    found = {
        "patient's own mean": np.broadcast_to(given.mean(-1, keepdims=True), shape),
        "patient's last value": np.broadcast_to(given[..., -1:], shape),
    }
    models = {"ridge": _ridge(x, _second_order if second_order else lambda x: x)}
    if boosted and importlib.util.find_spec("sklearn"):
        models["gradient boosting"] = _boosting(x)
    elif boosted:
        print(
            "gradient boosting is left out: it needs scikit-learn "
            "(pip install 'fomaml-jax[patients]')"
        )
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


def _ridge(x, expanded):
    """`(y, counts, patients) -> (patients -> predictions)`, its penalty chosen among them."""

    def with_alpha(y, counts, groups, alphas):
        inputs, targets = _real(x, y, counts, groups)
        mean, scale = inputs.mean(0), inputs.std(0) + 1e-9
        design = expanded((inputs - mean) / scale)
        centre, spread = design.mean(0), design.std(0) + 1e-9
        design, offset = (design - centre) / spread, targets.mean()
        gram, moment = design.T @ design, design.T @ (targets - offset)
        solved = [np.linalg.solve(gram + a * np.eye(len(gram)), moment) for a in alphas]

        def predict(others):
            of_others = (expanded((x[others] - mean) / scale) - centre) / spread
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
        from sklearn import ensemble  # pyright: ignore[reportMissingImports]

        inputs, targets = _real(x, y, counts, groups)
        model = ensemble.HistGradientBoostingRegressor(
            learning_rate=0.05, max_iter=200, random_state=0
        )
        model.fit(inputs, targets)
        return lambda others: model.predict(x[others].reshape(-1, x.shape[-1])).reshape(
            len(others), -1
        )

    return fit


def mixed_effects(x, y, counts, train, unseen, shots, *, fixed):
    """A linear mixed-effects model: a level and a drift of every patient, by statsmodels (REML).

    A new patient's are their best linear unbiased predictions from his first rows.

    Args:
        x: as for `of_tables`, the time first.
        y: as for `of_tables`.
        counts: as for `of_tables`.
        train: as for `of_tables`.
        unseen: as for `of_tables`.
        shots: as for `of_tables`.
        fixed: how many of the features, the first ones, have fixed effects.
    """
    from statsmodels.regression import mixed_linear_model  # pyright: ignore[reportMissingImports]

    found = np.empty((*unseen.shape, y.shape[1]))
    for s, (known, new) in enumerate(zip(train, unseen, strict=True)):
        inputs, targets = _real(x[..., :fixed], y, counts, known)
        mean, scale = inputs[:, 1:].mean(0), inputs[:, 1:].std(0)

        def design(x, mean=mean, scale=scale):
            rest = (x[..., 1:fixed] - mean) / scale
            return np.concatenate([np.ones_like(x[..., :1]), x[..., :1], rest], -1)

        matrix = design(inputs)
        whose = np.repeat(known, counts[known])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a variance is near its boundary
            fitted = mixed_linear_model.MixedLM(targets, matrix, whose, exog_re=matrix[:, :2]).fit()
        between, within = np.asarray(fitted.cov_re), float(fitted.scale)
        plain = design(x[new]) @ fitted.fe_params
        for i, p in enumerate(new):
            effects = design(x[p])[:, :2]
            given = effects[:shots]
            of_given = given @ between @ given.T + within * np.eye(shots)
            apart = np.linalg.solve(of_given, y[p, :shots] - plain[i, :shots])
            found[s, i] = plain[i] + effects @ between @ given.T @ apart
    return found


RATES = (0.01, 0.03, 0.1, 0.3)
"""Of fine-tuning: chosen on a fifth of the training patients, unseen by a first network."""


def fine_tuned(x, y, counts, train, unseen, shots, steps):
    """A network trained on all patients at once, then fine-tuned on a new patient's first rows.

    It is trained on their later rows, those that others are to predict. Fine-tuning takes 10
    steps of gradient descent, at the rate that did best on held-out training patients.
    """
    net = fj.models.mlp(hidden=(32, 32))
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def outputs(params, x):
        return jnp.asarray(net.apply(params, x))[..., 0]

    def loss_fn(params, batch):
        (x, y), weights = batch
        return fj.uneven.weighted_mean((outputs(params, x) - y) ** 2, weights)

    def descent(rate):
        return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate))

    def trained(groups):
        meta_gradient = fj.fomaml(loss_fn, optax.identity(), 0)  # no step: joint training
        learner = fj.meta_learner(
            fj.over_tasks(meta_gradient, tasks_at_once=None),
            optax.adam(optax.cosine_decay_schedule(3e-3, steps, alpha=0.01)),
        )
        rows = (x_of(groups)[groups], y_of(groups)[groups])
        sample_task = fj.tasks.from_groups(
            rows, jnp.asarray(counts)[groups], shots=shots, queries=20
        )

        def step(state, _):
            tasks = jax.vmap(sample_task)(fj.tasks.task_keys(jax.random.key(1), state.step, 16))
            return learner.step(state, tasks)[0], None

        start = learner.init(net.init(jax.random.key(0), jnp.zeros((1, x.shape[-1]))))
        return jax.lax.scan(step, start, length=steps)[0].params

    def x_of(groups):
        first = x[groups, 0]
        return (x - first.mean(0)) / (first.std(0) + jnp.float32(1e-3)).at[0].set(1.0)

    def y_of(groups):
        first = y[groups, 0]
        return (y - first.mean()) / first.std()

    def predict(groups, others):
        """`[rates, others, rows]`."""
        params, inputs, targets = trained(groups), x_of(groups), y_of(groups)
        first = y[groups, 0]

        def of(rate, p):
            support = (inputs[p, :shots], targets[p, :shots]), jnp.ones(shots)
            own, _ = fj.adapt(loss_fn, params, support, descent(rate), 10)
            return first.mean() + first.std() * outputs(own, inputs[p])

        return jax.lax.map(lambda rate: jax.vmap(lambda p: of(rate, p))(others), jnp.array(RATES))

    cut = train.shape[1] // FOLDS
    predict = jax.jit(jax.vmap(predict))
    held = train[:, :cut]
    on_held = np.asarray(predict(train[:, cut:], held))
    errors = [
        later_error(np.asarray(y)[h], p, counts[h], shots).mean(-1)
        for h, p in zip(held, on_held, strict=True)
    ]
    best = np.argmin(np.nan_to_num(errors, nan=np.inf), axis=1)
    return np.asarray(predict(train, unseen))[np.arange(len(train)), best]
