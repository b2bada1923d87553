"""From options to a problem: a head of zeros in every task, and every layer adapted."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_close

import fomaml_jax as fj
from fomaml_jax import datasets, heads, options, problems
from fomaml_jax.datasets import ImageClasses, Splits

WAYS, QUERIES, SIZE = 3, 2, 16
CHOSEN = options.Glyphs(ways=WAYS, train_ways=WAYS, queries=QUERIES, width=4)
KEY = jax.random.key(5)


def noise(classes, examples=5, seed=0):
    """Classes that have nothing in common: one blurred pattern each, and noise."""
    rng = np.random.default_rng(seed)
    pattern = rng.uniform(size=(classes, 1, 4, 4, 1)).repeat(4, 2).repeat(4, 3)
    images = 0.8 * pattern + 0.2 * rng.uniform(size=(classes, examples, SIZE, SIZE, 1))
    counts = np.full(classes, examples, np.int32)
    names = tuple(f"{seed} {c}" for c in range(classes))
    return ImageClasses((255 * images).astype(np.uint8), counts, names)


SPLITS = Splits(noise(6, seed=0), noise(5, seed=1), noise(7, seed=2))


def build(chosen=CHOSEN, splits=SPLITS, **how):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("glyphs", "omniglot", "image_folder"):
            patch.setattr(datasets, name, lambda *args, **kwargs: splits)
        return problems.build(chosen, **how)


def test_only_those_who_train_need_enough_pictures_to_train_on():
    chosen = dataclasses.replace(CHOSEN, shots=4)
    splits = SPLITS._replace(test=noise(7, examples=6, seed=2))
    with pytest.raises(ValueError, match=r"^validation split: .* has 5 pictures, but shots=4 plus"):
        build(chosen, splits)
    judged = build(chosen, splits, trains=False)
    assert sample(judged.test).support[0].shape[0] == WAYS * 4
    with pytest.raises(ValueError, match=r"^test split: .* has 5 pictures, but shots=4 plus"):
        build(chosen, trains=False)


@pytest.fixture(scope="module")
def problem():
    return build()


@pytest.fixture(scope="module")
def shared(problem):
    """Shared parameters that differ from the first everywhere, zeros included."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), problem.params
    )


@pytest.fixture(scope="module")
def task(problem):
    return sample(problem.test)


@pytest.fixture(scope="module")
def adapt_path(problem):
    return jax.jit(problems.adapt_path(problem, CHOSEN.inner_steps))


@pytest.fixture(scope="module")
def path(adapt_path, shared, task):
    return adapt_path(shared, task.support)


@pytest.fixture(scope="module")
def metric(problem):
    return jax.jit(problem.metric_fn)


@pytest.fixture(scope="module")
def gradient(problem):
    return jax.jit(jax.grad(problem.loss_fn))


def sample(sample_task, key=KEY):
    return jax.jit(sample_task)(key)


def at(path, step):
    return jax.tree.map(lambda x: x[step], path)


def moved(path, step):
    """The largest change of each array in one step, by name."""
    before, after = (jax.tree.leaves_with_path(at(path, k)["params"]) for k in (step, step + 1))
    return {
        "/".join(key.key for key in name): np.abs(x - y).max()
        for (name, x), (_, y) in zip(before, after, strict=True)
    }


# The head.


def test_the_head_is_no_shared_parameter_and_starts_at_zero(problem, shared):
    assert set(problem.params["params"]) == {f"{x}{k}" for x in ("conv", "norm") for k in range(4)}
    started = problem.start(shared, None)
    head = started["params"].pop("head")
    assert_close(started, shared, 0)
    assert {name: x.shape for name, x in head.items()} == {"kernel": (4, WAYS), "bias": (WAYS,)}
    assert not any(np.any(x) for x in head.values())


def test_with_head_undoes_without_head(problem, shared):
    started = problem.start(shared, None)
    head = started["params"]["head"]
    assert_close(heads.with_head(heads.without_head(started), head), started, 0)


