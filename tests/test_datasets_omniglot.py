"""Omniglot: found where it should be, read as it is, and refused where it is not whole."""

import contextlib
import csv
import functools
import hashlib
import http.server
import io
import os
import shutil
import struct
import sys
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from command_line import call, everything
from PIL import Image

from fomaml_jax.datasets import _omniglot, _omniglot_drawings, omniglot

BACKGROUND, EVALUATION = "images_background", "images_evaluation"
SMALL = {BACKGROUND: {"Hebrew": 1, "Latin": 3}, EVALUATION: {"Gurmukhi": 1, "Tibetan": 2}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOMAML_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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


def picture(rng, side=105, mode="1"):
    pixels = Image.fromarray(rng.integers(0, 256, [side, side], dtype=np.uint8))
    with io.BytesIO() as file:
        pixels.convert(mode).save(file, "PNG")
        return file.getvalue()


def small_members(folder):
    rng = np.random.default_rng(len(folder))
    return {
        f"{folder}/{alphabet}/character{character:02d}/{character:04d}_{drawer:02d}.png": picture(
            rng
        )
        for alphabet, count in SMALL[folder].items()
        for character in range(1, count + 1)
        for drawer in range(1, 21)
    }


def write_zip(folder, name, members):
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)


def write_small(folder):
    for name in SMALL:
        write_zip(folder, name, small_members(name))
    return folder


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(_omniglot, "_ALPHABETS", SMALL)
    monkeypatch.delenv("FOMAML_JAX_DATA", raising=False)
    return write_small(tmp_path / "small")


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.counts, b.counts)
        assert a.names == b.names


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
    with pytest.raises(FileNotFoundError, match=r"may not be downloaded: pass path=a folder with"):
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
    with pytest.raises(OSError, match=r"cannot download http.*pass path=a folder with") as info:
        omniglot()
    assert "\n" not in str(info.value)


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"split": "lake"}, ValueError, "split='lake' must be one of 'vinyals', 'background'"),
        ({"resample": 1}, ValueError, "resample=1 must be one of 'smooth', 'nearest'"),
        ({"size": 0}, ValueError, "size=0 must be a whole number of at least 1"),
        ({"size": 2.5}, TypeError, "size=2.5 must be a whole number of at least 1"),
    ],
)
def test_refused_options(arguments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        omniglot("/nowhere", **arguments)


def test_missing_pillow_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'needs PIL: pip install "fomaml-jax\[cli\]"'):
        omniglot()


def rewrite(folder, change):
    members = small_members(BACKGROUND)
    change(members)
    write_zip(folder, BACKGROUND, members)


def lose(part):
    return lambda folder: rewrite(
        folder, lambda members: [members.pop(name) for name in list(members) if part in name]
    )


def replace_first(content):
    return lambda folder: rewrite(
        folder, lambda members: members.update({next(iter(members)): content})
    )


def add(name):
    return lambda folder: rewrite(folder, lambda members: members.update({name: b""}))


def truncate(folder):
    archive = folder / f"{BACKGROUND}.zip"
    archive.write_bytes(archive.read_bytes()[:5000])


def flip_a_bit(folder):
    archive = folder / f"{BACKGROUND}.zip"
    content = bytearray(archive.read_bytes())
    content[300] ^= 1
    archive.write_bytes(content)


def remove(folder):
    (folder / f"{EVALUATION}.zip").unlink()


def remove_both(folder):
    (folder / f"{BACKGROUND}.zip").unlink()
    remove(folder)


def make_a_bomb(folder):
    """A drawing with a great many bytes behind it, which the archive packs into few."""
    replace_first(picture(RNG) + bytes(3 * 2**20))(folder)


def declare_a_bomb(folder):
    """A drawing of a few bytes that says it has 3,600,000,000 pixels."""
    content = bytearray(picture(RNG))
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    replace_first(bytes(content))(folder)


