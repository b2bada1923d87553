"""A user's pictures, as a network was shown its own."""

import re

import numpy as np
import pytest
from few_shot_runs import draw, draw_folder
from PIL import Image, ImageDraw

from fomaml_jax.datasets import _framing, _image_file, few_pictures, omniglot
from fomaml_jax.datasets._image_file import read_image


def strokes(picture, folder, name="drawing.png", **how):
    """The grey levels that are read of one picture."""
    folder.mkdir(exist_ok=True)
    picture.save(folder / name)
    return few_pictures(folder, **how).images[0, ..., 0].astype(float)


@pytest.fixture
def drawing():
    """As large as Omniglot's."""
    return draw("cross", np.random.default_rng(0), side=105)


def extent(found):
    """Rows and columns from the first to the last with a stroke."""
    on = found > 128
    return [np.ptp(np.flatnonzero(on.any(axis))) + 1 for axis in (1, 0)]


def alike(one, other):
    """Their correlation."""
    return np.corrcoef(one.ravel(), other.ravel())[0, 1]


def on_a_larger_sheet(drawing, left, top, side):
    sheet = Image.new("L", (side, side), "white")
    sheet.paste(drawing, (left, top))
    return sheet


@pytest.mark.parametrize(("left", "top", "side"), [(0, 0, 150), (90, 40, 200), (1500, 2100, 3000)])
def test_place_and_size_on_the_paper_do_not_matter(left, top, side, drawing, tmp_path):
    found = strokes(on_a_larger_sheet(drawing, left, top, side), tmp_path / "other")
    by_itself = strokes(drawing, tmp_path / "same")
    assert max(extent(by_itself)) in (16, 17, 18)  # 0.6 of 28
    assert alike(found, by_itself) > 0.9


def test_a_photograph_is_read_as_exactly_as_its_like_in_another_format(drawing, tmp_path):
    sheet = on_a_larger_sheet(drawing, 1500, 2100, 3000)
    found = [strokes(sheet, tmp_path / end, f"drawing.{end}") for end in ("jpg", "png")]
    assert alike(*found) > 0.98


@pytest.mark.parametrize("width", [1, 3, 6, 12, 24])
def test_pens_of_any_width_come_nearer_to_that_of_the_training_pictures(width, tmp_path):
    ring = Image.new("L", (300, 300), "white")
    ImageDraw.Draw(ring).ellipse((50, 60, 230, 240), outline="black", width=width)
    found = strokes(ring, tmp_path)
    asked, before = _framing.PEN * 28, 0.6 * 28 * width / 180
    after = _framing._pen_of(Image.fromarray(found.astype(np.uint8)))
    assert found.max() > 250
    if width <= 12:
        assert abs(after - asked) < 0.6
    assert abs(after - asked) < max(0.6, abs(before - asked))


def test_a_pen_that_fills_the_picture_is_as_wide_as_it():
    """And not as all its pixels in a row: the filter that thins it would not end."""
    full = np.full((50, 50), 255, np.uint8)
    assert (_framing.redrawn(full, 28) == 255).all()


def test_grain_that_is_gone_from_nearer_by_is_refused(tmp_path):
    grain = 22 + np.random.default_rng(0).normal(0, 60, (400, 1500))
    picture = Image.fromarray(grain.clip(0, 255).astype(np.uint8))
    with pytest.raises(ValueError, match=r"drawing\.png shows no strokes, only grain: expected a"):
        strokes(picture, tmp_path, background="light")


def test_dust_is_no_part_of_a_drawing(drawing, tmp_path):
    dusty = on_a_larger_sheet(drawing, 100, 100, 300)
    dusty.putpixel((2, 297), 0)
    clean = strokes(on_a_larger_sheet(drawing, 100, 100, 300), tmp_path / "clean")
    assert alike(strokes(dusty, tmp_path / "dusty"), clean) > 0.95


