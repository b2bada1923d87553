"""The navigation example: its world, its policy gradient and its meta-gradient, computed anew."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fomaml_jax as fj

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def navigation(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import navigation

    return navigation


def constant_policy(navigation, action, log_std):
    """The same Gaussian wherever the robot is."""
    params = navigation.first_params(jax.random.key(0))
    last = sorted(params["mean"])[-1]
    head = {"kernel": jnp.zeros((100, 2)), "bias": jnp.asarray(action, jnp.float32)}
    return {"mean": params["mean"] | {last: head}, "log_std": jnp.full(2, log_std)}


def biases(tree):
    """Those of the last layer: the mean of a constant policy."""
    return tree["mean"][sorted(tree["mean"])[-1]]["bias"]


def test_an_episode_computed_by_hand(navigation):
    """0.05 to the right and, of 0.2 that are asked for, 0.1 up at a time: there after three."""
    params = constant_policy(navigation, [0.5, 2.0], log_std=-30.0)
    played = navigation.play(params, jnp.array([0.15, 0.305]), jax.random.key(0))
    np.testing.assert_array_equal(np.flatnonzero(played.running), [0, 1, 2])
    np.testing.assert_allclose(
        played.observations[:4], [[0, 0], [0.05, 0.1], [0.1, 0.2], [0.15, 0.3]], atol=1e-6
    )
    by_hand = [np.hypot(0.1, 0.205), np.hypot(0.05, 0.105), 0.005]
    np.testing.assert_allclose(played.distances[:3], by_hand, atol=1e-6)
    assert not played.distances[3:].any()


def test_an_episode_that_never_arrives_is_a_hundred_steps(navigation):
    """Within 0.01 of the goal along one coordinate alone is not there."""
    params = constant_policy(navigation, [0.0, 0.0], log_std=-30.0)
    played = navigation.play(params, jnp.array([0.009, 0.3]), jax.random.key(0))
    assert played.running.all()
    np.testing.assert_allclose(played.distances.sum(), 100 * np.hypot(0.009, 0.3), rtol=1e-5)


def test_the_goal_is_seen_by_the_oracle_alone(navigation):
    for observe, differ in ((navigation.blind, False), (navigation.seeing, True)):
        params = navigation.first_params(jax.random.key(0), observe)
        key = jax.random.key(1)
        first, other = (
            navigation.play(params, jnp.array(goal), key, observe).actions[0]
            for goal in ([0.4, 0.1], [-0.3, 0.2])
        )
        assert bool((first != other).any()) == differ


MEAN, LOG_STD = np.array([0.02, -0.01]), -1.6


def wanderers(navigation, count=12):
    """Around a goal nearby, which some of them meet."""
    params = constant_policy(navigation, MEAN, LOG_STD)
    goals = jnp.tile(jnp.array([0.03, 0.02]), (count, 1))
    keys = jax.random.split(jax.random.key(2), count)
    played = jax.vmap(navigation.play, (None, 0, 0))(params, goals, keys)
    lengths = np.asarray(played.running.sum(1))
    assert lengths.min() < navigation.HORIZON == lengths.max()
    return params, goals, played, lengths


def advantages_by_hand(played, lengths):
    """From lists of the steps that were played, as float64."""
    returns, features = [], []
    for episode, length in enumerate(lengths):
        rewards = -(np.asarray(played.distances[episode, :length], np.float64) ** 2)
        seen = np.asarray(played.observations[episode, :length], np.float64)
        for t in range(length):
            returns.append(sum(0.99 ** (k - t) * rewards[k] for k in range(t, length)))
            time = t / 100
            features.append([*seen[t], *seen[t] ** 2, time, time**2, time**3, 1])
    returns, features = np.array(returns), np.array(features)
    ridge = np.sqrt(1e-5) * np.eye(features.shape[1])
    rows = np.concatenate([features, ridge]), np.concatenate([returns, np.zeros(len(ridge))])
    beyond = returns - features @ np.linalg.lstsq(*rows)[0]
    return (beyond - beyond.mean()) / beyond.std()


def test_advantages_are_standardised_returns_beyond_a_fitted_baseline(navigation):
    _, _, played, lengths = wanderers(navigation)
    found = np.asarray(navigation.advantages(played))
    running = np.arange(navigation.HORIZON) < lengths[:, None]
    np.testing.assert_allclose(found[running], advantages_by_hand(played, lengths), atol=2e-3)
    assert not found[~running].any()


def test_the_loss_has_the_gradient_of_the_score_function(navigation):
    """For a Gaussian: deviation over variance, and squared standard deviation less one."""
    params, goals, played, lengths = wanderers(navigation)
    loss_fn = jax.grad(navigation.loss_fn, has_aux=True)
    grads, (_, mean_return) = loss_fn(params, goals, None, jax.random.key(2))
    gained = advantages_by_hand(played, lengths)[:, None]
    actions = np.concatenate([played.actions[n, :length] for n, length in enumerate(lengths)])
    apart = (actions - MEAN) / np.exp(LOG_STD)
    score = -(gained * apart / np.exp(LOG_STD)).mean(0)
    np.testing.assert_allclose(biases(grads), score, atol=2e-3)
    np.testing.assert_allclose(grads["log_std"], -(gained * (apart**2 - 1)).mean(0), atol=2e-3)
    np.testing.assert_allclose(mean_return, -played.distances.sum() / len(lengths), rtol=1e-5)


def test_the_policy_gradient_is_that_of_the_expected_return(navigation, monkeypatch):
    """One step long, the expected return is an integral: its derivative by quadrature."""
    monkeypatch.setattr(navigation, "HORIZON", 1)
    std, goal, number = 0.4, np.array([0.08, -0.03]), 40_000
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = np.outer(weights, weights) / weights.sum() ** 2

    def expected(mean):
        x, y = (0.1 * np.clip(m + std * nodes, -1, 1) - g for m, g in zip(mean, goal, strict=True))
        rewards = -(x[:, None] ** 2) - y[None] ** 2
        first = (weights * rewards).sum()
        return first, np.sqrt((weights * rewards**2).sum() - first**2)

    mean, step = np.array([0.1, 0.2]), 1e-3
    slope = [(expected(mean + d)[0] - expected(mean - d)[0]) / (2 * step) for d in step * np.eye(2)]
    params = constant_policy(navigation, mean, float(np.log(std)))
    goals = jnp.tile(jnp.asarray(goal, jnp.float32), (number, 1))
    grads = jax.grad(lambda p: navigation.loss_fn(p, goals, None, jax.random.key(3))[0])(params)
    np.testing.assert_allclose(-biases(grads) * expected(mean)[1], slope, atol=4e-4)


@pytest.mark.slow
def test_the_meta_gradient_is_the_adapted_players_own(navigation):
    """The library's, and one written out: either player makes the gradient of what it played."""
    params = navigation.first_params(jax.random.key(5))
    with jax.enable_x64(True):  # a loss is a sum of both signs and order 1 that nearly cancels
        params = jax.tree.map(lambda x: x.astype(float), params)
        check_the_meta_gradient(navigation, params)


