"""Omniglot: found where it should be, and read as it is."""

import contextlib
import csv
import functools
import hashlib
import http.server
import io
import os
import shutil
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from omniglot_archives import (
    BACKGROUND,
    EVALUATION,
    SMALL,
    assert_same,
    picture,
    small_members,
    write_small,
    write_zip,
)
from PIL import Image

from fomaml_jax.datasets import _omniglot, omniglot

pytestmark = pytest.mark.usefixtures("cache")


# The true data, where there is any.


@pytest.fixture(scope="module")
def data():
    folder = Path(os.environ.get("FOMAML_JAX_DATA", "/nowhere")) / "omniglot"
    if not (folder / f"{BACKGROUND}.zip").exists():
        pytest.skip("FOMAML_JAX_DATA has no omniglot/images_background.zip")
    return folder


@pytest.fixture(scope="module")
def vinyals(data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOMAML_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        return omniglot(data)


def test_vinyals_split_is_the_published_one(data, vinyals):
    with open(data / "vinyals_split.csv") as file:
        published = {f"{row['alphabet']}/{row['character']}": row for row in csv.DictReader(file)}
    assert [len(classes.names) for classes in vinyals] == [1028, 172, 423]
    for split, classes in vinyals._asdict().items():
        assert {published.pop(name)["split"] for name in classes.names} == {split}
    assert not published


def test_drawings_are_ink_on_paper(vinyals):
    for classes in vinyals:
        assert classes.images.shape == (len(classes.names), 20, 28, 28, 1)
        assert classes.images.dtype == np.uint8
        np.testing.assert_array_equal(classes.counts, np.int32([20] * len(classes.names)))
        assert (classes.images.max(axis=(2, 3, 4)) > 128).all()
        assert 0.05 < classes.images.mean() / 255 < 0.15


def test_drawings_stay_with_their_character_and_drawer(data, vinyals):
    """The one duplicate of the original is Braille's first character by drawers 3 and 19."""
    braille = vinyals.train.images[vinyals.train.names.index("Braille/character01")]
    np.testing.assert_array_equal(braille[2], braille[18])
    latin = vinyals.train.images[vinyals.train.names.index("Latin/character26"), 4, ..., 0]
    with zipfile.ZipFile(data / f"{BACKGROUND}.zip") as archive:
        [name] = [n for n in archive.namelist() if "/Latin/character26/" in n and "_05.png" in n]
        original = Image.open(io.BytesIO(archive.read(name))).convert("L")
    np.testing.assert_array_equal(latin, 255 - np.asarray(original.resize((28, 28), 1)))


@pytest.mark.slow
def test_background_split_is_that_of_the_archives(data):
    splits = omniglot(data, split="background", size=7, resample="nearest")
    assert [len(classes.names) for classes in splits] == [792, 172, 659]
    alphabets = [{name.split("/")[0] for name in classes.names} for classes in splits]
    assert list(map(len, alphabets)) == [25, 5, 20]
    assert len(set.union(*alphabets)) == 50


def test_true_archive_without_one_drawing_is_refused(data, tmp_path):
    copy_without("Korean/character07", data / f"{BACKGROUND}.zip", tmp_path / f"{BACKGROUND}.zip")
    (tmp_path / f"{EVALUATION}.zip").symlink_to(data / f"{EVALUATION}.zip")
    with pytest.raises(ValueError, match="19 drawings of Korean/character07, expected 20"):
        omniglot(tmp_path)


def copy_without(lost, source, target):
    """Copies a zip archive but for one member whose name has `lost` in it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        names = old.namelist()
        names.remove(next(name for name in names if lost in name))
        for name in names:
            new.writestr(name, old.read(name))


# A small one of the same form.


def decodes_again(*args):
    raise AssertionError("decoded although it is in the cache")


def test_names_and_order(small):
    splits = omniglot(small)
    latin = tuple(f"Latin/character0{number}" for number in (1, 2, 3))
    assert splits.train.names == (*latin, "Gurmukhi/character01")
    assert splits.validation.names == ("Hebrew/character01",)
    assert splits.test.names == ("Tibetan/character01", "Tibetan/character02")
    background = omniglot(small, split="background")
    assert background.test.names == ("Gurmukhi/character01", *splits.test.names)


def test_unpacked_is_the_same_as_zipped(small, tmp_path):
    for name in SMALL:
        with zipfile.ZipFile(small / f"{name}.zip") as archive:
            archive.extractall(tmp_path / "unpacked")
    assert_same(omniglot(tmp_path / "unpacked"), omniglot(small))


def test_other_files_do_not_count(small):
    members = small_members(BACKGROUND)
    junk = ["__MACOSX/._x.png", f"{BACKGROUND}/.DS_Store", f"{BACKGROUND}/Latin/notes.txt"]
    write_zip(small.parent / "junk", BACKGROUND, members | dict.fromkeys(junk, b"junk"))
    shutil.copy(small / f"{EVALUATION}.zip", small.parent / "junk")
    assert_same(omniglot(small.parent / "junk"), omniglot(small))


def test_nearest_is_what_pillow_does_to_one_bit_images(small):
    image = omniglot(small, resample="nearest").validation.images[0, 0, ..., 0]
    original = Image.open(io.BytesIO(next(iter(small_members(BACKGROUND).values()))))
    published = original.resize((28, 28), resample=Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(image, 255 * (1 - np.asarray(published).astype(np.uint8)))
    assert set(np.unique(image)) == {0, 255}
    smooth = omniglot(small).validation.images
    assert len(np.unique(smooth)) > 100


def test_full_size_is_the_original(small):
    image = omniglot(small, size=105).validation.images[0, 0, ..., 0]
    original = Image.open(io.BytesIO(next(iter(small_members(BACKGROUND).values()))))
    np.testing.assert_array_equal(image == 0, np.asarray(original))


def test_second_start_reads_the_cache(small, monkeypatch):
    cold = omniglot(small)
    monkeypatch.setattr(_omniglot, "_read", decodes_again)
    assert_same(omniglot(small), cold)
    for options in [{"size": 14}, {"split": "background"}, {"resample": "nearest"}]:
        with pytest.raises(AssertionError):
            omniglot(small, **options)


def test_changed_archive_is_decoded_again(small):
    before = omniglot(small)
    members = small_members(BACKGROUND)
    first, second = list(members)[:2]
    members[first] = members[second]
    write_zip(small, BACKGROUND, members)
    after = omniglot(small).validation.images
    np.testing.assert_array_equal(after[0, 0], after[0, 1])
    assert (after[0, 0] != before.validation.images[0, 0]).any()


def test_changed_drawing_in_a_folder_is_decoded_again(small, tmp_path):
    for name in SMALL:
        with zipfile.ZipFile(small / f"{name}.zip") as archive:
            archive.extractall(tmp_path / "unpacked")
    before = omniglot(tmp_path / "unpacked").validation.images
    drawing = tmp_path / "unpacked" / BACKGROUND / "Hebrew" / "character01" / "0001_01.png"
    drawing.write_bytes(picture(np.random.default_rng(99)))
    after = omniglot(tmp_path / "unpacked").validation.images
    assert (after[0, 0] != before[0, 0]).any()


# Where it is looked for.


def test_environment_then_cache(small, cache, monkeypatch):
    expected = omniglot(small)
    monkeypatch.setenv("FOMAML_JAX_DATA", str(small))
    assert_same(omniglot(), expected)
    write_small(small.parent / "data" / "omniglot")
    monkeypatch.setenv("FOMAML_JAX_DATA", str(small.parent / "data"))
    assert_same(omniglot(), expected)
    monkeypatch.setenv("FOMAML_JAX_DATA", str(small.parent / "nothing"))
    write_small(cache / "omniglot")
    assert_same(omniglot(), expected)


@contextlib.contextmanager
def served(folder):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture
def home(small, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    files = {name: (small / f"{name}.zip").read_bytes() for name in SMALL}
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(_omniglot, "_MD5", md5)
    with served(small) as url:
        monkeypatch.setattr(_omniglot, "_HOME", url)
        yield small


def test_download_is_kept(home, cache, monkeypatch):
    downloaded = omniglot()
    assert_same(downloaded, omniglot(home))
    assert sorted(os.listdir(cache / "omniglot")) == [f"{BACKGROUND}.zip", f"{EVALUATION}.zip"]
    monkeypatch.setattr(_omniglot, "_HOME", "http://127.0.0.1:9/")
    assert_same(omniglot(size=14), omniglot(home, size=14))


def test_what_may_not_be_downloaded_is_not(home, cache):
    with pytest.raises(FileNotFoundError, match=r"not be downloaded: pass its path, a folder with"):
        omniglot(download=False)
    assert not (cache / "omniglot").exists()
    downloaded = omniglot()
    assert_same(omniglot(download=False), downloaded)


def test_interrupted_download_goes_on(home, cache):
    (cache / "omniglot").mkdir(parents=True)
    shutil.copy(home / f"{BACKGROUND}.zip", cache / "omniglot")
    assert_same(omniglot(), omniglot(home))


def test_download_with_another_checksum_is_refused(home, cache):
    with open(home / f"{EVALUATION}.zip", "ab") as file:
        file.write(b"more")
    with pytest.raises(
        OSError, match=r"cannot download http.*does not match the known hash"
    ) as info:
        omniglot()
    assert "\n" not in str(info.value)
    assert os.listdir(cache / "omniglot") == [f"{BACKGROUND}.zip"]


def test_no_network_says_what_to_pass(small, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(_omniglot, "_HOME", "http://127.0.0.1:9/")
    with pytest.raises(OSError, match=r"cannot download http.*pass its path, a folder") as info:
        omniglot()
    assert "\n" not in str(info.value)