def test_a_fresh_head_is_given_to_every_task_and_its_gradient_thrown_away():
    head, task = {"kernel": jnp.ones(2)}, fj.Task((), ())

    def meta_gradient(params, task):
        assert params == {"params": {"conv0": 3, "head": head}}
        return {"params": {"conv0": 6, "head": head}}, task

    fresh = heads.fresh_head(meta_gradient, head)
    assert fresh({"params": {"conv0": 3}}, task) == ({"params": {"conv0": 6}}, task)


def test_the_meta_gradient_is_the_query_gradient_at_the_adapted_parameters(
    problem, shared, task, path, gradient
):
    grads, info = jax.jit(problem.meta_gradient)(shared, task)
    assert jax.tree.structure(grads) == jax.tree.structure(problem.params)
    expected = gradient(at(path, -1), task.query)
    assert_close(grads, heads.without_head(expected), 1e-5)
    assert all(np.any(g) for g in jax.tree.leaves(grads))
    assert info.finite


# Learned rates, and a head that is learned.

LEARNED = dataclasses.replace(CHOSEN, learned_rates=True, inner_steps=2, train_ways=4)


def test_learned_rates_are_of_every_tensor_and_step_and_begin_as_given():
    built = build(LEARNED)
    rates = jax.tree.map(np.exp, built.params.rates)["params"]
    assert len(jax.tree.leaves(rates)) == 4 * 3 + 2
    for name, of_layer in rates.items():
        rate = LEARNED.head_rate if name == "head" else LEARNED.inner_rate
        for x in jax.tree.leaves(of_layer):
            np.testing.assert_allclose(x, [rate, rate], rtol=1e-6)


def test_learned_rates_at_their_first_are_those_of_a_run_without(task):
    """The head's follow the ways: three here, four in training."""
    paths = []
    for learned in (True, False):
        built = build(dataclasses.replace(LEARNED, learned_rates=learned))
        paths.append(jax.jit(problems.adapt_path(built, 2))(built.params, task.support))
    assert_close(*paths, 1e-5)


@pytest.mark.slow
def test_the_gradient_of_a_rate_is_the_change_of_the_query_loss(task):
    """By a difference: of the head's rate in the last step, on which no later gradient depends."""
    chosen = dataclasses.replace(LEARNED, train_ways=WAYS)
    built = build(chosen)
    shared = built.params
    grads, _ = jax.jit(built.meta_gradient)(shared, task)
    adapt_path = jax.jit(problems.adapt_path(built, 2))

    def query_loss(change):
        logs = jax.tree.map(jnp.array, shared.rates)
        kernel = logs["params"]["head"]["kernel"]
        logs["params"]["head"]["kernel"] = kernel.at[1].add(change)
        return built.loss_fn(
            at(adapt_path(shared._replace(rates=logs), task.support), -1), task.query
        )

    expected = (query_loss(0.05) - query_loss(-0.05)) / 0.1
    np.testing.assert_allclose(grads.rates["params"]["head"]["kernel"][1], expected, rtol=2e-2)
    assert "head" not in grads.params["params"]


@pytest.mark.usefixtures("standard_promotion")
def test_rates_are_learned_at_an_outer_rate_of_their_own():
    built = build(LEARNED)
    ones = jax.tree.map(jnp.ones_like, built.params)
    for schedule, last in (("cosine", 0.01), ("constant", 1.0)):
        chosen = dataclasses.replace(LEARNED, rate=0.5, schedule=schedule)
        optimizer = build(chosen).outer(10)
        state, update = jax.jit(optimizer.init)(built.params), jax.jit(optimizer.update)
        for _ in range(11):
            updates, state = update(ones, state, built.params)
        for x in jax.tree.leaves(updates.params):
            np.testing.assert_allclose(x, -0.5 * last, rtol=1e-3)
        for x in jax.tree.leaves(updates.rates):
            np.testing.assert_allclose(x, -problems.RATES_RATE * last, rtol=1e-3)


def test_a_learned_head_is_a_shared_parameter_and_fits_the_ways(task):
    chosen = dataclasses.replace(CHOSEN, head="learned", train_ways=None, features="mean")
    built = build(chosen)
    head = built.params["params"]["head"]
    assert head["kernel"].shape == (4, WAYS)
    assert np.any(head["kernel"])
    assert_close(built.start(built.params, None), built.params, 0)
    grads, _ = jax.jit(built.meta_gradient)(built.params, task)
    assert all(np.any(g) for g in jax.tree.leaves(grads))
    assert len(sample(built.train).support[1]) == WAYS