@pytest.mark.slow
def test_drawings_are_framed_as_most_of_omniglot_is(omniglot_folder):
    drawings = omniglot(omniglot_folder, size=112).test.images[::8, ::5, ..., 0]
    drawings = drawings.reshape(-1, 112, 112)
    sides = [max(extent(x)) / 112 for x in drawings]
    assert np.median(sides) == pytest.approx(_framing.SHARE, abs=0.05)
    pens = [_framing._pen_of(Image.fromarray(x)) / 112 for x in drawings]
    assert np.median(pens) == pytest.approx(_framing.PEN, abs=0.005)


@pytest.mark.parametrize(("ground", "pen"), [(0, 255), (190, 60), (90, 220)])
def test_paper_and_pen_of_any_shade_come_to_the_same(ground, pen, drawing, tmp_path):
    other = draw("cross", np.random.default_rng(0), side=105, ground=ground, pen=pen)
    found = strokes(other, tmp_path / "other")
    assert np.abs(found - strokes(drawing, tmp_path / "black")).max() <= 2


def test_the_ground_may_be_told(drawing, tmp_path):
    by_itself = strokes(drawing, tmp_path)
    np.testing.assert_array_equal(strokes(drawing, tmp_path, background="light"), by_itself)
    with pytest.raises(ValueError, match=r"shows no strokes on a dark ground: .* from 0 to 255"):
        few_pictures(tmp_path, background="dark")


