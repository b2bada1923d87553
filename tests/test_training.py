"""The outer loop: plain steps in a row, reported as they were, and ended when they should be."""

import datetime
import os
import pickle
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_close, network, quadratic
from training_runs import (
    FOMAML,
    KEY,
    LEVELS,
    PARAMS,
    SAMPLE,
    STEPS,
    of_level,
    outer,
    train,
    uniform_task,
)

import fomaml_jax as fj
from fomaml_jax import checkpoints, experiment, training
from fomaml_jax.tasks import task_keys

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
]


def followed(**kwargs):
    seen = []
    trained = train(on_report=lambda row, params: seen.append((params, dict(row))), **kwargs)
    return trained, seen


def mean(trees):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def plain_loop(num_tasks):
    """Parameters, losses and norm of the gradient at each step, task by task."""
    one_task = jax.jit(lambda params, key: FOMAML(params, SAMPLE(key)))
    optimizer, params, seen = outer(), PARAMS, []
    state = optimizer.init(params)
    for step in range(STEPS):
        step_key = jax.random.fold_in(KEY, step)
        keys = [jax.random.fold_in(step_key, i) for i in range(num_tasks)]
        grads, infos = zip(*(one_task(params, key) for key in keys), strict=True)
        norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(mean(grads))))
        updates, state = optimizer.update(mean(grads), state, params)
        params = optax.apply_updates(params, updates)
        support = mean([i.support_losses for i in infos])
        row = {"loss": mean([i.query_loss for i in infos]), "grad_norm": norm}
        row |= {"support_loss_first": support[0], "support_loss_last": support[-1]}
        seen.append((params, row))
    return seen


def test_training_is_a_plain_loop():
    trained, seen = followed()
    for (params, row), (reference, expected) in zip(seen, plain_loop(4), strict=True):
        assert_close(params, reference, 1e-5)
        for name, value in expected.items():
            np.testing.assert_allclose(row[name], value, rtol=1e-5)
    assert_close(trained.state.params, reference, 1e-5)
    assert trained.best is trained.state.params
    assert (trained.best_score, trained.stopped) == (None, "finished")
    assert trained.metrics == [row for _, row in seen]


def test_a_learner_that_takes_tasks_takes_the_same():
    learner = fj.meta_learner(fj.over_tasks(FOMAML), outer())
    trained = fj.train(learner, PARAMS, SAMPLE, KEY, steps=STEPS, tasks_per_step=4, name=None)
    assert_close(trained.state.params, train().state.params, 1e-5)


def test_neither_devices_nor_tasks_at_once_change_the_numbers(monkeypatch):
    on_two = train()
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    on_one = train(tasks_at_once=None)
    assert_close(on_two.state.params, on_one.state.params, 1e-5)
    assert_close(on_two.metrics, on_one.metrics, 1e-5)


def levels(step, num_tasks):
    return np.array([uniform_task(key).query[0] for key in task_keys(KEY, step, num_tasks)])


def test_a_row_says_what_happened_since_the_last():
    rows = train(**LEVELS, steps=203, tasks_per_step=2).metrics
    assert [row["step"] for row in rows] == [*range(2, 203, 2), 203]
    assert [row["tasks"] for row in rows] == [2 * row["step"] for row in rows]
    for row, steps in zip(rows, [[0, 1], [2, 3], [4, 5]], strict=False):
        seen = np.mean([levels(step, 2) for step in steps])
        np.testing.assert_allclose(row["loss"], seen, rtol=1e-5)
        assert row["grad_norm"] == 1
        assert row["left_out"] == 0
    np.testing.assert_allclose(rows[-1]["loss"], levels(202, 2).mean(), rtol=1e-5)


def test_every_step_is_taken_once():
    _, seen = followed(**LEVELS, steps=203, tasks_per_step=2)
    for params, row in seen:
        assert params.item() == -row["step"]


def test_any_number_of_short_calls():
    trained = train(**LEVELS, steps=700, report_every=1)
    assert len(trained.metrics) == 700
    assert trained.state.params.item() == -700


def test_tasks_left_out_are_counted_and_harm_nobody(capsys):
    def sometimes_nan(key):
        return jax.tree.map(lambda x: jnp.where(x < 0.4, jnp.nan, x), uniform_task(key))

    wanted = LEVELS | {"sample_task": sometimes_nan}
    _, seen = followed(**wanted, steps=5, tasks_per_step=6, name="training")
    all_out = 0
    for step, (params, row) in enumerate(seen):
        drawn = levels(step, 6)
        assert row["left_out"] == (drawn < 0.4).sum()
        np.testing.assert_allclose(row["loss"], drawn[drawn >= 0.4].mean(), rtol=1e-5)
        assert params.item() == -(step + 1)
        all_out += row["left_out"]
    assert 0 < all_out < 30
    assert f"{all_out} tasks left out" in capsys.readouterr().err


