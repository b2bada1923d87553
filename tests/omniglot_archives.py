"""Archives of Omniglot's form that tests share: a few characters, of noise."""

import io
import zipfile

import numpy as np
from PIL import Image

BACKGROUND, EVALUATION = "images_background", "images_evaluation"
SMALL = {BACKGROUND: {"Hebrew": 1, "Latin": 3}, EVALUATION: {"Gurmukhi": 1, "Tibetan": 2}}


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


def assert_same(one, other):
    """Two splits hold the same pictures."""
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.images, b.images, strict=True)
        np.testing.assert_array_equal(a.counts, b.counts, strict=True)
        assert a.names == b.names