def check_the_meta_gradient(navigation, params):
    task = navigation.sample_task(jax.random.key(4), trajectories=5)
    loss = navigation.loss_fn
    algorithm = fj.fomaml(loss, optax.sgd(0.5), 1, has_state=True)
    found, info = algorithm(fj.WithState(params, None), task)

    gradient = jax.value_and_grad(loss, has_aux=True)
    (before, _), grads = gradient(params, task.support, None, jax.random.fold_in(task.key, 0))
    adapted = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    query_key = jax.random.fold_in(task.key, 3)  # of the query after step 1
    (after, (_, mean_return)), expected = gradient(adapted, task.query, None, query_key)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-4), found.params, expected
    )
    np.testing.assert_allclose(info.support_losses, [before], rtol=1e-4)
    np.testing.assert_allclose(info.query_loss, after, rtol=1e-4)
    np.testing.assert_allclose(info.aux, mean_return, rtol=1e-4)


def test_a_step_leads_towards_the_goal(navigation):
    """On average, and from a policy that knows nothing and is the same everywhere."""
    params, goal = constant_policy(navigation, [0.0, 0.0], log_std=0.0), jnp.array([0.4, -0.3])
    adapted, _ = fj.adapt(
        *(navigation.loss_fn, params, jnp.tile(goal, (20, 1)), optax.sgd(0.1), 1),
        trainable=lambda path: path.endswith("bias"),
        has_state=True,
        key=jax.random.key(6),
    )
    assert (biases(adapted) * goal > 0).all()
    many, key = jnp.tile(goal, (200, 1)), jax.random.key(7)
    before, after = (navigation.loss_fn(p, many, None, key)[1][1] for p in (params, adapted))
    assert after > before


@pytest.mark.slow
def test_the_short_form_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "navigation.py", "--short", "--out", tmp_path],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "first-order MAML" in done.stdout
    found = json.loads((tmp_path / "navigation.json").read_text())["returns"]
    assert [len(found[name]) for name in found] == [4, 4, 1]
    before, *_, after = (step["mean"] for step in found["first-order MAML"])
    assert before < after < 0
    assert (tmp_path / "navigation.png").stat().st_size < 100_000