# Adaptation.


def test_every_layer_adapts_in_all_steps_but_the_first_which_builds_the_head(path):
    first, *later = (moved(path, step) for step in range(CHOSEN.inner_steps))
    assert first.pop("head/kernel") > 1e-3
    assert max(first.values()) < 1e-6  # a head of zeros sends nothing down, and classes balance
    assert len(later) >= 2
    for changes in later:
        assert len(changes) == 4 * 3 + 2
        assert min(changes.values()) > 1e-6, changes


@pytest.mark.parametrize("kind", [options.Glyphs, options.Omniglot])
def test_the_default_recipes_adapt_every_layer(kind):
    assert kind().inner_steps >= 2


def test_the_path_ends_where_adaptation_ends(problem, shared, task, path):
    @jax.jit
    def adapted(num_steps):
        start = problem.start(shared, None)
        return fj.adapt(problem.loss_fn, start, task.support, problem.inner(shared), num_steps)[0]

    for steps in range(CHOSEN.inner_steps + 1):
        assert_close(at(path, steps), adapted(steps), 1e-5)


def test_the_head_has_a_rate_of_its_own_for_each_way(path, task, gradient):
    grads = gradient(at(path, 1), task.support)["params"]
    rates = dict.fromkeys(grads, CHOSEN.inner_rate) | {"head": CHOSEN.head_rate * WAYS}
    before, after = at(path, 1)["params"], at(path, 2)["params"]
    for name, rate in rates.items():
        expected = jax.tree.map(lambda x, g, rate=rate: x - rate * g, before[name], grads[name])
        assert_close(after[name], expected, 1e-5)


def test_accuracy_before_adaptation_is_that_of_a_guess(problem, metric, shared, path):
    for seed in range(5):
        query = sample(problem.test, jax.random.key(seed)).query
        assert metric(at(path, 0), query) == pytest.approx(1 / WAYS)
    assert metric(problem.start(problem.params, None), query) == pytest.approx(1 / WAYS)


def test_accuracy_is_the_fraction_of_queries_given_their_label(problem, metric, path, task):
    adapted = at(path, -1)
    x, y = task.query
    said = np.argmax(jax.jit(problem.predict)(adapted, x), -1)
    assert metric(adapted, (x, said)) == 1
    assert metric(adapted, (x, (said + 1) % WAYS)) == 0
    assert metric(adapted, task.query) == pytest.approx(np.mean(said == np.asarray(y)))


def test_adaptation_solves_what_is_easy(problem, adapt_path, metric):
    solved = []
    for seed in range(10):
        task = sample(problem.test, jax.random.key(seed))
        solved.append(metric(at(adapt_path(problem.params, task.support), -1), task.query))
    assert np.mean(solved) > 0.6


def test_labels_carry_no_information(adapt_path, metric, shared, task):
    permutation = jnp.array([2, 0, 1])
    renamed = fj.Task(*((x, permutation[y]) for x, y in task))
    results = []
    for each in (task, renamed):
        adapted = at(adapt_path(shared, each.support), -1)
        results.append((adapted["params"]["head"]["kernel"], metric(adapted, each.query)))
    (kernel, accuracy), (renamed_kernel, renamed_accuracy) = results
    assert_close(renamed_kernel[:, permutation], kernel, 1e-4)
    assert accuracy == renamed_accuracy


def test_the_judge_reports_the_metric_after_every_step(problem, adapt_path, metric, shared):
    judged = problems.judge_of(problem, problem.test, num_steps=CHOSEN.inner_steps, num_tasks=3)(
        shared, KEY
    )
    for i in range(3):
        task = sample(problem.test, jax.random.fold_in(KEY, i))
        path = adapt_path(shared, task.support)
        expected = [metric(at(path, k), task.query) for k in range(CHOSEN.inner_steps + 1)]
        np.testing.assert_allclose([m[i] for m in judged.per_task], expected, rtol=1e-6)


