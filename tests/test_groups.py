"""Tables as tasks: which rows are given, which are asked for, and what padding is worth."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from problems import assert_close

import fomaml_jax as fj

COUNTS = np.array([9, 4, 6])
ROWS = 10 * np.arange(3)[:, None] + np.arange(9)  # row r of group g is 10 g + r
REAL = np.arange(9) < COUNTS[:, None]
PADDED = (np.where(REAL, ROWS, -1).astype(np.int32),)


def draws(count=60, **options):
    """Groups, support rows and query rows of so many tasks."""
    sample_task = fj.tasks.from_groups(PADDED, COUNTS, shots=3, **options)
    keys = jax.random.split(jax.random.key(0), count)
    tasks = jax.device_get(jax.jit(jax.vmap(sample_task))(keys))
    for i in range(count):
        ((given,), ones), ((asked,), weights) = jax.tree.map(lambda x, i=i: x[i], tasks)
        np.testing.assert_array_equal(ones, 1)
        yield given[0] // 10, given % 10, asked[weights > 0], weights


def test_the_first_rows_are_given_and_all_later_ones_asked_for():
    seen = set()
    for group, given, asked, weights in draws():
        seen.add(int(group))
        np.testing.assert_array_equal(given, [0, 1, 2])
        np.testing.assert_array_equal(asked, 10 * group + np.arange(3, COUNTS[group]))
        assert weights.sum() == COUNTS[group] - 3
    assert seen == {0, 1, 2}


def test_every_group_is_as_likely_however_many_rows_it_has():
    drawn = [int(group) for group, *_ in draws(300)]
    assert scipy.stats.chisquare(np.bincount(drawn, minlength=3)).pvalue > 0.01


def test_a_few_of_the_later_rows_at_random():
    asked_for = {g: set() for g in range(3)}
    for group, given, asked, _ in draws(queries=2):
        np.testing.assert_array_equal(given, [0, 1, 2])
        assert len(set(asked)) == min(2, COUNTS[group] - 3)
        asked_for[int(group)] |= set((asked % 10).tolist())
    assert asked_for == {g: set(range(3, COUNTS[g])) for g in range(3)}


def test_more_queries_than_there_are_rows_are_padded():
    assert all(len(weights) == 6 for *_, weights in draws(queries=50))


@pytest.mark.parametrize("queries", [None, 2])
def test_random_support_and_the_others_never_share_a_row(queries):
    given_rows = {g: set() for g in range(3)}
    for group, given, asked, _ in draws(support="random", queries=queries):
        given_rows[int(group)] |= set(given.tolist())
        of_group = set((asked % 10).tolist())
        assert len(set(given.tolist())) == 3
        assert len(of_group) == len(asked)
        assert not of_group & set(given.tolist())
        assert set((asked // 10).tolist()) == {int(group)}
        if queries is None:
            assert of_group | set(given.tolist()) == set(range(COUNTS[group]))
            assert sorted(asked) == asked.tolist()
    assert given_rows == {g: set(range(COUNTS[g])) for g in range(3)}


def test_each_group_once_in_order():
    tasks = fj.tasks.each_group(PADDED, COUNTS, shots=3)
    (given,), ones = tasks.support
    (asked,), weights = tasks.query
    np.testing.assert_array_equal(given, ROWS[:, :3])
    np.testing.assert_array_equal(ones, np.ones((3, 3)))
    np.testing.assert_array_equal(weights, REAL[:, 3:])
    np.testing.assert_array_equal(np.where(weights > 0, asked, 0), (ROWS * REAL)[:, 3:])


def test_what_is_learned_of_padded_groups_is_what_each_teaches_alone():
    """The mean meta-gradient is the mean of those of the groups without any padding."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(3, 9)).astype(np.float32) for _ in range(2))

    def plain(slope, batch):
        return jnp.mean((slope * batch[0] - batch[1]) ** 2)

    def weighted(slope, batch):
        (x, y), weights = batch
        return fj.uneven.weighted_mean((slope * x - y) ** 2, weights)

    slope, inner = jnp.float32(0.5), optax.sgd(0.1)
    alone = [
        fj.fomaml(plain, inner, 2)(slope, fj.Task((x[g, :3], y[g, :3]), (x[g, 3:n], y[g, 3:n])))[0]
        for g, n in enumerate(COUNTS)
    ]
    tasks = fj.tasks.each_group((x, y), COUNTS, shots=3)
    together, _ = fj.over_tasks(fj.fomaml(weighted, inner, 2))(slope, tasks)
    np.testing.assert_allclose(together, np.mean(alone), rtol=1e-5)


def test_groups_may_be_chosen_under_vmap():
    """Cross-validation: the groups of every fold are arrays, and the folds run at once."""
    folds = jnp.array([[0, 1], [1, 2]])

    @jax.vmap
    def of_fold(groups):
        rows = (jnp.asarray(PADDED[0])[groups],)
        return fj.tasks.each_group(rows, jnp.asarray(COUNTS)[groups], shots=3)

    (given,), _ = of_fold(folds).support
    np.testing.assert_array_equal(given, ROWS[folds, :3])