def never_finite(key):
    return jax.tree.map(lambda x: x * jnp.nan, uniform_task(key))


def test_a_step_without_a_finite_task_changes_nothing():
    _, [(params, row)] = followed(**LEVELS | {"sample_task": never_finite}, steps=1)
    assert params.item() == 0
    assert np.isnan([row.pop("loss"), row.pop("grad_norm")]).all()
    assert row == {"step": 1, "tasks": 4, "left_out": 4}


def test_steps_without_a_finite_task_are_no_part_of_the_means():
    def sometimes_nan(key):
        return jax.tree.map(lambda x: jnp.where(x < 0.7, jnp.nan, x), uniform_task(key))

    wanted = LEVELS | {"sample_task": sometimes_nan}
    (row,) = train(**wanted, steps=20, tasks_per_step=1, report_every=20, max_left_out=1.0).metrics
    drawn = np.array([levels(step, 1)[0] for step in range(20)])
    assert row["left_out"] == (drawn < 0.7).sum()
    np.testing.assert_allclose(row["loss"], drawn[drawn >= 0.7].mean(), rtol=1e-5)
    assert row["grad_norm"] == 1


def test_the_start_and_every_report_keep_their_parameters():
    """The compiled step takes its state's buffers; nobody else's."""
    start = jax.tree.map(jnp.copy, PARAMS)
    _, seen = followed(params=start)
    for params in (start, *(params for params, _ in seen)):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert_close(start, PARAMS, 0)


def test_losses_without_inner_steps():
    (row, *_) = train(meta_gradient=fj.fomaml(network, optax.sgd(0.1), 0)).metrics
    assert row.keys() == {"step", "tasks", "loss", "grad_norm", "left_out"}


# When it ends.


def test_a_budget_of_tasks():
    trained = train(**LEVELS, steps=None, tasks=9, tasks_per_step=2)
    assert (int(trained.state.step), trained.stopped) == (5, "finished")
    assert int(train(**LEVELS, steps=3, tasks=9, tasks_per_step=2).state.step) == 3


def test_a_budget_of_time():
    trained = train(**LEVELS, steps=None, seconds=0.05)
    assert trained.stopped == "out of time"
    assert 0.05 <= trained.seconds < 30
    assert trained.state.params.item() == -int(trained.state.step) < 0


def test_the_caller_may_stop_at_any_report():
    trained = train(**LEVELS, steps=10**9, on_report=lambda row, params: row["step"] >= 1000)
    assert trained.stopped == "stopped"
    assert int(trained.state.step) == 1000


@pytest.mark.parametrize("lower", [True, False])
def test_the_best_is_kept_and_patience_ends_the_run(lower):
    # The parameter is minus the step; the score is best at step 4.
    def validate(params):
        score = -abs(params.item() + 4)
        return -score if lower else score

    trained = train(
        **LEVELS, steps=100, validate=validate, validate_every=2, patience=3, lower_is_better=lower
    )
    assert (trained.stopped, int(trained.state.step)) == ("no improvement", 10)
    assert (trained.best.item(), trained.best_score) == (-4, 0)
    scored = {row["step"]: row["validation"] for row in trained.metrics if "validation" in row}
    assert {step: abs(score) for step, score in scored.items()} == {2: 2, 4: 0, 6: 2, 8: 4, 10: 6}


def test_a_score_that_is_not_a_number_is_never_the_best():
    scores = iter([float("nan"), 1.0, float("nan"), 0.5])
    trained = train(**LEVELS, steps=4, validate=lambda p: next(scores), validate_every=1)
    assert (trained.best.item(), trained.best_score) == (-2, 1.0)


def test_the_last_step_has_a_score():
    trained = train(**LEVELS, steps=5, validate=lambda params: params.item(), validate_every=2)
    assert [row["step"] for row in trained.metrics if "validation" in row] == [2, 4, 5]


