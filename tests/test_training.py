"""The outer loop: plain steps in a row, reported as they were, and resumed to the same numbers."""

import datetime
import json
import os
import re
import shutil
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command_line import held
from problems import assert_close, network, network_problem

import fomaml_jax as fj
from fomaml_jax import checkpoints, devices, training
from fomaml_jax.tasks import task_keys

pytestmark = [
    pytest.mark.usefixtures("quick_compiles"),
    pytest.mark.usefixtures("standard_promotion"),
]

KEY = jax.random.key(3)
SAMPLE = fj.tasks.sinusoid(shots=3, queries=4)
FOMAML = fj.fomaml(network, optax.sgd(0.05), 2)
PARAMS, _ = network_problem(1)
STEPS = 3


def outer():
    """An optimizer with state and a rate that changes from step to step."""
    return optax.adam(optax.cosine_decay_schedule(0.05, STEPS))


def train(
    meta_gradient=FOMAML,
    sample_task=SAMPLE,
    params=PARAMS,
    optimizer=None,
    key=KEY,
    tasks_at_once="auto",
    **kwargs,
):
    """`fj.train` with the tasks shared out among the devices; what was reported beside it."""
    kwargs = {"steps": STEPS, "tasks_per_step": 4, "name": None} | kwargs
    mesh = devices.mesh_for(int(kwargs["tasks_per_step"]))
    learner = devices.sampled_learner(
        meta_gradient, sample_task, optimizer or outer(), mesh=mesh, tasks_at_once=tasks_at_once
    )
    return fj.train(learner, params, lambda key: key, key, mesh=mesh, **kwargs)


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


# A task whose loss is the value it was drawn as, and whose meta-gradient is one.


def uniform_task(key):
    level = jax.random.uniform(key, (1,))
    return fj.Task(level, level)


def of_level(params, task):
    level = task.query[0]
    finite = jnp.isfinite(level)
    grads = jnp.where(finite, jnp.ones_like(params), jnp.nan)
    return grads, fj.TaskInfo(level, level, finite, None)


def levels(step, num_tasks):
    return np.array([uniform_task(key).query[0] for key in task_keys(KEY, step, num_tasks)])


LEVELS = {
    "meta_gradient": of_level,
    "sample_task": uniform_task,
    "params": jnp.zeros(1),
    "optimizer": optax.sgd(1.0),
}


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


def test_it_runs_in_a_thread_which_no_signal_reaches():
    found = []
    thread = threading.Thread(target=lambda: found.append(train(**LEVELS)))
    thread.start()
    thread.join()
    assert found[0].stopped == "finished"


# Resuming.


class Killed(BaseException):
    """What stops a run at once, as `kill -9` does."""


def scored(params):
    return float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(params)))