def test_a_class_has_one_name_however_its_accents_are_stored(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    for folder, stored in (("one", composed), ("other", apart), ("both", composed)):
        draw_folder(tmp_path / folder, ["ring"], 1)
        (tmp_path / folder / "ring").rename(tmp_path / folder / stored)
    assert few_pictures(tmp_path / "one").names == few_pictures(tmp_path / "other").names
    (tmp_path / "other" / apart).rename(tmp_path / "both" / apart)
    with pytest.raises(
        ValueError, match="holds the class caf\u00e9 twice, its accents stored diff"
    ):
        few_pictures(tmp_path / "both")


def test_how_many_were_inverted(tmp_path):
    draw_folder(tmp_path, ["ring"], 2)
    draw_folder(tmp_path / "more", ["dash"], 3, ground=0, pen=255)
    (tmp_path / "more" / "dash").rename(tmp_path / "dash")
    (tmp_path / "more").rmdir()
    found = few_pictures(tmp_path)
    assert (found.inverted, found.names) == (2, ("dash", "ring"))
    np.testing.assert_array_equal(found.labels, [0, 0, 0, 1, 1])
    assert [file.parent.name for file in found.files] == ["dash"] * 3 + ["ring"] * 2


def test_specks_alone_are_read_as_what_they_are(tmp_path):
    """Far apart, they nearly vanish as the picture is made smaller."""
    specks = Image.new("L", (440, 440), "white")
    for place in ((90, 90), (350, 350), (90, 350)):
        specks.putpixel(place, 0)
    found = strokes(specks, tmp_path)
    assert all(17 <= x <= 20 for x in extent(found))  # 0.6 of 28, and the pen
    assert (found > 128).mean() < 0.05


def test_nothing_is_cut_off_a_wide_drawing(tmp_path):
    """Where `image_folder` keeps the middle alone."""
    picture = Image.new("L", (120, 60), 200)
    picture.paste(20, (4, 26, 116, 34))
    found = strokes(picture, tmp_path)
    high, wide = extent(found)
    assert wide in (16, 17, 18)  # 0.6 of 28
    assert high in (1, 2)
    assert max(found[:11].max(), found[-11:].max()) <= 2


def test_a_large_photograph_is_read_as_a_small_one(tmp_path):
    rng = np.random.default_rng(3)
    large = draw("ring", np.random.default_rng(0), side=1400)
    grain = rng.normal(0, 12, (1400, 1400))
    levels = np.clip(0.6 * np.asarray(large, float) + 50 + grain, 0, 255)
    found = strokes(Image.fromarray(levels.astype(np.uint8)), tmp_path / "large")
    small = strokes(draw("ring", np.random.default_rng(0), side=1400), tmp_path / "clean")
    assert np.abs(found - small).mean() < 6


def test_pictures_as_they_are_are_those_of_an_image_folder(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "colour.png")
    found = few_pictures(tmp_path, size=16, channels=3, background="as is")
    np.testing.assert_array_equal(found.images[0], read_image(tmp_path / "colour.png", 16, 3)[0])
    assert (found.labels, found.names, found.inverted) == (None, (), 0)


def refused(folder, message, error=ValueError, **how):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        few_pictures(folder, **how)


def test_files_that_are_no_pictures_can_be_left_out(drawing, tmp_path):
    for name in ("dash", "ring"):
        (tmp_path / name).mkdir()
        drawing.save(tmp_path / name / "b.png")
    expected = few_pictures(tmp_path)
    (tmp_path / "dash" / "a.png").write_text("hello")
    Image.new("L", (20, 20), 77).save(tmp_path / "ring" / "c.png")
    refused(tmp_path, f"{tmp_path / 'dash' / 'a.png'} cannot be read as an image")
    with pytest.warns(UserWarning, match="2 files left out, such as: .*dash/a.png cannot be"):
        found = few_pictures(tmp_path, unreadable="skip")
    np.testing.assert_array_equal(found.images, expected.images)
    np.testing.assert_array_equal(found.labels, [0, 1])
    same = {"images": None, "labels": None, "skipped": 2}
    assert found._replace(**same) == expected._replace(**same)
    assert (found.skipped, expected.skipped) == (2, 0)
    drawing.save(tmp_path / "beside.png")
    refused(tmp_path, f"{tmp_path} holds the file beside.png beside class folders")
    with pytest.warns(UserWarning, match="3 files left out, such as: .*beside.png beside class"):
        beside = few_pictures(tmp_path, unreadable="skip")
    assert (beside.skipped, beside.files) == (3, expected.files)
    (tmp_path / "ring" / "b.png").unlink()
    where = tmp_path / "ring"
    nothing = f"no file in {where} can be read as a picture, such as: {where / 'c.png'} shows no"
    refused(tmp_path, nothing, unreadable="skip")
    refused(tmp_path, "unreadable='no' must be one of", unreadable="no")


def test_refusals(drawing, tmp_path, monkeypatch):
    refused(tmp_path / "no", f"{tmp_path / 'no'} does not exist, expected", FileNotFoundError)
    refused(tmp_path, f"{tmp_path} holds no pictures, expected a folder of", FileNotFoundError)
    file = tmp_path / "a.png"
    file.write_text("hello")
    refused(tmp_path, f"{file} cannot be read as an image (UnidentifiedImageError)")
    refused(file, f"{file} is not a folder", NotADirectoryError)
    (tmp_path / "class").mkdir()
    refused(tmp_path, f"{tmp_path} holds the file a.png beside class folders")
    file.unlink()
    refused(tmp_path, f"{tmp_path / 'class'} is empty, expected the images", FileNotFoundError)
    (tmp_path / "class").rmdir()
    drawing.resize((7, 40)).save(file)
    refused(tmp_path, f"{file} is a picture of 7 x 40 pixels, expected at least 8 x 8")
    Image.new("L", (20, 20), 77).save(file)
    refused(tmp_path, f"{file} shows no strokes: its grey levels go from 77 to 77")
    drawing.save(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refused(tmp_path, f"{file} cannot be read as an image (OSError)")
    drawing.save(file)
    monkeypatch.setattr(_image_file, "LARGEST", 1000)
    refused(tmp_path, f"{file} has more than 1,000 pixels: save it smaller")
    refused(tmp_path, "background='auto' is of drawings in grey", channels=3)
    refused(tmp_path, "background='white' must be one of", background="white")
    refused(tmp_path, "channels=2 must be one of 1, 3", channels=2)