def test_a_diverged_run_stops_with_advice_and_keeps_what_was_good(tmp_path):
    def until_step_five(params, task):
        grads, info = of_level(params, task)
        fine = params[0] > -5
        return jnp.where(fine, grads, jnp.nan), info._replace(finite=fine)

    wanted = LEVELS | {"meta_gradient": until_step_five}
    with pytest.raises(training.DivergedError, match=r"up to step 15, more than 50% .* clip") as e:
        train(**wanted, steps=1000, folder=tmp_path, checkpoint_every=1)
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert steps == [4]  # the state of step 5, from which no task is finite, does not stay
    assert -5 < e.value.trained.state.params.item() <= 0
    finished = train(**wanted, steps=30, max_left_out=1.0)
    assert int(finished.state.step) == 30


def test_the_state_that_is_kept_is_not_the_one_that_has_diverged(tmp_path):
    def growing(params, batch):
        return jnp.sum((params[None] * batch[0]) ** 2)

    with pytest.raises(training.DivergedError) as e:
        train(
            fj.fomaml(growing, optax.sgd(0.01), 1),
            SAMPLE,
            jnp.ones(1),
            optax.sgd(1e38),
            steps=100,
            folder=tmp_path,
            checkpoint_every=1,
        )
    assert np.isfinite(e.value.trained.state.params).all()


