"""Glyphs: the classes promised, drawn whole, the same every time, hard but not impossible."""

import sys

import matplotlib
import numpy as np
import pytest

from fomaml_jax.datasets import _glyph_drawing, _glyphs, glyphs


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOMAML_JAX_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOMAML_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        return glyphs()


def scripts(classes):
    return {name.split()[0] for name in classes.names}


def all_images(splits):
    return np.concatenate([classes.images for classes in splits])


def draws_again(*args):
    raise AssertionError("drawn although it is in the cache")


def test_counts(splits):
    assert [classes.images.shape for classes in splits] == [
        (348, 12, 28, 28, 1),
        (39, 12, 28, 28, 1),
        (171, 12, 28, 28, 1),
    ]
    for classes in splits:
        assert classes.images.dtype == np.uint8
        np.testing.assert_array_equal(classes.counts, np.int32([12] * len(classes.names)))


def test_scripts_are_the_split_and_no_class_is_in_two(splits):
    assert scripts(splits.train) == scripts(splits.validation) == {"LATIN", "CYRILLIC"}
    assert scripts(splits.test) == {"GREEK", "ARMENIAN", "GEORGIAN"}
    names = [name for classes in splits for name in classes.names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("first", "same"),
    [
        ("LATIN CAPITAL LETTER A", "GREEK CAPITAL LETTER ALPHA"),
        ("LATIN SMALL LETTER O", "CYRILLIC SMALL LETTER O"),
        ("LATIN CAPITAL LETTER Q", "CYRILLIC CAPITAL LETTER QA"),  # they differ in spacing only
        ("GREEK SMALL LETTER DELTA", "LATIN SMALL LETTER DELTA"),
    ],
)
def test_letters_of_one_shape_are_one_class(splits, first, same):
    names = {name for classes in splits for name in classes.names}
    assert first in names
    assert same not in names


def test_every_example_is_whole_and_antialiased(splits):
    images = all_images(splits)[..., 0]
    border = np.ones([28, 28], bool)
    border[1:-1, 1:-1] = False
    assert not images[:, :, border].any()
    assert images.max(axis=(2, 3)).min() > 128
    greys = (images > 32) & (images < 224)
    assert greys.any(axis=(2, 3)).all()


def test_examples_of_a_letter_differ_in_size_and_place(splits):
    letter = splits.train.images[splits.train.names.index("LATIN CAPITAL LETTER H"), ..., 0]
    rows = [np.flatnonzero(image.max(axis=1) > 64) for image in letter]
    heights = [row[-1] - row[0] for row in rows]
    middles = [(row[-1] + row[0]) / 2 for row in rows]
    assert max(heights) >= 1.25 * min(heights)
    assert 1 <= max(middles) - min(middles) <= 5


def test_poses_keep_the_widest_drawing_on_the_canvas():
    extents = np.array([[10.0, 10.0], [300.0, 20.0], [20.0, 300.0]] * 100)
    matrices, centres = _glyph_drawing._poses(extents, 112, np.random.default_rng(0))
    corners = extents[:, None, :] / 2 * np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    drawn = centres[:, None] + np.einsum("nij,ncj->nci", matrices, corners)
    assert drawn.min() >= 4 - 1e-9
    assert drawn.max() <= 108 + 1e-9


def test_same_seed_same_bytes_and_the_cache_holds_them(splits, monkeypatch):
    np.testing.assert_array_equal(all_images(glyphs(seed=0)), all_images(splits))
    monkeypatch.setattr(_glyphs, "_draw", draws_again)
    cached = glyphs()
    np.testing.assert_array_equal(all_images(cached), all_images(splits))
    assert [classes.names for classes in cached] == [classes.names for classes in splits]


def test_another_seed_draws_otherwise_but_splits_alike(splits):
    other = glyphs(seed=1)
    assert (all_images(other) != all_images(splits)).any(axis=(2, 3, 4)).all()
    assert [classes.names for classes in other] == [classes.names for classes in splits]


def test_another_version_draws_again(monkeypatch):
    glyphs(size=8)
    monkeypatch.setattr(_glyphs, "_draw", draws_again)
    monkeypatch.setattr(matplotlib, "__version__", "0.0")
    with pytest.raises(AssertionError):
        glyphs(size=8)


def nearest_class_mean(images, ways, episodes=1000):
    rng = np.random.default_rng(0)
    flat = images.reshape(*images.shape[:2], -1) / 255
    correct = 0
    for _ in range(episodes):
        classes = rng.choice(len(flat), ways, replace=False)
        support, query = np.array([rng.choice(12, 2, replace=False) for _ in classes]).T
        distances = flat[classes, query][:, None] - flat[classes, support]
        correct += ((distances**2).sum(axis=2).argmin(axis=1) == np.arange(ways)).mean()
    return correct / episodes


def test_pixels_alone_do_not_solve_it(splits):
    assert nearest_class_mean(splits.test.images, 5) == pytest.approx(0.39, abs=0.03)
    assert nearest_class_mean(splits.test.images, 20, 300) == pytest.approx(0.20, abs=0.03)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed=-1 must be a whole number of at least 0"),
        ({"seed": "a"}, TypeError, "seed='a' must be a whole number of at least 0"),
        ({"size": 7}, ValueError, "size=7 must be a whole number of at least 8"),
        ({"size": 28.0}, TypeError, "size=28.0 must be a whole number of at least 8"),
        ({"size": True}, TypeError, "size=True must be a whole number of at least 8"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        glyphs(**arguments)


@pytest.mark.parametrize("package", ["matplotlib", "PIL"])
def test_missing_package_says_how_to_get_it(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'needs {package}: pip install "fomaml-jax\[cli\]"'):
        glyphs()
