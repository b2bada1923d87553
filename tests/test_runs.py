"""A run's folder: what is written comes back, and damage is refused in one line."""

import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import held

from fomaml_jax import checkpoints, options, runs

PARAMS = {
    "params": {
        "conv0": {"kernel": np.arange(6, dtype=np.float32).reshape(1, 2, 3)},
        "norms": [np.float16([0.5, -2]), (np.float32(3), np.zeros((0, 4), np.float32))],
    },
    "head": {"a/b": np.array([1, 2], np.int32), "it's [0]": np.array(True)},
}


# Parameters.


def test_parameters_come_back_in_their_structure_values_and_dtypes(tmp_path):
    runs.save_parameters(tmp_path, PARAMS)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    loaded = runs.load_parameters(tmp_path, like)
    assert jax.tree.structure(loaded) == jax.tree.structure(PARAMS)
    for back, saved in zip(jax.tree.leaves(loaded), jax.tree.leaves(PARAMS), strict=True):
        assert isinstance(back, jax.Array)
        np.testing.assert_array_equal(back, saved, strict=True)


def test_parameters_are_saved_over_older_ones(tmp_path):
    for value in (1.0, 2.0):
        runs.save_parameters(tmp_path, {"w": jnp.full(3, value)})
    loaded = runs.load_parameters(tmp_path, {"w": jnp.zeros(3)})
    assert loaded["w"].tolist() == [2, 2, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["parameters.npz"]


def test_parameters_can_be_read_with_numpy_alone(tmp_path):
    runs.save_parameters(tmp_path, {"params": {"head": jnp.ones(2)}})
    with np.load(tmp_path / "parameters.npz") as file:
        assert {name: file[name].tolist() for name in file} == {"['params']['head']": [1, 1]}


MISFITS = {
    "another shape": (
        {"w": jnp.zeros(3)},
        "does not fit its configuration: ['w'] should be float32[3], found float32[2]",
    ),
    "another dtype": (
        {"w": jnp.zeros(2, jnp.float16)},
        "does not fit its configuration: ['w'] should be float16[2], found float32[2]",
    ),
    "one too few": (
        {"w": jnp.zeros(2), "b": jnp.zeros(())},
        "does not fit its configuration: ['b'] should be float32[], found nothing",
    ),
    "one too many": (
        {},
        "does not fit its configuration: ['w'] should be nothing, found float32[2]",
    ),
}


@pytest.mark.parametrize(("like", "message"), MISFITS.values(), ids=MISFITS)
def test_parameters_that_do_not_fit_are_refused(tmp_path, like, message):
    runs.save_parameters(tmp_path, {"w": jnp.zeros(2)})
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'parameters.npz'} {message}")):
        runs.load_parameters(tmp_path, like)


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 255
    path.write_bytes(content)