def test_evaluation_on_each_of_the_given_tasks():
    x = np.arange(15, dtype=np.float32).reshape(3, 5)
    tasks = fj.Task(x[:, :2], x[:, 2:])
    own_mean = lambda params, support: support.mean() + params
    error = lambda mean, query: jnp.abs(query - mean).mean()
    mesh = jax.make_mesh((2,), ("tasks",), (jax.sharding.AxisType.Auto,))
    expected = np.abs(x[:, 2:] - x[:, :2].mean(1, keepdims=True) - 1).mean(1)
    for options in ({}, {"tasks_at_once": None}, {"mesh": mesh}):
        found = fj.evaluate_on(own_mean, error, jnp.float32(1), tasks, **options)
        np.testing.assert_allclose(found.per_task, expected)
        assert found.num_tasks == 3
        np.testing.assert_allclose(found.mean, expected.mean(), rtol=1e-6)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        fj.evaluate_on(own_mean, error, jnp.float32(1), jax.tree.map(lambda x: x[:1], tasks))


X = np.ones((3, 9, 2), np.float32)
BROKEN = np.where(np.arange(9)[:, None] == 1, np.nan, X)
WRONG = {
    "no arrays": (((), COUNTS), {}, "rows holds no arrays"),
    "no rows": (((np.ones(3),), COUNTS), {}, r"rows\[0\] has shape \(3,\)"),
    "uneven leaves": (((X, X[:2]), COUNTS), {}, r"rows\[1\] has shape \(2, 9, 2\)"),
    "no groups": ((X[:0], COUNTS[:0]), {}, "rows has no groups"),
    "counts of others": ((X, COUNTS[:2]), {}, r"counts must be \[3\], got shape \(2,\)"),
    "fractions": ((X, COUNTS / 2), {}, "counts must be integers, got dtype float64"),
    "more than there are": ((X, COUNTS + 1), {}, "counts says 10 rows, but rows has 9"),
    "one row": ((X, np.array([9, 1, 6])), {"shots": 1}, "group 1 has 1 row, and shots=1 leaves"),
    "too few": ((X, COUNTS), {"shots": 4}, "group 1 has 4 rows, and shots=4 leaves none"),
    "no shots": ((X, COUNTS), {"shots": 0}, "shots must be an integer of at least 1, got 0"),
    "no queries": ((X, COUNTS), {"queries": 0}, "queries must be an integer of at least 1, got 0"),
    "an unknown support": ((X, COUNTS), {"support": "last"}, "support must be one of 'first', "),
    "a missing value in few bits": (
        (BROKEN.astype(jnp.bfloat16), COUNTS),
        {},
        r"rows\[0, 1\] is not finite",
    ),
    "a value beyond float32": (
        (1e300 * X.astype(np.float64), COUNTS),
        {},
        r"rows\[0, .\] is not finite",
    ),
    "milliseconds since 1970": (
        (X.astype(np.int64) + 1_767_225_600_000, COUNTS),
        {},
        r"rows\[0, 0\] is beyond int32, so shift or scale all of them first \(",
    ),
    "a missing value": ((BROKEN, COUNTS), {}, r"rows\[0, 1\] is not finite \(3 rows in all\)"),
}


@pytest.mark.parametrize(("arrays", "options", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_table_of_groups_is_refused(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        fj.tasks.from_groups(*arrays, **({"shots": 2} | options))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_what_is_in_the_padding_does_not_matter(dtype):
    """Tables come with NaN there, which times a weight of zero is NaN in the gradients."""
    rng = np.random.default_rng(0)
    counts = np.array([4, 7, 5])
    padding = np.arange(7) >= counts[:, None]
    x, y = rng.normal(size=(3, 7, 2)).astype(dtype), rng.normal(size=(3, 7)).astype(dtype)

    def loss(params, batch):
        (x, y), weights = batch
        return fj.uneven.weighted_mean((x @ params - y) ** 2, weights)

    def found(filling):
        rows = np.where(padding[..., None], filling, x), np.where(padding, filling, y)
        rows = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), rows)
        sample_task = fj.tasks.from_groups(rows, counts, shots=2)
        drawn = jax.vmap(sample_task)(jax.random.split(jax.random.key(0), 4))
        meta_gradient = jax.jit(fj.over_tasks(fj.fomaml(loss, optax.sgd(0.1), 2)))
        each = fj.tasks.each_group(rows, counts, shots=2)
        return [meta_gradient(jnp.ones(2, dtype), tasks) for tasks in (drawn, each)]

    for with_nan, with_zero in zip(found(np.nan), found(0.0), strict=True):
        assert with_nan[1].finite.all()
        assert_close(with_nan, with_zero, 0)
