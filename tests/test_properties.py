"""Whatever the pytree, the dtypes and the plan: meta-gradients are those of the closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fomaml_jax as fj

pytestmark = pytest.mark.slow
KEY = jax.random.key(0)
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}
ALGORITHMS = {"fomaml": fj.fomaml, "maml": fj.maml, "reptile": fj.reptile}

shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
leaves = st.tuples(shapes, st.sampled_from(sorted(TOLERANCE)))
trees = st.recursive(
    leaves.map(lambda leaf: {"leaf": leaf}),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.sampled_from("ab c"), inner, min_size=1, max_size=2),
    ),
    max_leaves=4,
)


def is_leaf(node):
    return isinstance(node, tuple) and len(node) == 2 and isinstance(node[1], str)


def draw(rng, tree, *leading):
    """Numbers of a few bits, exact in every dtype."""

    def leaf(kind):
        shape, dtype = kind
        return jnp.asarray(rng.integers(-8, 9, (*leading, *shape)) / 4, dtype)

    return jax.tree.map(leaf, tree, is_leaf=is_leaf)


def quadratic(params, batch):
    """Half the squared distance of the parameters from the batch's only example."""

    def of_leaf(p, c):
        return jnp.sum((p.astype(jnp.float64) - c[0].astype(jnp.float64)) ** 2)

    return 0.5 * sum(jax.tree.leaves(jax.tree.map(of_leaf, params, batch)))


def closed_form(algorithm, params, support, query, rate, steps):
    """Of one leaf, in float64."""
    shrunk = (1 - rate) ** steps
    adapted = support + shrunk * (params - support)
    return {
        "fomaml": adapted - query,
        "maml": shrunk * (adapted - query),
        "reptile": params - adapted,
    }[algorithm]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
@pytest.mark.parametrize(
    ("num_tasks", "tasks_at_once", "steps"), [(1, 1, 3), (4, 2, 3), (5, 2, 1), (4, 3, 0)]
)
@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@given(tree=trees, rate=st.sampled_from([0.125, 0.5]), seed=st.integers(0, 2**31 - 1))
def test_every_path_gives_the_closed_form(
    algorithm, num_tasks, tasks_at_once, steps, tree, rate, seed
):
    rng = np.random.default_rng(seed)
    params = draw(rng, tree)
    tasks = fj.Task(draw(rng, tree, num_tasks, 1), draw(rng, tree, num_tasks, 1))
    meta_gradient = ALGORITHMS[algorithm](quadratic, optax.sgd(rate), steps)
    mesh = jax.make_mesh((2 - num_tasks % 2,), ("tasks",))
    mean = lambda stacked: jax.tree.map(lambda g: g.mean(0), stacked)
    paths = {
        "a loop": lambda params, tasks: mean(
            jax.tree.map(
                lambda *g: jnp.stack(g),
                *(
                    meta_gradient(params, jax.tree.map(lambda x, i=i: x[i], tasks))[0]
                    for i in range(num_tasks)
                ),
            )
        ),
        "vmap": lambda params, tasks: mean(jax.vmap(meta_gradient, (None, 0))(params, tasks)[0]),
        "at once": lambda *args: fj.over_tasks(meta_gradient, tasks_at_once=None)(*args)[0],
        "some at once": lambda *args: fj.over_tasks(meta_gradient, tasks_at_once=tasks_at_once)(
            *args
        )[0],
        "devices": lambda *args: fj.over_tasks(meta_gradient, mesh=mesh)(*args)[0],
    }

    def expected(p, s, q):
        p, s, q = (np.asarray(x, np.float64) for x in (p, s[:, 0], q[:, 0]))
        return closed_form(algorithm, p, s, q, rate, steps).mean(0)

    truth = jax.tree.map(expected, params, *tasks)
    for name, path in paths.items():
        found = jax.jit(path)(params, tasks)
        assert jax.tree.structure(found) == jax.tree.structure(params)
        for f, t, p in zip(*map(jax.tree.leaves, (found, truth, params)), strict=True):
            assert (f.shape, f.dtype) == (p.shape, p.dtype), name
            tolerance = TOLERANCE[str(p.dtype)]
            np.testing.assert_allclose(
                np.asarray(f, np.float64), t, rtol=tolerance, atol=4 * tolerance, err_msg=name
            )


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.integers(2, 6), min_size=2, max_size=6),
    st.data(),
)
def test_episodes_of_classes_of_any_size(counts, data):
    """Every example once, every class under one label, as often as asked, and never padding."""
    padded = data.draw(st.booleans())
    counts = counts if padded else [6] * len(counts)
    ways = data.draw(st.integers(1, len(counts)))
    shots = data.draw(st.integers(1, min(counts) - 1))
    queries = data.draw(st.integers(1, min(counts) - shots))
    seed = data.draw(st.integers(0, 2**31 - 1))
    dtype = data.draw(st.sampled_from([np.float32, np.int32, np.uint16]))
    numbers = np.arange(len(counts))[:, None] * 100 + np.arange(6)
    real = {"counts": np.array(counts)} if padded else {}
    sample_task = fj.tasks.episodes(
        numbers.astype(dtype), ways=ways, shots=shots, queries=queries, **real
    )
    keys = fj.tasks.task_keys(jax.random.key(seed), 0, 20)
    support, query = jax.device_get(jax.jit(jax.vmap(sample_task))(keys))
    for (x, y), (qx, qy) in zip(zip(*support, strict=True), zip(*query, strict=True), strict=True):
        assert x.dtype == qx.dtype == dtype
        seen = np.concatenate([x, qx]).astype(int)
        labels = np.concatenate([y, qy])
        assert len(set(seen.tolist())) == ways * (shots + queries)
        assert (seen % 100 < np.array(counts)[seen // 100]).all()
        assert len(set(seen // 100)) == ways
        assert len({(c, label) for c, label in zip(seen // 100, labels, strict=True)}) == ways
        assert np.bincount(y, minlength=ways).tolist() == [shots] * ways
        assert np.bincount(qy, minlength=ways).tolist() == [queries] * ways


@pytest.mark.parametrize(
    ("kind", "num_tasks", "least"),
    [
        ("normal", 50, 0.935),
        ("normal", 200, 0.94),
        ("accuracy", 50, 0.935),
        ("accuracy", 200, 0.94),
        ("skewed", 50, 0.92),  # what a normal interval is for so few of so skewed a metric
        ("skewed", 200, 0.935),
    ],
)
def test_intervals_cover_at_the_nominal_rate(kind, num_tasks, least):
    """Of normal metrics, of accuracies on 25 queries, and of exponential ones."""
    draw, truth = {
        "normal": (jax.random.normal, 0.0),
        "accuracy": (lambda key: jnp.mean(jax.random.bernoulli(key, 0.8, (25,))), 0.8),
        "skewed": (jax.random.exponential, 1.0),
    }[kind]

    def report(key):
        evaluation = fj.evaluate(
            lambda params, support: support,
            lambda adapted, query: adapted,
            (),
            lambda key: fj.Task(draw(key), ()),
            key,
            num_tasks=num_tasks,
            tasks_at_once=None,
        )
        return evaluation.mean, evaluation.ci95

    means, ci95 = jax.jit(jax.vmap(report))(jax.random.split(KEY, 8000))
    assert least < np.mean(np.abs(means - truth) <= ci95) < 0.96
