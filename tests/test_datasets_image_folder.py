"""Image folders: every picture read as it looks, whole classes split, mistakes named."""

import pathlib
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from fomaml_jax.datasets import _image_file, digest, image_folder

ORANGE = (230, 120, 20)


def save(file, image=None, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (12, 9), ORANGE)).save(file, **options)


def make_classes(folder, count, first=0):
    for c in range(first, first + count):
        save(folder / f"c{c:03d}" / "0.png", Image.new("RGB", (9, 9), (c, 0, 0)))


@pytest.fixture
def seven(tmp_path):
    make_classes(tmp_path, 7)
    return tmp_path


def names(splits):
    return [name for classes in splits for name in classes.names]


# How classes are dealt out.


@pytest.mark.parametrize(
    ("count", "options", "sizes"),
    [
        (4, {}, [2, 0, 2]),
        (5, {}, [3, 0, 2]),
        (6, {}, [2, 2, 2]),
        (7, {}, [3, 2, 2]),
        (20, {}, [13, 3, 4]),
        (100, {}, [65, 15, 20]),
        (20, {"validation": 0.3, "test": 0.5}, [4, 6, 10]),
        (10, {"validation": 0.45, "test": 0.5}, [2, 3, 5]),
        (10, {"validation": 0}, [8, 0, 2]),
        (10, {"test": 0}, [8, 2, 0]),
        (2, {"test": 0}, [2, 0, 0]),
        (3, {"validation": 0, "test": 0}, [3, 0, 0]),
    ],
)
def test_whole_classes_are_dealt_out(tmp_path, count, options, sizes):
    make_classes(tmp_path, count)
    splits = image_folder(tmp_path, size=4, **options)
    assert [len(classes.names) for classes in splits] == sizes
    assert sorted(names(splits)) == [f"c{c:03d}" for c in range(count)]
    for classes in splits:
        assert list(classes.names) == sorted(classes.names)
        reds = [int(name[1:]) for name in classes.names]
        assert classes.images.shape == (len(reds), 1 if reds else 0, 4, 4, 3)
        assert classes.images.dtype == np.uint8
        np.testing.assert_array_equal(classes.counts, np.ones(len(reds), np.int32), strict=True)
        assert [image[0, 0, 0, 0] for image in classes.images] == reds


def test_the_seed_decides_the_deal(tmp_path):
    make_classes(tmp_path, 30)
    first, again, other = (image_folder(tmp_path, size=1, seed=seed) for seed in (0, 0, 1))
    assert names(first) == names(again) != names(other)


@pytest.mark.parametrize("folder", ["validation", "val"])
def test_given_splits(tmp_path, folder):
    for first, (split, count) in enumerate({"train": 4, folder: 2, "test": 3}.items()):
        make_classes(tmp_path / split, count, 10 * first)
    splits = image_folder(str(tmp_path), size=4)
    assert splits.train.names == ("c000", "c001", "c002", "c003")
    assert splits.validation.names == ("c010", "c011")
    assert splits.test.names == ("c020", "c021", "c022")


@pytest.mark.parametrize(
    ("count", "validation", "sizes"),
    [(20, 0.15, [17, 3, 2]), (3, 0.15, [3, 0, 2]), (9, 0, [9, 0, 2])],
)
def test_validation_is_taken_from_train_where_none_is_given(tmp_path, count, validation, sizes):
    make_classes(tmp_path / "train", count)
    make_classes(tmp_path / "test", 2, first=50)
    splits = image_folder(tmp_path, size=4, validation=validation)
    assert [len(classes.names) for classes in splits] == sizes
    assert len(set(names(splits))) == count + 2
    assert splits.test.names == ("c050", "c051")


def test_a_class_called_train_is_a_class(seven):
    make_classes(seven, 0)
    (seven / "c006").rename(seven / "train")
    assert "train" in names(image_folder(seven, size=4))


def test_shorter_classes_end_in_zeros(seven):
    for example in range(1, 4):
        save(seven / "c002" / f"{example}.png", Image.new("RGB", (9 + example, 9), "white"))
    split = next(s for s in image_folder(seven, size=4) if "c002" in s.names)
    longest = split.names.index("c002")
    assert split.counts[longest] == split.images.shape[1] == 4
    assert (split.images[longest, 1:] == 255).all()
    others = np.delete(split.images, longest, axis=0)
    assert (np.delete(split.counts, longest) == 1).all()
    assert not others[:, 1:].any()


def test_hidden_and_loose_files_do_not_count(seven):
    (seven / ".git").mkdir()
    (seven / "__MACOSX").mkdir()
    (seven / "readme.txt").write_text("about")
    (seven / "c001" / ".DS_Store").write_text("litter")
    (seven / "c001" / "Thumbs.db").write_text("litter")
    (seven / "c001" / ".cache").mkdir()
    splits = image_folder(seven, size=4)
    assert sorted(names(splits)) == [f"c{c:03d}" for c in range(7)]
    assert all((classes.counts == 1).all() for classes in splits)


