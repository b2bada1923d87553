"""The embedded data set: letters of five scripts in twelve type faces, drawn on the spot."""

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fomaml_jax.datasets._checks import cli_extra, whole_number
from fomaml_jax.datasets._store import cached
from fomaml_jax.datasets._types import Splits, select

if TYPE_CHECKING:
    from PIL.Image import Image

_FACES = tuple(
    f"DejaVu{family}{style}.ttf"
    for family, oblique in [("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic")]
    for style in ["", "-Bold", f"-{oblique}", f"-Bold{oblique}"]
)
_LETTER_OR_DIGIT = ("Lu", "Ll", "Lt", "Lm", "Lo", "Nd")  # Unicode categories
_TRAIN_SCRIPTS = ("LATIN", "CYRILLIC")
_TEST_SCRIPTS = ("GREEK", "ARMENIAN", "GEORGIAN")
_VALIDATION_SEED = 0  # not the caller's: the classes must be the same whatever the drawing


def glyphs(*, seed: int = 0, size: int = 28) -> Splits:
    """Printed letters of five scripts: train on two, test on three never seen.

    One class is one letter, and one example is that letter in one of the twelve DejaVu text faces
    (Sans, Sans Mono, Serif; upright, bold, oblique, bold oblique) that come with matplotlib. Each
    example is drawn at its own size, tilt, slant and offset, as in a snapshot of print. The letters
    are those of all twelve faces that have no Unicode decomposition; of letters with the same shape
    in all faces the first in Unicode order stays, so Latin A does and Greek Alpha does not. Letters
    that differ in some faces stay, too: in the others a test letter may be drawn as a letter to
    train on is, as capital Gamma and the Cyrillic Ghe are.

    The script is the split. `train` and `validation` are Latin and Cyrillic, 387 classes of which a
    fixed tenth is for validation; `test` is Greek, Armenian and Georgian, 171 classes. Digits and
    modifier letters, the 34 classes of no script, are left out. The `seed` changes how the letters
    are drawn, never which letter is in which split.

    Needs no network. The first call draws for about two seconds, later ones read a cache.

    Args:
        seed: of the sizes, tilts, slants and offsets. The same seed gives the same bytes, as long
            as matplotlib, Pillow and FreeType stay the same.
        size: height and width of the images, at least 8.

    Returns:
        Images `[classes, 12, size, size, 1]` uint8, ink 255 on 0, antialiased. A class is named by
        its Unicode name.

    Raises:
        ImportError: matplotlib or Pillow is missing.
        TypeError: `seed` or `size` is no whole number.
        ValueError: `seed` or `size` is too small.

    Example:
        >>> train, validation, test = glyphs()
        >>> test.images.shape, test.images.dtype, test.names[0]
        ((171, 12, 28, 28, 1), dtype('uint8'), 'GREEK CAPITAL LETTER GAMMA')

    References:
        DejaVu fonts, https://dejavu-fonts.github.io (free licence, as Bitstream Vera)
    """
    seed = whole_number("seed", seed, at_least=0)
    size = whole_number("size", size, at_least=8)
    with cli_extra("glyphs()"):
        import matplotlib
        from PIL import __version__ as pillow_version
        from PIL import features
    versions = [matplotlib.__version__, pillow_version, features.version("freetype2")]
    key = {"seed": seed, "size": size, "versions": [*versions, np.__version__]}
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return cached("glyphs", key, lambda: _draw(fonts, seed, size))


def _draw(fonts: Path, seed: int, size: int) -> Splits:
    from fomaml_jax.datasets._glyph_drawing import master_drawings, snapshots

    files = [str(fonts / face) for face in _FACES]
    characters = _common_characters(files)
    faces = [master_drawings(file, characters) for file in files]
    masters = dict(zip(characters, zip(*faces, strict=True), strict=True))
    kept = [character for character in _different_shapes(masters) if _script(character)]
    flat = snapshots([m for c in kept for m in masters[c]], size, np.random.default_rng(seed))
    return _split(kept, flat.reshape(len(kept), len(files), size, size, 1))


def _common_characters(files: list[str]) -> list[str]:
    """The letters and digits that every font has, in Unicode order, without composed ones."""
    from matplotlib.ft2font import FT2Font

    codes = set.intersection(*(set(FT2Font(file).get_charmap()) for file in files))
    characters = [chr(code) for code in sorted(codes)]
    return [
        character
        for character in characters
        if unicodedata.category(character) in _LETTER_OR_DIGIT
        and not unicodedata.decomposition(character)
    ]


def _different_shapes(masters: Mapping[str, Sequence["Image"]]) -> list[str]:
    """The characters whose shape, taken over all faces, none before them has."""
    first: dict[tuple, str] = {}
    for character, drawings in masters.items():
        shape = tuple((drawing.size, drawing.tobytes()) for drawing in drawings)
        first.setdefault(shape, character)
    return list(first.values())


def _script(character: str) -> str:
    """The script that the Unicode name begins with, where it is one of the five."""
    word = unicodedata.name(character).split()[0]
    return word if word in _TRAIN_SCRIPTS + _TEST_SCRIPTS else ""


def _split(characters: list[str], images: np.ndarray) -> Splits:
    """Splits `images` `[characters, examples, height, width, 1]` by script."""
    for_test = np.array([_script(character) in _TEST_SCRIPTS for character in characters])
    seen, unseen = np.flatnonzero(~for_test), np.flatnonzero(for_test)
    shuffled = np.random.default_rng(_VALIDATION_SEED).permutation(seen)
    tenth = round(len(seen) / 10)
    parts = np.sort(shuffled[tenth:]), np.sort(shuffled[:tenth]), unseen
    names = [unicodedata.name(character) for character in characters]
    return Splits(*(select(images, names, part) for part in parts))