def test_a_widening_network_has_twice_and_four_times_the_channels_at_the_end():
    kernels = build(dataclasses.replace(CHOSEN, widening=True)).params["params"]
    assert [kernels[f"conv{k}"]["kernel"].shape[-1] for k in range(4)] == [4, 4, 8, 16]


# The outer optimizer.


@pytest.mark.usefixtures("standard_promotion")
def test_the_outer_rate_decays_to_a_hundredth():
    optimizer = problems.outer_optimizer(0.5, 20)
    state, rates = optimizer.init(jnp.zeros(1)), []
    for _ in range(21):
        update, state = optimizer.update(jnp.ones(1), state)  # Adam's step is then the rate
        rates.append(-update.item())
    np.testing.assert_allclose(rates[0], 0.5, rtol=1e-4)
    np.testing.assert_allclose(rates[10], 0.5 * (0.99 / 2 + 0.01), rtol=1e-4)
    np.testing.assert_allclose(rates[20], 0.005, rtol=1e-4)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.makes_nans
@pytest.mark.usefixtures("standard_promotion")
def test_so_many_updates_in_a_row_that_are_not_finite_are_left_out():
    optimizer = problems.build(options.Sinusoid(apply_if_finite=2)).outer(10)
    good, bad = jnp.ones(2), jnp.array([1.0, jnp.nan])
    state, update = optimizer.init(good), jax.jit(optimizer.update)
    moved = []
    for grads in (bad, bad, good, bad, bad, bad):
        by, state = update(grads, state)
        moved.append(np.asarray(by))
    for skipped in (0, 1, 3, 4):
        assert not moved[skipped].any()
    assert (moved[2] < 0).all()  # what was left out has not spoilt Adam's moments
    assert np.isnan(moved[5]).any()  # with the third in a row it gives in


# The tasks: what is asked of `episodes`, whose own tests show what it gives.


