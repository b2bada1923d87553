"""Omniglot is refused where it is not whole, and so are options and folders it does not have."""

import struct
import sys
import zipfile
import zlib

import numpy as np
import pytest
from command_line import call, everything
from omniglot_archives import (
    BACKGROUND,
    EVALUATION,
    picture,
    small_members,
    write_zip,
)

from fomaml_jax.datasets import _omniglot_drawings, omniglot

pytestmark = pytest.mark.usefixtures("cache")


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