DAMAGE = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut short": cut,
    "a flipped byte": flip,
    "not an archive": lambda path: path.write_text("parameters"),
    "pickled objects": lambda path: np.savez(path, w=np.array([{}], object)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_parameters_are_refused(tmp_path, damage):
    params = {"w": jnp.arange(1000.0)}
    runs.save_parameters(tmp_path, params)
    path = tmp_path / "parameters.npz"
    damage(path)
    with pytest.raises(ValueError, match=f"^cannot read the parameters in {path}: "):
        runs.load_parameters(tmp_path, params)


def test_bfloat16_which_numpy_cannot_hold_is_refused_rather_than_misread(tmp_path):
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    runs.save_parameters(tmp_path, params)
    with pytest.raises(ValueError, match=r"should be bfloat16\[2\], found \|V2\[2\]"):
        runs.load_parameters(tmp_path, params)


# Whole or not at all.


def test_replacing_puts_the_new_file_in_the_place_of_the_old(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with runs.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.suffix == path.suffix
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def fail_while_replacing(path, error):
    with runs.replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise error


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_replacing_leaves_the_old_file_and_nothing_else_when_the_block_raises(tmp_path, error):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(error):
        fail_while_replacing(path, error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# JSON.


def test_metrics_are_one_object_a_line(tmp_path):
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "validation": 0.9}]
    for row in rows:
        runs.append_metrics(tmp_path, row)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_numbers_that_json_has_no_word_for_become_null(tmp_path):
    value = {"mean": float("nan"), "steps": [{"mean": float("-inf")}, {"mean": 1.0}], "n": 3}
    plain = {"mean": None, "steps": [{"mean": None}, {"mean": 1.0}], "n": 3}
    runs.write_json(tmp_path / "result.json", value)
    runs.append_metrics(tmp_path, value)
    assert json.loads((tmp_path / "result.json").read_text()) == plain
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == plain


BROKEN = {
    "no JSON": ("{", "is not JSON: Expecting property name"),
    "no text": (b"\xff\xfe", "is not JSON: 'utf-8' codec can't decode"),
    "no object": ("[1]", "is not a run's configuration: expected an object"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_configuration_is_refused(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} {message}"):
        runs.read_config(tmp_path)


def test_a_folder_without_configuration_is_not_a_run(tmp_path):
    why = {tmp_path: "it has no config.json", tmp_path / "missing": "it does not exist"}
    for folder, said in why.items():
        with pytest.raises(ValueError, match=f"^{folder} is not a run: {said}$"):
            runs.read_config(folder)


# The folder of a new run.


def test_a_new_run_goes_where_one_died_before_it_had_a_configuration(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.123.json").write_text("{")
    runs.check_new(tmp_path)
    (tmp_path / ".mine").touch()
    with pytest.raises(ValueError, match="is not empty"):
        runs.check_new(tmp_path)


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    folder = tmp_path / "run"
    refused = pytest.raises(runs.InUseError, match="another process trains in")
    with held(folder), refused, runs.alone(folder):
        pass
    with runs.alone(folder), runs.alone(folder):  # who holds it may ask again
        assert (folder / ".lock").exists()
    assert list(folder.iterdir()) == []


def test_a_lock_whose_holder_died_is_no_obstacle(tmp_path):
    (tmp_path / ".lock").touch()
    with runs.alone(tmp_path):
        pass


def test_a_lock_that_was_taken_away_while_waiting_is_taken_anew(tmp_path, monkeypatch):
    flock = runs.fcntl.flock

    def removed_meanwhile(file, how):
        flock(file, how)
        monkeypatch.setattr(runs.fcntl, "flock", flock)
        (tmp_path / ".lock").unlink()

    monkeypatch.setattr(runs.fcntl, "flock", removed_meanwhile)
    refused = pytest.raises(BlockingIOError)
    with runs.alone(tmp_path), (tmp_path / ".lock").open() as file, refused:
        flock(file, runs.fcntl.LOCK_EX | runs.fcntl.LOCK_NB)


def test_nobody_elses_lock_is_taken_away(tmp_path):
    with runs.alone(tmp_path):
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").touch()
    assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize("locks", [None, "broken"])
def test_without_locks_nothing_is_kept(tmp_path, monkeypatch, locks):
    with held(tmp_path):
        if locks is None:
            monkeypatch.setattr(runs, "fcntl", None)
        else:
            error = OSError(37, "No locks available")
            monkeypatch.setattr(runs.fcntl, "flock", Mock(side_effect=error))
        with runs.alone(tmp_path):
            pass


def test_a_new_run_goes_to_a_new_or_an_empty_folder(tmp_path):
    deep = tmp_path / "a" / "b"
    for folder in (deep, deep, tmp_path / "c"):
        runs.check_new(folder)
        with runs.alone(folder):
            runs.clear(folder)
        assert folder.is_dir()
        assert not list(folder.iterdir())


def test_clearing_takes_away_a_run_and_nothing_else(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    for folder in (run / "checkpoints" / "1", outside):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    (run / "tensorboard").symlink_to(outside)
    for name in ("config.json", "result.json", "metrics.jsonl", "notes.txt"):
        (run / name).touch()
    with runs.alone(run):
        runs.clear(run)
        assert {path.name for path in run.iterdir()} == {".lock", "notes.txt"}
    assert (outside / "file").exists()


def test_clearing_that_was_interrupted_leaves_a_run_to_be_cleared(tmp_path, monkeypatch):
    for name in runs.FILES:
        (tmp_path / name).write_text(json.dumps(options.to_json(options.Sinusoid())))
    unlink, left = runs.Path.unlink, len(runs.FOLDERS + runs.FILES)

    def dying(path, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        unlink(path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Path, "unlink", dying)
        with pytest.raises(KeyboardInterrupt):
            runs.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    runs.check_new(tmp_path, overwrite=True)


def test_a_folder_with_something_in_it_and_a_file_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file; pass --out with a folder, new or empty"):
        runs.check_new(tmp_path / "file")
    with pytest.raises(ValueError, match=r"is not empty; pass --out with a folder, new or empty"):
        runs.check_new(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    message = r"^cannot write a run to .*file/run: Not a directory$"
    with pytest.raises(ValueError, match=message), runs.alone(tmp_path / "file" / "run"):
        pass


# Options.


def test_what_is_said_of_a_run_that_goes_on(tmp_path):
    runs.write_json(tmp_path / runs.CONFIG, options.to_json(options.Sinusoid(patience=3)))
    row = dict.fromkeys(runs.ROW, 1)
    rows = [row | {"step": step, "validation": 0.5} for step in (10, 20)] + [row | {"step": 25}]
    (tmp_path / runs.METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="are the best by validation until step 20 or later$"):
        runs.warn_if_begun(tmp_path)
    runs.write_json(tmp_path / runs.CONFIG, options.to_json(options.Sinusoid()))
    with pytest.warns(UserWarning, match="its parameters are of step 20 or later$"):
        runs.warn_if_begun(tmp_path)
    (tmp_path / runs.DIVERGED).write_text("{}")
    with pytest.warns(UserWarning, match="has diverged: its parameters are those before that$"):
        runs.warn_if_begun(tmp_path)


def test_replacing_waits_until_the_new_file_is_on_the_disk(tmp_path, monkeypatch):
    done = []
    of_os = {name: getattr(os, name) for name in ("fsync", "replace")}
    for name in of_os:
        monkeypatch.setattr(
            os, name, lambda *args, name=name: (done.append(name), of_os[name](*args))[1]
        )
    runs.write_json(tmp_path / "one.json", {})
    assert done == ["fsync", "replace"]


def test_without_an_installed_package_there_are_results_all_the_same(monkeypatch):
    def version(name):
        if name == "fomaml-jax":
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    assert runs.versions()["fomaml-jax"] == "unknown"
    assert runs.versions()["jax"] == "1"


def test_windows_opens_no_folders_and_removes_no_open_file(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError

    monkeypatch.setattr(sys, "platform", "win32")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        checkpoints.flush(tmp_path)
    with monkeypatch.context() as patch, runs.alone(tmp_path):
        patch.setattr(Path, "unlink", refuse)