def asked(chosen, splits=SPLITS):
    """The problem with the arguments of `episodes` in place of each distribution."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problems, "episodes", lambda images, **kwargs: {"images": images} | kwargs)
        return build(chosen, splits)


def test_each_split_gives_its_own_tasks():
    built = asked(CHOSEN)
    for tasks, classes in zip((built.train, built.validation, built.test), SPLITS, strict=True):
        assert tasks["images"] is classes.images
        assert tasks["counts"] is classes.counts


def test_training_is_followed_on_its_own_classes_where_there_are_none_to_spare():
    few = ImageClasses(SPLITS.test.images[:2], SPLITS.test.counts[:2], ("a", "b"))
    built = asked(CHOSEN, SPLITS._replace(validation=few))
    assert built.validation["images"] is SPLITS.train.images


def test_training_episodes_have_ways_and_shots_of_their_own():
    built = asked(dataclasses.replace(CHOSEN, train_ways=4, train_shots=3, shots=2, queries=1))
    episodes = {"train": built.train, "validation": built.validation, "test": built.test}
    assert {n: (e["ways"], e["shots"], e["queries"]) for n, e in episodes.items()} == {
        "train": (4, 3, 1),
        "validation": (WAYS, 2, 1),
        "test": (WAYS, 2, 1),
    }


def test_only_training_pictures_are_shifted():
    built = asked(dataclasses.replace(CHOSEN, shift=3))
    image = jnp.arange(SIZE**2.0).reshape(SIZE, SIZE, 1)
    expected = fj.tasks.random_shift(3)(KEY, image)
    np.testing.assert_array_equal(built.train["augment"](KEY, image), expected)
    assert not built.validation.get("augment")
    assert not built.test.get("augment")
    assert not asked(dataclasses.replace(CHOSEN, shift=0)).train["augment"]


def test_training_pictures_are_turned_slanted_and_shifted_where_asked():
    image = jax.random.uniform(KEY, (SIZE, SIZE, 1))
    affine_key, shift_key = jax.random.split(KEY)
    for shift in (0, 2):
        augment = asked(dataclasses.replace(CHOSEN, affine=0.1, shift=shift)).train["augment"]
        if shift:
            expected = fj.tasks.random_affine(0.1)(affine_key, image)
            expected = fj.tasks.random_shift(shift)(shift_key, expected)
        else:
            expected = fj.tasks.random_affine(0.1)(KEY, image)
        np.testing.assert_allclose(augment(KEY, image), expected, rtol=1e-5)


def test_omniglot_is_turned_into_four_times_the_classes_to_train_on():
    built = asked(options.Omniglot(ways=WAYS, queries=QUERIES, width=4, train_ways=24))
    assert built.splits is not None
    train, _, test = built.splits
    turned = np.concatenate([np.rot90(SPLITS.train.images, k, (2, 3)) for k in range(4)])
    np.testing.assert_array_equal(train.images, turned)
    assert built.train["images"] is train.images
    assert len(train.counts) == len(set(train.names)) == 4 * 6
    assert test is SPLITS.test
    assert (built.train.get("rotations", False), built.test["rotations"]) == (False, True)


def test_turns_are_drawn_for_the_classes_of_an_episode_where_asked():
    chosen = options.Omniglot(ways=WAYS, queries=QUERIES, width=4, train_ways=6, turns="drawn")
    built = asked(chosen)
    assert built.splits is not None
    assert built.splits.train is SPLITS.train
    assert built.train["rotations"] is True


def test_mirrored_pictures_are_classes_of_their_own():
    built = asked(dataclasses.replace(CHOSEN, mirror=True))
    assert built.splits is not None
    train = built.splits.train
    np.testing.assert_array_equal(train.images[:6], SPLITS.train.images)
    np.testing.assert_array_equal(train.images[6:], SPLITS.train.images[:, :, :, ::-1])
    assert len(train.counts) == len(set(train.names)) == 2 * 6
    assert built.splits.test is SPLITS.test


@pytest.mark.parametrize(("classes", "ways"), [(6, 6), (20, 20), (30, 20)])
def test_training_ways_are_twenty_where_there_are_as_many(classes, ways):
    assert problems.training_ways(options.Glyphs(), noise(classes)) == ways


REFUSED = {
    "more ways than classes": (
        {"ways": 7},
        "train split: ways=7 is more than the 6 classes there are; ask for fewer with --ways",
    ),
    "more training ways than classes": (
        {"train_ways": 7},
        "train split: ways=7 is more than the 6 classes there are; ask for fewer with --train-ways",
    ),
    "more examples than there are": (
        {"shots": 3, "queries": 3},
        "validation split: the class 1 0 has 5 pictures, but shots=3 plus queries=3 are asked of "
        "every class; ask for fewer, or leave that class out",
    ),
    "other ways than a learned head": (
        {"head": "learned", "train_ways": 4},
        "--train-ways must be --ways (3) where the head is learned, got 4",
    ),
    "rates of no step": (
        {"learned_rates": True, "inner_steps": 0},
        "--inner-steps must be at least 1 with --learned-rates, got 0",
    ),
    "no tasks": (
        {"tasks_per_step": 0},
        "--tasks-per-step must be an integer of at least 1, got 0",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_impossible_problems_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build(dataclasses.replace(CHOSEN, **changes))


# Regression.


def test_sine_waves_are_regressed_with_clipped_steps():
    chosen = options.Sinusoid(inner_clip=0.5, inner_rate=0.1, shots=4)
    built = problems.build(chosen)
    task = sample(built.test)
    assert built.start(built.params, None) is built.params
    assert len(task.support[0]) == 4
    assert len(task.query[0]) == 100
    assert len(jax.eval_shape(built.train, KEY).query[0]) == chosen.queries
    x, y = map(np.asarray, task.query)
    error = np.mean((np.asarray(jax.jit(built.predict)(built.params, x)) - y) ** 2)
    np.testing.assert_allclose(jax.jit(built.metric_fn)(built.params, (x, y)), error, rtol=1e-5)

    path = jax.jit(problems.adapt_path(built, 1))(built.params, task.support)
    step = jax.tree.map(lambda x: np.asarray(x[1] - x[0]), path)
    norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(step)))
    np.testing.assert_allclose(norm, 0.5 * 0.1, rtol=1e-4)


def test_the_seed_decides_the_first_parameters():
    first, again, other = (
        problems.build(options.Sinusoid(seed=seed)).params["params"]["head"]["kernel"]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