# How pictures are read.


def read(folder, file_name, image, *, size=8, channels=3, **options):
    """The picture after it was saved under `file_name` and loaded."""
    save(folder / "a" / file_name, image, **options)
    save(folder / "b" / "other.png")
    classes = image_folder(folder, size=size, channels=channels, validation=0, test=0).train
    assert classes.names == ("a", "b")
    return classes.images[0, 0]


def orange(mode):
    return Image.new("RGB", (20, 16), ORANGE).convert(mode)


@pytest.mark.parametrize(
    ("file_name", "mode", "tolerance"),
    [
        ("x.png", "RGB", 0),
        ("x.PNG", "RGBA", 0),
        ("x.png", "P", 30),
        ("x.bmp", "RGB", 0),
        ("x.gif", "P", 30),
        ("x.tif", "RGB", 0),
        ("x.tiff", "CMYK", 1),
        ("x.webp", "RGB", 10),
        ("x.jpg", "RGB", 3),
        ("x.jpeg", "CMYK", 3),
    ],
)
def test_formats(tmp_path, file_name, mode, tolerance):
    image = read(tmp_path, file_name, orange(mode)).astype(int)
    assert np.abs(image - ORANGE).max() <= tolerance


def test_grey_from_colour_and_colour_from_grey(tmp_path):
    grey = read(tmp_path, "x.png", orange("RGB"), channels=1)
    assert grey.shape == (8, 8, 1)
    assert (grey == orange("L").getpixel((0, 0))).all()
    colour = read(tmp_path, "x.png", orange("L"))
    assert (colour == orange("L").getpixel((0, 0))).all()


def half_transparent(mode):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (8, 0, 16, 16))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white_whatever_lies_under_it(tmp_path, mode):
    image = read(tmp_path, "x.png", half_transparent(mode))
    assert (image[:, :3] >= 250).all()
    assert (image[:, 5:] <= 5).all()


def test_transparent_colour_of_a_palette_or_grey_picture(tmp_path):
    assert (read(tmp_path, "x.png", Image.new("L", (8, 8), 7), transparency=7) == 255).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert (read(tmp_path, "x.png", palette, transparency=bytes([255, 0])) == 255).all()


def test_half_transparent_black_is_grey(tmp_path):
    image = read(tmp_path, "x.png", Image.new("RGBA", (8, 8), (0, 0, 0, 128)))
    np.testing.assert_allclose(image, 127, atol=1)


def gradient():
    return np.linspace(0, 2**16 - 1, 8 * 8).reshape(8, 8).astype(np.uint16)


@pytest.mark.parametrize("file_name", ["x.png", "x.tif", "x.pgm"])
def test_sixteen_bits_keep_their_range(tmp_path, file_name):
    image = read(tmp_path, file_name, Image.fromarray(gradient()), channels=1)
    np.testing.assert_array_equal(image[..., 0], gradient() >> 8)


def test_big_endian_sixteen_bits(tmp_path):
    big = Image.frombytes("I;16B", (8, 8), gradient().astype(">u2").tobytes())
    image = read(tmp_path, "x.tif", big, channels=1)
    np.testing.assert_array_equal(image[..., 0], gradient() >> 8)


def test_twelve_bits_in_sixteen_are_said_to_be_dark(tmp_path):
    with pytest.warns(UserWarning, match="x.png has 16 bits, of which it uses the lower 12 or"):
        image = read(tmp_path, "x.png", Image.fromarray(gradient() >> 4), channels=1)
    np.testing.assert_array_equal(image[..., 0], gradient() >> 12)


def test_many_dark_files_are_warned_of_once(seven):
    dark = Image.fromarray(gradient() >> 4)
    for file in sorted(seven.rglob("*.png"))[:3]:
        dark.save(file)
    with pytest.warns(UserWarning, match=r"full range \(and 2 more such files\)$") as said:
        image_folder(seven, size=4, validation=0, test=0, duplicates="keep")
    assert len(said) == 1


def test_colours_that_cannot_be_converted_are_refused_by_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"x\.tif cannot be read as an image"):
        read(tmp_path, "x.tif", Image.new("LAB", (16, 16)), channels=1)