@pytest.mark.parametrize(
    ("number", "why"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_signals_end_the_run_with_every_step_saved(tmp_path, number, why):
    before = signal.getsignal(number)

    def ask(row, params):
        if row["step"] == 500:
            os.kill(os.getpid(), number)

    wanted = LEVELS | {"steps": 10**6, "report_every": 500}
    trained = train(**wanted, on_report=ask, folder=tmp_path)
    assert trained.stopped == why
    assert signal.getsignal(number) is before
    (newest,) = (tmp_path / "checkpoints").iterdir()
    assert int(newest.name) == int(trained.state.step) >= 500
    resumed = train(**wanted, folder=tmp_path, resume=True, on_report=lambda *a: True)
    assert int(resumed.state.step) > int(trained.state.step)
    assert resumed.state.params.item() == -int(resumed.state.step)


def test_a_second_interrupt_stops_at_once(tmp_path):
    def ask(row, params):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(**LEVELS, on_report=ask)


def test_a_second_interrupt_loses_no_more_than_the_call_it_ends(tmp_path):
    def ask(row, params):
        if row["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(**LEVELS | {"steps": 10**6, "report_every": 1}, on_report=ask, folder=tmp_path)
    (newest,) = (tmp_path / "checkpoints").iterdir()
    assert int(newest.name) == 3


def test_what_is_being_saved_is_not_torn_apart_by_a_second_interrupt(tmp_path, monkeypatch):
    save = checkpoints.save

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        save(*args)

    monkeypatch.setattr(checkpoints, "save", interrupted)
    trained = train(**LEVELS | {"steps": 10**6}, folder=tmp_path, checkpoint_every=3)
    assert trained.stopped == "interrupted"
    (newest,) = (tmp_path / "checkpoints").iterdir()
    assert int(newest.name) == int(trained.state.step) == 3
    monkeypatch.undo()
    resumed = train(**LEVELS | {"steps": 5}, folder=tmp_path, resume=True)
    assert resumed.state.params.item() == -5


def test_it_runs_in_a_thread_which_no_signal_reaches():
    found = []
    thread = threading.Thread(target=lambda: found.append(train(**LEVELS)))
    thread.start()
    thread.join()
    assert found[0].stopped == "finished"


# What is refused.


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": None}, "nothing ends this training; pass steps, tasks or seconds"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"tasks": -1}, "tasks must be an integer of at least 1, got -1"),
        ({"seconds": 0}, "seconds must be above 0, got 0"),
        ({"tasks_per_step": 2.5}, "tasks_per_step must be an integer of at least 1, got 2.5"),
        ({"report_every": 0}, "report_every must be an integer of at least 1, got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be an integer of at least 1, got 0"),
        (
            {"checkpoint_every": datetime.timedelta(-1)},
            "checkpoint_every must not be negative, got -1 day, 0:00:00",
        ),
        ({"max_left_out": 1.5}, "max_left_out must be a share between 0 and 1, got 1.5"),
        ({"resume": True}, "nothing to resume without a folder"),
        ({"patience": 2}, "patience counts scores; pass validate too"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=message):
        train(**wrong)


@pytest.mark.parametrize(("score", "said"), [(None, "None"), (jnp.ones(2), r"an array of shape")])
def test_a_score_is_a_number(score, said):
    with pytest.raises(TypeError, match=rf"^validate must return a number, .*, got {said}"):
        train(steps=1, validate=lambda params: score)


# Tasks that overflow.


def blobs(share_that_overflows):
    """Five-way one-shot tasks in 8 of 32 dimensions, some of them far too large."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(200, 1, 8))
    points = np.float32(
        np.concatenate(
            [centres + 0.2 * rng.normal(size=(200, 12, 8)), rng.normal(size=(200, 12, 24))], -1
        )
    )
    sample = fj.tasks.episodes(points, ways=5, shots=1, queries=5)

    def sample_task(key):
        (x, y), query = sample(key)
        overflows = jax.random.bernoulli(jax.random.fold_in(key, 1), share_that_overflows)
        return fj.Task((jnp.where(overflows, jnp.float32(1e30), 1) * x, y), query)

    return sample_task


NET = fj.models.mlp((32, 32), 5)


def cross_entropy(params, batch):
    logits = NET.apply(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def accuracy_of(params):
    def adapted(params, support):
        return fj.adapt(cross_entropy, params, support, optax.sgd(0.1), 3)[0]

    def right(params, query):
        return jnp.mean(NET.apply(params, query[0]).argmax(-1) == query[1])

    judge = jax.jit(
        lambda p: fj.evaluate(adapted, right, p, blobs(0.0), jax.random.key(9), num_tasks=2000)
    )
    return float(judge(params).mean)


def train_on_blobs(share_that_overflows, **kwargs):
    return train(
        fj.fomaml(cross_entropy, optax.sgd(0.1), 3),
        blobs(share_that_overflows),
        NET.init(jax.random.key(0), jnp.zeros((1, 32))),
        optax.adam(optax.cosine_decay_schedule(1e-2, 1500)),
        **{"steps": 1500, "tasks_per_step": 16, "max_left_out": 0.5} | kwargs,
    )


@pytest.mark.slow
def test_one_task_in_eight_may_overflow():
    clean, dirty = train_on_blobs(0.0), train_on_blobs(1 / 8)
    assert sum(row["left_out"] for row in clean.metrics) == 0
    share = sum(row["left_out"] for row in dirty.metrics) / (1500 * 16)
    assert abs(share - 1 / 8) < 0.01
    before = accuracy_of(NET.init(jax.random.key(0), jnp.zeros((1, 32))))
    scores = accuracy_of(clean.state.params), accuracy_of(dirty.state.params)
    assert scores[0] > before + 0.2
    assert abs(scores[0] - scores[1]) < 0.01


def test_where_all_tasks_overflow_training_stops_soon():
    with pytest.raises(training.DivergedError, match="up to step 10,"):
        train_on_blobs(1.0)


def test_a_divergence_comes_back_from_another_process():
    trained = train(steps=1)
    error = pickle.loads(pickle.dumps(training.DivergedError("too far", trained)))
    assert str(error) == "too far"
    assert_close(error.trained.state, trained.state, 0)
    stopped = pickle.loads(pickle.dumps(experiment.StoppedError("interrupted", 3, 2)))
    assert (stopped.why, stopped.step, stopped.saved) == ("interrupted", 3, 2)


def test_no_more_copies_of_the_state_are_kept_than_are_said():
    """The learner's, with momentum, and two to go back to; and the caller's own parameters."""
    params = jnp.zeros((3, 41))
    copies = []

    def count(row, _):
        copies.append(sum(x.shape == params.shape for x in jax.live_arrays()))

    task = fj.Task(params, params)
    learner = fj.meta_learner(
        fj.over_tasks(fj.fomaml(quadratic, optax.sgd(0.1), 1)), optax.sgd(0.1, momentum=0.9)
    )
    fj.train(
        learner,
        params,
        lambda key: task,
        KEY,
        tasks_per_step=2,
        steps=6,
        report_every=1,
        on_report=count,
        name=None,
    )
    assert max(copies) <= 3 * 2 + 1


@pytest.mark.parametrize(
    ("name", "value", "form"),
    [
        ("sample_task", None, "key -> Task"),
        ("validate", 3, "params -> score"),
        ("on_report", 3, r"\(row, params\) -> whether to stop"),
    ],
)
def test_what_is_no_function_is_refused(name, value, form):
    arguments = {"sample_task": SAMPLE} | {name: value}
    sample_task = arguments.pop("sample_task")
    learner = fj.meta_learner(FOMAML, optax.sgd(0.1))
    with pytest.raises(TypeError, match=f"{name} must be a function {form}, got {value}"):
        fj.train(learner, PARAMS, sample_task, KEY, tasks_per_step=2, steps=1, **arguments)
    with pytest.raises(TypeError, match=r"mesh must be a jax\.sharding\.Mesh, such as .*, got 3"):
        fj.train(learner, PARAMS, SAMPLE, KEY, tasks_per_step=2, steps=1, mesh=3)
