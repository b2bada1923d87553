"""The cache is an optimisation: whatever happens to it, the arrays are the same."""

import logging
from pathlib import Path

import numpy as np
import pytest
from omniglot_archives import assert_same

from fomaml_jax.datasets import ImageClasses, Splits, _store

pytestmark = pytest.mark.usefixtures("cache")


def build(seed=0):
    rng = np.random.default_rng(seed)

    def classes(name, count):
        images = rng.integers(0, 256, [count, 3, 16, 16, 1], dtype=np.uint8)
        counts = np.arange(count, dtype=np.int32)
        return ImageClasses(images, counts, tuple(f"{name}/{c} é" for c in range(count)))

    return Splits(classes("train", 4), classes("validation", 0), classes("test", 2))


def must_not_build():
    raise AssertionError("built although it is in the cache")


def only_file(folder):
    [file] = folder.iterdir()
    return file


def test_second_start_reads_what_the_first_built():
    built = _store.cached("some", {"seed": 0}, build)
    assert_same(built, build())
    assert_same(_store.cached("some", {"seed": 0}, must_not_build), built)


@pytest.mark.parametrize(("name", "key"), [("some", {"seed": 1}), ("other", {"seed": 0})])
def test_another_name_or_key_is_built_anew(name, key):
    _store.cached("some", {"seed": 0}, build)
    assert_same(_store.cached(name, key, lambda: build(1)), build(1))


def test_another_format_is_built_anew(monkeypatch):
    _store.cached("some", {}, build)
    monkeypatch.setattr(_store, "_FORMAT", _store._FORMAT + 1)
    assert_same(_store.cached("some", {}, lambda: build(1)), build(1))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def empty(file):
    file.write_bytes(b"")


def overwrite_with_text(file):
    file.write_text("not what you think")


def flip_a_bit_in_the_middle(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


def leave_an_array_out(file):
    with np.load(file) as arrays:
        kept = {name: arrays[name] for name in arrays if name != "test_counts"}
    np.savez(file, allow_pickle=True, **kept)


def pickle_an_array(file):
    np.savez(file, allow_pickle=True, train_images=np.array([object()]))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        empty,
        overwrite_with_text,
        flip_a_bit_in_the_middle,
        leave_an_array_out,
        pickle_an_array,
    ],
)
def test_damaged_cache_is_built_again_and_repaired(damage, cache):
    built = _store.cached("some", {}, build)
    damage(only_file(cache))
    assert_same(_store.cached("some", {}, build), built)
    assert_same(_store.cached("some", {}, must_not_build), built)


def test_cache_folder_that_cannot_be_made_costs_only_time(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FOMAML_JAX_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.INFO):
        assert_same(_store.cached("some", {}, build), build())
    assert "going on without the cache" in caplog.text


def test_failing_write_leaves_nothing_behind(cache, monkeypatch):
    def fill_the_disk(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fill_the_disk)
    assert_same(_store.cached("some", {}, build), build())
    assert list(cache.iterdir()) == []


def test_failing_build_leaves_nothing_behind(cache):
    with pytest.raises(AssertionError):
        _store.cached("some", {}, must_not_build)
    assert not cache.exists()


def test_cache_folder_is_the_users(monkeypatch):
    monkeypatch.delenv("FOMAML_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert _store.cache_folder() == Path("/somewhere/fomaml_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ada")
    assert _store.cache_folder() == Path("/home/ada/.cache/fomaml_jax")


def test_fingerprint_changes_with_size_and_time(tmp_path):
    file = tmp_path / "file"
    file.write_text("one")
    before = _store.fingerprint([file])
    file.write_text("three")
    longer = _store.fingerprint([file])
    file.touch()
    assert before != longer != _store.fingerprint([file])