def test_one_bit_pictures_are_resized_smoothly(tmp_path):
    checks = np.indices([64, 64]).sum(axis=0) % 2 == 0
    image = read(tmp_path, "x.png", Image.fromarray(checks), channels=1)
    np.testing.assert_allclose(image[1:-1, 1:-1], 127, atol=10)


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_middle_square_is_kept(tmp_path, shape):
    image = Image.new("RGB", shape, "red")
    left, top = (shape[0] - 16) // 2, (shape[1] - 16) // 2
    image.paste((0, 255, 0), (left, top, left + 16, top + 16))
    red, green = read(tmp_path, "x.png", image)[..., :2].transpose(2, 0, 1)
    assert green.min() > 235
    assert red.max() < 20  # the filter sees a little beyond the edge


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_honoured(tmp_path, suffix):
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 32, 16))  # bright above; turned by 90 degrees: bright on the right
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read(tmp_path, f"x.{suffix}", image, exif=exif).mean(axis=2)
    assert turned[:, 5:].min() > 240
    assert turned[:, :3].max() < 15


def test_large_photograph_keeps_its_picture(tmp_path):
    ramp = np.linspace(0, 255, 1280).astype(np.uint8)
    photograph = Image.fromarray(np.broadcast_to(ramp[None, :, None], [960, 1280, 3]).copy())
    image = read(tmp_path, "x.jpg", photograph, quality=95)[4, :, 0].astype(int)
    expected = ramp[160:1120].reshape(8, -1).mean(axis=1)
    np.testing.assert_allclose(image, expected, atol=4)


def test_only_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    image = read(tmp_path, "x.gif", frames[0], save_all=True, append_images=frames[1:])
    assert (image == 255).all()


# What is left out, or kept, if asked.


@pytest.mark.parametrize("bad", [(0,), (1, 3), (0, 1, 2)])
def test_unreadable_files_are_skipped_as_if_they_were_not_there(seven, bad):
    for example in range(4):
        save(seven / "c002" / f"{example}.png", Image.new("RGB", (9, 9), (50 + example, 0, 0)))
    for example in bad:
        (seven / "c002" / f"{example}.png").write_text("no picture")
    more = rf", and {len(bad) - 1} more files$" if len(bad) > 1 else "replace the file$"
    with pytest.warns(UserWarning, match=rf"^left out: .*/{bad[0]}\.png cannot be read.*{more}"):
        skipped = image_folder(seven, size=4, unreadable="skip")
    for example in bad:
        (seven / "c002" / f"{example}.png").unlink()
    without = image_folder(seven, size=4)
    assert digest(skipped) == digest(without)
    for one, other in zip(skipped, without, strict=True):
        np.testing.assert_array_equal(one.images, other.images)


def test_a_picture_too_large_to_unpack_is_refused(seven, monkeypatch):
    monkeypatch.setattr(_image_file, "LARGEST", 100)
    save(next(seven.iterdir()) / "large.png", Image.new("L", (11, 10)))
    with pytest.raises(ValueError, match=r"large.png has more than 100 pixels: save it smaller"):
        image_folder(seven, size=4)


def test_what_is_skipped_is_no_duplicate(seven):
    for c in range(7):
        (seven / f"c{c:03d}" / "README.txt").write_text("not a picture")
    with pytest.warns(UserWarning, match="and 6 more files") as caught:
        splits = image_folder(seven, size=4, unreadable="skip")
    assert caught[0].filename == __file__
    assert all((classes.counts == 1).all() for classes in splits)