def link(folder):
    """A symbolic link as a member."""
    with zipfile.ZipFile(folder / f"{BACKGROUND}.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / f"{BACKGROUND}.zip", "w") as archive:
        for i, (name, content) in enumerate(members.items()):
            info = zipfile.ZipInfo(name)
            info.external_attr = (0o120777 if i == 0 else 0o100644) << 16
            archive.writestr(info, b"/etc/passwd" if i == 0 else content)


def multiply(folder):
    rewrite(folder, lambda members: members.update({f"{BACKGROUND}/{i}": b"" for i in range(50)}))


RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (remove_both, FileNotFoundError, "small holds no Omniglot, expected a folder with"),
        (remove, FileNotFoundError, "holds images_background.zip, but neither images_evaluation"),
        (truncate, ValueError, r"images_background.zip \(5000 bytes\) is no complete zip archive"),
        (
            flip_a_bit,
            ValueError,
            r"0001_01.png in .* cannot be read \(BadZipFile\), expected a PNG",
        ),
        (replace_first(b"text"), ValueError, r"cannot be read \(UnidentifiedImageError\)"),
        (replace_first(picture(RNG)[:200]), ValueError, r"0001_01.png in .* cannot be read"),
        (replace_first(picture(RNG, 28)), ValueError, "28 x 28 pixels in mode '1', expected 105"),
        (replace_first(picture(RNG, 105, "L")), ValueError, "in mode 'L', expected 105 x 105 in"),
        (make_a_bomb, ValueError, "0001_01.png in .* has more than 1048576 bytes, expected some"),
        (declare_a_bomb, ValueError, r"cannot be read \(DecompressionBombError\), expected a PNG"),
        (link, ValueError, r"0001_01.png in .* cannot be read \(UnidentifiedImageError\)"),
        (multiply, ValueError, "130 members, expected Omniglot's images_background.zip, which has"),
        (add("../evil.png"), ValueError, "has the member '../evil.png', which leads out of it"),
        (add("a/../../evil.png"), ValueError, "member 'a/../../evil.png', which leads out of it"),
        (add("/etc/evil.png"), ValueError, "has the member '/etc/evil.png', which leads out of it"),
        (lose("Latin/character02/0002_05"), ValueError, "19 drawings of Latin/character02, .* 20"),
        (lose("Latin/character02"), ValueError, "3 characters, expected 4: Latin/character02 is"),
        (
            add(f"{BACKGROUND}/Klingon/character01/0001_01.png"),
            ValueError,
            "5 characters, expected 4: Klingon/character01 is not Omniglot's",
        ),
        (
            add(f"{BACKGROUND}/Latin/character01/0009_20.png"),
            ValueError,
            "21 drawings of Latin/character01, expected 20",
        ),
    ],
)
def test_refused_contents(small, cache, damage, error, message, monkeypatch):
    monkeypatch.setattr(_omniglot_drawings, "_MOST", 120)
    damage(small)
    with pytest.raises(error, match=message) as info:
        omniglot(small)
    assert "\n" not in str(info.value)
    assert not cache.exists()


def test_refused_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist, expected a folder with"):
        omniglot(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is not a folder, expected a folder with"):
        omniglot(tmp_path / "file")


FIRST = f"{BACKGROUND}/Hebrew/character01/0001_01.png in SMALL/{BACKGROUND}.zip"
NEW_COPY = "expected a PNG of 105 x 105 one-bit pixels: get a new copy"
EXACT = {
    "a member of too many bytes": (
        make_a_bomb,
        f"{FIRST} has more than 1048576 bytes, expected some hundred: get a new copy",
    ),
    "a picture of too many pixels": (
        declare_a_bomb,
        f"{FIRST} cannot be read (DecompressionBombError), {NEW_COPY}",
    ),
    "a symbolic link": (link, f"{FIRST} cannot be read (UnidentifiedImageError), {NEW_COPY}"),
    "too many members": (
        multiply,
        f"SMALL/{BACKGROUND}.zip has 130 members, expected Omniglot's {BACKGROUND}.zip, which has "
        "fewer than 120: get a new copy",
    ),
    "a member above": (
        add("../evil.png"),
        f"SMALL/{BACKGROUND}.zip has the member '../evil.png', which leads out of it: get a new "
        "copy",
    ),
    "a member elsewhere": (
        add("/etc/evil.png"),
        f"SMALL/{BACKGROUND}.zip has the member '/etc/evil.png', which leads out of it: get a new "
        "copy",
    ),
    "pictures of mixed sizes": (
        replace_first(picture(RNG, 28)),
        f"{FIRST} is a picture of 28 x 28 pixels in mode '1', expected 105 x 105 in mode '1'",
    ),
    "half an archive": (
        truncate,
        f"SMALL/{BACKGROUND}.zip (5000 bytes) is no complete zip archive (File is not a zip "
        f"file), expected Omniglot's {BACKGROUND}.zip: delete this copy and get it again",
    ),
    "a character too few": (
        lose("Latin/character02"),
        f"SMALL/{BACKGROUND}.zip holds 3 characters, expected 4: Latin/character02 is missing",
    ),
}


@pytest.mark.parametrize(("damage", "message"), EXACT.values(), ids=EXACT)
def test_the_command_line_refuses_an_archive_in_a_line(small, monkeypatch, damage, message):
    monkeypatch.setattr(_omniglot_drawings, "_MOST", 120)
    damage(small)
    before = everything(small)
    run = call("train", "omniglot", "--path", small, "--out", small / "run")
    expected = f"fomaml-jax: {message.replace('SMALL', str(small))}\n"
    assert (run.code, run.out, run.err) == (2, "", expected)
    assert everything(small) == before
