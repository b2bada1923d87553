"""Omniglot: 1,623 handwritten characters of fifty alphabets, found or downloaded, and checked."""

import itertools
import os
from pathlib import Path
from typing import Literal

import numpy as np

from fomaml_jax.datasets._checks import check_choice, check_folder, cli_extra, whole_number
from fomaml_jax.datasets._omniglot_alphabets import (
    BACKGROUND,
    EVALUATION,
    background_split,
    character_names,
    vinyals_split,
)
from fomaml_jax.datasets._store import cache_folder, cached, fingerprint
from fomaml_jax.datasets._types import Splits, select

_HOME = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
_ALPHABETS = {"images_background": BACKGROUND, "images_evaluation": EVALUATION}
_MD5 = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
_SPLITS = {"vinyals": vinyals_split, "background": background_split}
_EXPECTED = (
    "a folder with Omniglot's images_background.zip and images_evaluation.zip, or both unpacked"
)


def omniglot(
    path: str | os.PathLike[str] | None = None,
    *,
    split: Literal["vinyals", "background"] = "vinyals",
    size: int = 28,
    resample: Literal["smooth", "nearest"] = "smooth",
    download: bool = True,
) -> Splits:
    """Handwritten characters of fifty alphabets, each drawn once by twenty people.

    The two archives, zipped or unpacked, are looked for in `path` where it is given, and nowhere
    else. Otherwise they are looked for in `$FOMAML_JAX_DATA`, in `omniglot` there, and in
    `omniglot` in the cache folder (`$FOMAML_JAX_CACHE`, else `fomaml_jax` in the user's cache
    folder), and at last downloaded from their home into the latter (14 MB, checked against their
    MD5). Whatever is read is checked: 964 and 659 characters, twenty drawings each, 105 x 105
    one-bit pixels. The first call decodes for some seconds, later ones read a cache.

    The split "vinyals" has 1,028, 172 and 423 classes, as in Vinyals et al. 2016 before rotations.
    The split "background" is that of the data's authors, without the five alphabets to validate
    on (Armenian, Bengali, Early Aramaic, Hebrew, Mkhedruli: those of the other split): 792, 172
    and 659 classes. Both keep alphabets whole, except that "vinyals" cuts Gurmukhi in two.

    Args:
        path: the folder with `images_background.zip` and `images_evaluation.zip`, or with the
            folders `images_background` and `images_evaluation`.
        split: "vinyals" or "background".
        size: height and width to resize to, from 105.
        resample: "smooth" goes to grey, then to `size` with Pillow's LANCZOS. "nearest" picks the
            nearest pixel and stays one-bit, as did the published MAML script, whose LANCZOS Pillow
            ignored because the images were one-bit.
        download: whether it may be downloaded where it is not found.

    Returns:
        Images `[classes, 20, size, size, 1]` uint8, ink 255 on 0. Classes are named as in
        "Latin/character01", and ordered by set, alphabet and number.

    Raises:
        ImportError: Pillow or pooch is missing.
        FileNotFoundError: `path` does not exist, or an archive is missing there; nothing is found
            and `download` is off.
        NotADirectoryError: `path` is a file.
        OSError: the download failed.
        TypeError: `size` is no whole number.
        ValueError: an unknown option, or an archive that is damaged or not as expected.

    Example:
        >>> train, validation, test = omniglot()  # doctest: +SKIP
        >>> train.images.shape, train.names[0]  # doctest: +SKIP
        ((1028, 20, 28, 28, 1), 'Alphabet_of_the_Magi/character01')

    References:
        Lake, Salakhutdinov, Tenenbaum 2015, https://doi.org/10.1126/science.aab3050 (MIT licence)
        Vinyals et al. 2016, https://arxiv.org/abs/1606.04080
    """
    check_choice("split", split, _SPLITS)
    check_choice("resample", resample, ("smooth", "nearest"))
    size = whole_number("size", size, at_least=1)
    with cli_extra("omniglot()"):
        from PIL import __version__ as pillow_version
    sources = _found(path, download)
    options = {"split": split, "size": size, "resample": resample}
    files = [fingerprint(_files(source)) for source in sources]
    key = {**options, "pillow": pillow_version, "files": files}
    return cached("omniglot", key, lambda: _read(sources, split, size, resample))


def _read(sources: list[Path], split: str, size: int, resample: str) -> Splits:
    from fomaml_jax.datasets._omniglot_drawings import read_drawings

    names = [character_names(alphabets) for alphabets in _ALPHABETS.values()]
    images = np.concatenate(
        [read_drawings(*pair, size, resample) for pair in zip(sources, names, strict=True)]
    )
    all_names = list(itertools.chain(*names))
    belongs = np.array([_SPLITS[split](name) for name in all_names])
    parts = (np.flatnonzero(belongs == part) for part in Splits._fields)
    return Splits(*(select(images, all_names, part) for part in parts))


def _found(path: str | os.PathLike[str] | None, download: bool) -> list[Path]:
    """Where the background and the evaluation set are."""
    if path is not None:
        return _given(Path(path).expanduser())
    data = os.environ.get("FOMAML_JAX_DATA")
    places = [Path(data).expanduser() / part for part in (".", "omniglot")] if data else []
    for folder in places:
        if sources := _look_in(folder):
            return sources
    return _downloaded(download)


def _given(folder: Path) -> list[Path]:
    check_folder(folder, _EXPECTED)
    sources = _look_in(folder)
    if not sources:
        raise FileNotFoundError(f"{folder} holds no Omniglot, expected {_EXPECTED}")
    return sources


def _look_in(folder: Path) -> list[Path]:
    """Both sets in `folder`, or none; one without the other is a mistake to speak about."""
    found = {name: _zipped_or_unpacked(folder, name) for name in _ALPHABETS}
    sources = [source for source in found.values() if source]
    if len(sources) == 1:
        missing = next(name for name, source in found.items() if not source)
        raise FileNotFoundError(
            f"{folder} holds {sources[0].name}, but neither {missing}.zip nor the folder {missing}:"
            " Omniglot needs both sets"
        )
    return sources


def _zipped_or_unpacked(folder: Path, name: str) -> Path | None:
    archive, unpacked = folder / f"{name}.zip", folder / name
    if archive.is_file():
        return archive
    return unpacked if unpacked.is_dir() else None


def _downloaded(download: bool) -> list[Path]:
    """Both sets in the cache folder, where each stays once it is downloaded."""
    folder = cache_folder() / "omniglot"
    if not download and not all(_zipped_or_unpacked(folder, name) for name in _ALPHABETS):
        raise FileNotFoundError(
            f"Omniglot is neither in $FOMAML_JAX_DATA nor in {folder}, and may not be downloaded: "
            f"pass its path, {_EXPECTED}"
        )
    return [_zipped_or_unpacked(folder, name) or _download(folder, name) for name in _ALPHABETS]


def _download(folder: Path, name: str) -> Path:
    with cli_extra("downloading Omniglot"):
        import pooch

    url = f"{_HOME}{name}.zip"
    try:
        # Into a temporary file, checked, then moved.
        file = pooch.retrieve(url, f"md5:{_MD5[name]}", fname=f"{name}.zip", path=folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise OSError(f"cannot download {url} ({reason}): pass its path, {_EXPECTED}") from error
    return Path(file)


def _files(source: Path) -> list[Path]:
    """What the content of `source` depends on."""
    source = source.resolve()
    return sorted(source.glob("*/*/*.png")) if source.is_dir() else [source]
