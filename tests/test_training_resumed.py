"""Training in a folder: what is saved there, and what is resumed ends on the same numbers."""

import datetime
import json
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command_line import held
from problems import assert_close, network_problem
from training_runs import LEVELS, train

import fomaml_jax as fj
from fomaml_jax import checkpoints, training

pytestmark = pytest.mark.usefixtures("standard_promotion")


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
@pytest.mark.parametrize(
    "every", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5)), datetime.timedelta(0)]
)
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


def test_what_the_best_is_stays_what_it_was(tmp_path):
    scored = RUN | {"validate": lambda params: 1.0, "folder": tmp_path}
    train(**scored, lower_is_better=True)
    with pytest.raises(ValueError, match="lower_is_better was True, now False"):
        train(**scored, resume=True)
    with pytest.raises(ValueError, match="validate was given, now not given"):
        train(**scored | {"validate": None}, resume=True)
    unscored = scored | {"validate": None, "validate_every": None, "folder": tmp_path / "unscored"}
    train(**unscored)
    with pytest.raises(ValueError, match="validate was not given, now given"):
        train(**unscored | {"validate": lambda params: 1.0}, resume=True)


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


@pytest.mark.parametrize("every", [1, 50])
def test_a_run_that_is_stopped_while_it_diverges_has_the_state_before(tmp_path, every):
    stopped = train(
        **FALLING,
        steps=100,
        folder=tmp_path,
        report_every=1,
        checkpoint_every=every,
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
