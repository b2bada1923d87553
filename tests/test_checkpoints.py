"""Checkpoints: whole or not there, and never silently wrong."""

import contextlib
import json
import os
import re
import shutil
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fomaml_jax import checkpoints
from fomaml_jax.checkpoints import Checkpoint, CheckpointError


class State(NamedTuple):
    params: dict
    key: jax.Array
    nothing: None
    step: jax.Array


def state(step=3, width=4):
    rng = np.random.default_rng(step)
    params = {
        "w": jnp.asarray(rng.normal(size=(3, width)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        "a/b 'c'": {"empty": jnp.zeros((0, 2)), "flags": jnp.array([True, False])},
    }
    return State(params, jax.random.key(step), None, jnp.asarray(step, jnp.int32))


def save(folder, step, **changes):
    return checkpoints.save(folder, Checkpoint(step, state(step), {"step": step} | changes))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def test_everything_comes_back(tmp_path):
    notes = {"best": 0.1 + 0.2, "none": None, "nan": float("nan"), "list": [1, "two"]}
    save(tmp_path, 3, **notes)
    found, damaged = checkpoints.newest(tmp_path, state(7))
    assert found is not None
    assert (found.step, damaged) == (3, [])
    assert_same(found.tree, state(3))
    assert found.notes["best"] == 0.1 + 0.2
    assert np.isnan(found.notes.pop("nan"))
    assert found.notes == {"step": 3, "best": 0.1 + 0.2, "none": None, "list": [1, "two"]}


def test_the_two_newest_are_kept_and_the_newest_is_read(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000000010", "0000000100"]
    found, _ = checkpoints.newest(tmp_path, state())
    assert found is not None
    assert found.step == 100


def test_nothing_is_nothing(tmp_path):
    assert checkpoints.newest(tmp_path / "none", state()) == (None, [])
    assert checkpoints.newest(tmp_path, state()) == (None, [])


@pytest.mark.parametrize("moment", ["digest", "rename"])
def test_a_save_that_dies_leaves_what_was_there(tmp_path, monkeypatch, moment):
    save(tmp_path, 1)

    def die(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if moment == "digest":
            patch.setattr(checkpoints, "_digest", die)
        else:
            patch.setattr(type(tmp_path), "rename", die)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["0000000001"]


def test_what_a_killed_process_left_is_not_read_and_goes_away(tmp_path):
    shutil.copytree(save(tmp_path, 1), tmp_path / ".0000000002")
    found, damaged = checkpoints.newest(tmp_path, state())
    assert found is not None
    assert (found.step, damaged) == (1, [])
    save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000000001", "0000000003"]


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def truncate(path, other):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path, other):
    path.write_bytes(bytes(path.stat().st_size))


def swap(path, other):
    path.write_bytes(other.read_bytes())


def flip(path, other):
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def remove(path, other):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, zero, swap, flip, remove])
def test_damage_to_any_file_falls_back_and_says_so(tmp_path, damage):
    older, newer = save(tmp_path / "saved", 1), save(tmp_path / "saved", 2)
    names = files_of(newer)
    assert len(names) > 3
    harmless = 0
    for name in names:
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "saved", folder)
        path = folder / newer.name / name
        other = older / name
        before = path.read_bytes()
        damage(path, other if other.exists() else newer / names[0])
        if path.exists() and path.read_bytes() == before:  # the file was empty, or both are alike
            harmless += 1
        else:
            found, (line,) = checkpoints.newest(folder, state())
            assert found is not None
            assert found.step == 1
            assert_same(found.tree, state(1))
            assert line.startswith(f"the checkpoint {folder / newer.name} is damaged")
            assert str(name) in line
        shutil.rmtree(folder)
    assert harmless < len(names) - 2


def test_where_all_are_damaged_nothing_is_read(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be read: .*2 is .*1 is damaged"):
        checkpoints.newest(tmp_path, state())


def test_a_number_changed_in_the_manifest_is_seen(tmp_path):
    save(tmp_path, 1, best=0.75)
    path = save(tmp_path, 2, best=0.91) / "manifest.json"
    path.write_text(path.read_text().replace("0.91", "0.31"))
    found, (line,) = checkpoints.newest(tmp_path, state())
    assert found is not None
    assert (found.step, found.notes["best"]) == (1, 0.75)
    assert "manifest.json is not what was written" in line


def test_damaged_checkpoints_of_later_steps_make_way(tmp_path):
    save(tmp_path, 10)
    (save(tmp_path, 20) / "manifest.json").write_text("{")
    for step in (12, 14):
        save(tmp_path, step)
    assert [int(path.name) for path in sorted(tmp_path.iterdir())] == [12, 14]


def test_what_orbax_cannot_write_is_an_os_error(tmp_path, monkeypatch):
    class Full:
        def save(self, *args):
            raise ValueError("OUT_OF_RANGE: Error writing\nand more")

    monkeypatch.setattr(checkpoints, "_checkpointer", lambda: contextlib.nullcontext(Full()))
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*: OUT_OF_RANGE: .*writing$"):
        save(tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "manifest.json").write_text("{")
    save(tmp_path, 2)
    found, damaged = checkpoints.newest(tmp_path, state())
    assert found is not None
    assert (found.step, damaged) == (2, [])


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (state(width=5), ".params['w'] should be float32[3, 5], found float32[3, 4]"),
        (
            state()._replace(step=jnp.zeros((), jnp.float32)),
            ".step should be float32[], found int32[]",
        ),
        (state()._replace(nothing=jnp.zeros(2)), ".nothing should be float32[2], found nothing"),
        (state()._replace(step=None), ".step should be nothing, found int32[]"),
    ],
)
def test_another_problem_is_refused_by_name(tmp_path, like, message):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=re.escape(f"is of another problem: {message}")):
        checkpoints.newest(tmp_path, like)


def test_another_format_is_refused(tmp_path):
    path = save(tmp_path, 1) / "manifest.json"
    manifest = json.loads(path.read_text()) | {"format": 99}
    del manifest["digest"]
    path.write_text(json.dumps(manifest | {"digest": checkpoints._digest_of(manifest)}))
    with pytest.raises(CheckpointError, match="written by another version"):
        checkpoints.newest(tmp_path, state())


def test_it_can_be_read_without_warnings(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path, 1)
        checkpoints.newest(tmp_path, state())
    assert os.listdir(tmp_path) == ["0000000001"]