def test_an_error_in_passing_does_not_make_a_picture_unreadable(seven, monkeypatch):
    def fail(path):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(pathlib.Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Too many open files"):
        image_folder(seven, size=4, unreadable="skip")


def test_a_picture_may_be_twice_in_a_split_and_in_two_if_asked(seven):
    given(train=3, test=3)(seven)
    shutil.copy(seven / "train" / "c000" / "0.png", seven / "train" / "c001" / "1.png")
    image_folder(seven, size=4)
    twice = shutil.copy(seven / "test" / "c010" / "0.png", seven / "test" / "c010" / "1.png")
    with pytest.raises(
        ValueError, match=r"c010.0\.png and .*c010.1\.png are the same picture \(1 "
    ):
        image_folder(seven, size=4)
    image_folder(seven, size=4, duplicates="keep")
    twice.unlink()
    shutil.copy(seven / "train" / "c000" / "0.png", seven / "test" / "c010" / "1.png")
    with pytest.raises(ValueError, match="the same picture in two splits"):
        image_folder(seven, size=4)
    splits = image_folder(seven, size=4, duplicates="keep")
    assert splits.test.counts.tolist() == [2, 1, 1]


def test_the_digest_is_that_of_pixels_counts_names_and_splits(seven):
    splits = image_folder(seven, size=4)
    train = splits.train
    other = train.images.copy()
    other[-1, -1, -1, -1, -1] += 1
    digests = [
        digest(x)
        for x in (
            splits,
            splits._replace(train=train._replace(images=other)),
            splits._replace(train=train._replace(counts=train.counts - 1)),
            splits._replace(train=train._replace(names=train.names[::-1])),
            splits._replace(train=splits.test, test=train),
        )
    ]
    assert len(set(digests)) == 5
    assert digest(image_folder(seven, size=4)) == digests[0]


# What is refused.


def touch(name, content=b""):
    def change(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def make_folder(name):
    return lambda folder: (folder / name).mkdir(parents=True)


def given(**counts):
    """Replaces the classes by the folders `train`, ..., with classes that never meet."""

    def change(folder):
        remove_classes(folder)
        for first, (split, count) in enumerate(counts.items()):
            make_classes(folder / split, count, 10 * first)

    return change


def remove_classes(folder, keep=0):
    for c in range(keep, 7):
        (folder / f"c{c:03d}" / "0.png").unlink()
        (folder / f"c{c:03d}").rmdir()


def overlap(folder):
    given(train=3, test=3)(folder)
    make_classes(folder / "test", 1, first=2)


def nest(folder):
    save(folder / "c001" / "more" / "1.png")


def save_floats(folder):
    save(folder / "c001" / "float.tif", Image.fromarray(np.full([8, 8], 0.5, np.float32)))


def truncate(folder):
    file = folder / "c001" / "cut.jpg"
    save(file, Image.effect_noise((64, 64), 50))
    file.write_bytes(file.read_bytes()[:500])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (remove_classes, FileNotFoundError, "holds no class folders, expected one folder a class"),
        (make_folder("new"), FileNotFoundError, "new is empty, expected the images of a class"),
        (touch("c001/a.txt", b"hi"), ValueError, r"a\.txt cannot be read .*remove or replace"),
        (touch("c001/a.png"), ValueError, r"c001/a\.png cannot be read as an image"),
        (truncate, ValueError, r"cut\.jpg cannot be read as an image \(OSError\)"),
        (save_floats, ValueError, r"float\.tif has pixels from 0\.5 to 0\.5 in mode 'F', expected"),
        (
            nest,
            ValueError,
            "c001 holds the folder more where images should be, expected one folder",
        ),
        (
            lambda folder: remove_classes(folder, keep=3),
            ValueError,
            r"few class folders \(c000, c001, c002\), expected at least 4: two to train on and two",
        ),
        (given(train=2, test=1), ValueError, r"test holds too few .* at least 2: a task needs two"),
        (given(train=1, test=2), ValueError, r"train holds too few class folders \(c000\)"),
        (given(train=2, test=2, val=1), ValueError, r"val holds too few class folders \(c020\)"),
        (given(train=2), ValueError, "train holds the folder c000 where .* train/ and test/ with"),
        (given(train=2, test=2, more=2), ValueError, "holds more beside train and test"),
        (given(train=2, test=2, val=2, validation=2), ValueError, "val, validation beside train"),
        (
            overlap,
            ValueError,
            "the class c002 in two splits, expected every class in one: keep all",
        ),
    ],
)
def test_refused_contents(seven, change, error, message):
    change(seven)
    with pytest.raises(error, match=message) as info:
        image_folder(seven, size=4)
    assert str(seven) in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("one", "other"), [("Cat", "cat"), ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\u0301")]
)
def test_one_class_by_two_names_is_refused(seven, one, other):
    given(train=3, test=3)(seven)
    for split, name in (("train", one), ("test", other)):
        shutil.move(next((seven / split).iterdir()), seven / split / name)
    with pytest.raises(ValueError, match=f"the class {one} in two splits, expected every class in"):
        image_folder(seven, size=4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, "size=0 must be a whole number of at least 1"),
        ({"size": "84"}, TypeError, "size='84' must be a whole number of at least 1"),
        ({"channels": 4}, ValueError, "channels=4 must be one of 1, 3"),
        ({"seed": -1}, ValueError, "seed=-1 must be a whole number of at least 0"),
        ({"test": 1.0}, ValueError, "test=1.0 must be a fraction from 0 to below 1"),
        ({"test": float("nan")}, ValueError, "test=nan must be a fraction from 0 to below 1"),
        ({"validation": "a"}, ValueError, "validation='a' must be a fraction from 0 to below 1"),
        (
            {"validation": 0.5, "test": 0.5},
            ValueError,
            "validation=0.5 and test=0.5 leave nothing to train on: together they must be below 1",
        ),
    ],
)
def test_refused_options(seven, arguments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        image_folder(seven, **arguments)


def test_refused_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist, expected one folder a"):
        image_folder(tmp_path / "nowhere")
    save(tmp_path / "x.png")
    with pytest.raises(NotADirectoryError, match=r"x\.png is not a folder, expected one folder a"):
        image_folder(tmp_path / "x.png")


def test_missing_pillow_says_how_to_get_it(seven, monkeypatch):
    monkeypatch.delitem(sys.modules, "fomaml_jax.datasets._image_file", raising=False)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'needs PIL: pip install "fomaml-jax\[cli\]"'):
        image_folder(seven)