RUN = {"steps": 23, "report_every": 4, "validate_every": 6, "validate": scored}


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_bitwise(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.filterwarnings("ignore:.*has no checkpoint")
@pytest.mark.parametrize("every", [1, 5, datetime.timedelta(0)])
def test_a_killed_run_ends_where_it_would_have_ended(tmp_path, monkeypatch, every):
    whole = train(**RUN, folder=tmp_path / "whole")
    save, appended = checkpoints.save, training.runs.append_metrics
    left = 0

    def dying(original):
        def call(*args):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return original(*args)

        return call

    # Killed before the second row or checkpoint is written, then before the third, and so on.
    monkeypatch.setattr(checkpoints, "save", dying(save))
    monkeypatch.setattr(training.runs, "append_metrics", dying(appended))
    kills, trained = 0, None
    while trained is None:
        left = 2 + kills
        try:
            trained = train(
                **RUN, folder=tmp_path / "cut", checkpoint_every=every, resume=kills > 0
            )
        except Killed:
            kills += 1
            left = 0
            assert kills < 20
    assert kills > 2
    assert_bitwise((trained.state, trained.best), (whole.state, whole.best))
    assert trained.best_score == whole.best_score
    assert trained.metrics == whole.metrics == metrics_of(tmp_path / "cut")
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (
        tmp_path / "whole/metrics.jsonl"
    ).read_bytes()


def halted(folder, step=8, **kwargs):
    """A run that its caller stopped."""
    return train(**RUN | kwargs, folder=folder, on_report=lambda row, params: row["step"] == step)


def test_half_a_line_of_metrics_is_dropped(tmp_path):
    halted(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "ta')
    train(**RUN, folder=tmp_path, resume=True)
    assert [row["step"] for row in metrics_of(tmp_path)] == [4, 6, 8, 12, 16, 18, 20, 23]


def test_resuming_without_a_checkpoint_begins_at_the_start(tmp_path):
    new = tmp_path / "not" / "there"
    whole = train(**RUN)
    assert_bitwise(train(**RUN, folder=new, resume=True).state, whole.state)
    shutil.rmtree(new / "checkpoints")
    with pytest.warns(UserWarning, match="has no checkpoint; training begins at the start"):
        again = train(**RUN, folder=new, resume=True)
    assert_bitwise(again.state, whole.state)
    assert again.metrics == whole.metrics


def test_a_loss_that_json_has_no_word_for_does_not_stop_a_resume(tmp_path):
    halted(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text(re.sub(r'"loss": [^,]+', '"loss": null', path.read_text()))
    with pytest.warns(UserWarning, match="is not what was written"):
        resumed = train(**RUN, folder=tmp_path, resume=True)
    assert np.isnan(resumed.metrics[0]["loss"])
    assert resumed.stopped == "finished"


def test_numpy_integers_are_numbers_too(tmp_path):
    numbers = {"steps": np.int64(23), "report_every": np.int32(4), "tasks_per_step": np.int64(4)}
    found = train(**RUN | numbers, folder=tmp_path, checkpoint_every=np.int64(5))
    assert found.metrics == train(**RUN).metrics
    rows = [
        train(**LEVELS, steps=None, tasks=4000, tasks_per_step=kind(4)).metrics
        for kind in (int, np.int64)
    ]
    assert len(rows[0]) == 100
    assert rows[1] == rows[0]


def test_without_orbax_a_folder_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax", None)
    monkeypatch.delitem(sys.modules, "orbax.checkpoint", raising=False)
    with pytest.raises(ImportError, match=r'need orbax: pip install "fomaml-jax\[cli\]"'):
        train(folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train().stopped == "finished"


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    whole = train(**RUN, folder=tmp_path)
    again = train(**RUN, folder=tmp_path, resume=True)
    assert_bitwise(again.state, whole.state)
    assert again.metrics == whole.metrics
    assert again.best_score == whole.best_score


def test_other_devices_resume_on_the_same_tasks(tmp_path, monkeypatch):
    halted(tmp_path)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    with pytest.warns(UserWarning, match="devices 2, and goes on with jax .*, devices 1: on the"):
        resumed = train(**RUN, folder=tmp_path, resume=True, tasks_at_once=None)
    assert_close(resumed.state.params, train(**RUN).state.params, 1e-4)


def test_a_damaged_checkpoint_is_left_out_and_said(tmp_path):
    whole = train(**RUN)
    halted(tmp_path, checkpoint_every=2)
    newest = max((tmp_path / "checkpoints").iterdir())
    (newest / "manifest.json").write_bytes(b"")
    with pytest.warns(UserWarning, match=rf"{newest.name} is damaged and was left out"):
        resumed = train(**RUN, folder=tmp_path, resume=True)
    assert_bitwise(resumed.state, whole.state)


def test_what_cannot_be_resumed_is_refused(tmp_path):
    halted(tmp_path)
    with pytest.raises(ValueError, match="holds a run; pass resume=True"):
        train(**RUN, folder=tmp_path)
    with pytest.raises(ValueError, match="tasks_per_step was 4, now 2"):
        train(**RUN, folder=tmp_path, resume=True, tasks_per_step=2)
    with pytest.raises(ValueError, match=r"is another one: key was \[0, 3\], now \[0, 4\]"):
        train(**RUN, folder=tmp_path, resume=True, key=jax.random.key(4))
    wider, _ = network_problem(1, width=9)
    with pytest.raises(ValueError, match=r"\['b1'\] should be float32\[9\], found float32\[8\]"):
        train(**RUN, folder=tmp_path, resume=True, params=wider)
    with pytest.raises(ValueError, match="is of another problem"):
        train(**RUN, folder=tmp_path, resume=True, optimizer=optax.sgd(0.1))


def test_other_data_are_not_resumed_on(tmp_path):
    train(**RUN, folder=tmp_path, config={"data": "one", "sizes": (1, 2)})
    again = train(**RUN, folder=tmp_path, resume=True, config={"data": "one", "sizes": [1, 2]})
    assert int(again.state.step) == RUN["steps"]
    with pytest.raises(ValueError, match=r"is another one: config\['data'\] was one, now two"):
        train(**RUN, folder=tmp_path, resume=True, config={"data": "two", "sizes": [1, 2]})
    with pytest.raises(ValueError, match=r"is another one: config\['data'\] was one, now None"):
        train(**RUN, folder=tmp_path, resume=True)
    with pytest.raises(TypeError, match="not JSON serializable"):
        train(**RUN, config={"rate": jnp.ones(3)})
    with pytest.raises(ValueError, match="not JSON compliant"):
        train(**RUN, config={"rate": np.nan})


def test_the_callers_names_do_not_hide_ours(tmp_path):
    named = {"folder": tmp_path, "config": {"key": "mine", "tasks_per_step": 2}}
    train(**RUN, **named)
    with pytest.raises(ValueError, match=r"is another one: key was \[0, 3\], now \[0, 9\]"):
        train(**RUN, **named, resume=True, key=jax.random.key(9))


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    with held(tmp_path), pytest.raises(ValueError, match=f"another .* trains in {tmp_path}"):
        train(**RUN, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    train(**RUN, folder=tmp_path)
    with held(tmp_path), pytest.raises(ValueError, match="another process trains"):
        train(**RUN, folder=tmp_path, resume=True)


@pytest.mark.parametrize("lost", ["", "\0" * 40, None])
def test_lost_rows_of_metrics_are_said(tmp_path, lost):
    whole = train(**RUN)
    halted(tmp_path)
    path = tmp_path / "metrics.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[1:]) if lost is None else lost)
    found = len(kept) - 1 if lost is None else 0
    with pytest.warns(UserWarning, match=rf"\({len(kept)} rows, found {found}\): distrust its"):
        resumed = train(**RUN, folder=tmp_path, resume=True)
    assert_bitwise(resumed.state, whole.state)


@pytest.mark.parametrize("row", ["{}", '{"step": "x"}', "3", '{"step": 1, "tasks": 4, "loss": 1}'])
def test_rows_that_are_none_are_refused(tmp_path, row):
    halted(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(row + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged"):
        train(**RUN, folder=tmp_path, resume=True)


def test_a_run_that_fails_in_a_function_of_the_callers_is_saved_before(tmp_path):
    def fails(row, params):
        if row["step"] == 12:
            raise ZeroDivisionError

    whole = train(**RUN)
    with pytest.raises(ZeroDivisionError):
        train(**RUN, folder=tmp_path, on_report=fails)
    assert (tmp_path / "checkpoints").exists()
    resumed = train(**RUN, folder=tmp_path, resume=True)
    assert_bitwise(resumed.state, whole.state)
    assert resumed.metrics == whole.metrics


def falls_over(params, task):
    """The parameter goes down by one a step; from -7 on, no task is finite."""
    (level,), finite = task.query, params[0] > -6.5
    grads = jnp.where(finite, jnp.ones_like(params), jnp.nan)
    return grads, fj.TaskInfo(level, level, finite, None)


FALLING = LEVELS | {"meta_gradient": falls_over}


def test_a_run_that_is_stopped_while_it_diverges_has_the_state_before(tmp_path):
    stopped = train(
        **FALLING,
        steps=100,
        folder=tmp_path,
        report_every=1,
        on_report=lambda row, params: row["step"] == 11,
    )
    assert (stopped.stopped, int(stopped.state.step)) == ("stopped", 11)
    (saved,) = (path.name for path in (tmp_path / "checkpoints").iterdir())
    assert int(saved) == 6  # the state of step 7 is one that fails
    with pytest.raises(fj.DivergedError) as caught:
        train(**FALLING, steps=100, folder=tmp_path, report_every=1, resume=True)
    assert caught.value.trained.state.params.item() == -6
    rows = metrics_of(tmp_path)
    assert [row["left_out"] for row in rows] == [0] * 7 + [4] * 10


def test_a_checkpoint_from_which_a_run_diverges_does_not_stay(tmp_path):
    """Of step 7, which is finite and was saved before anything had run from it."""
    with pytest.raises(fj.DivergedError) as caught:
        train(**FALLING, steps=100, folder=tmp_path, report_every=1, checkpoint_every=1)
    assert caught.value.trained.state.params.item() == -6
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == 6


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    blown = optax.sgd(lambda count: jnp.where(count == 4, jnp.inf, 1.0))
    wanted = LEVELS | {"optimizer": blown, "steps": 5, "checkpoint_every": 1}
    assert np.isinf(train(**wanted, folder=tmp_path, report_every=1).state.params.item())
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) < 5


def test_a_diverged_run_says_so_in_its_files_and_has_the_state_before(tmp_path, capsys):
    with pytest.raises(fj.DivergedError):
        train(**FALLING, steps=1000, report_every=500, folder=tmp_path, name="training")
    (row,) = metrics_of(tmp_path)
    assert (row["step"], row["left_out"]) == (17, 40)
    assert "40 tasks left out" in capsys.readouterr().err
    (saved,) = (path.name for path in (tmp_path / "checkpoints").iterdir())
    assert int(saved) <= 6


def test_losses_without_inner_steps():
    (row, *_) = train(meta_gradient=fj.fomaml(network, optax.sgd(0.1), 0)).metrics
    assert row.keys() == {"step", "tasks", "loss", "grad_norm", "left_out"}


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
            "checkpoint_every must be at least no time, got -1 day, 0:00:00",
        ),
        ({"max_left_out": 1.5}, "max_left_out must be a share between 0 and 1, got 1.5"),
        ({"resume": True}, "nothing to resume without a folder"),
        ({"patience": 2}, "patience counts scores; pass validate too"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=message):
        train(**wrong)


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
