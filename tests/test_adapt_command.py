"""`fomaml-jax adapt` and `predict`: from folders of pictures to predictions, in this process."""

import csv
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from command_line import call, everything, paint_classes
from few_shot_runs import SHAPES, SMALL, draw_folder, small_networks, write_run
from matplotlib.colors import to_rgb
from PIL import Image

import fomaml_jax as fj
from fomaml_jax import contact_sheets, options, runs
from fomaml_jax.contact_sheets import Cell
from fomaml_jax.pictures import ACCENT, RIGHT, WRONG

KNOWN, STRANGER = SHAPES[:3], SHAPES[3]


@pytest.fixture(scope="module", autouse=True)
def small_world():
    with small_networks():
        yield


@pytest.fixture(scope="module")
def scene(small_world, tmp_path_factory):
    """A run, a support folder of three classes, a query folder with a fourth, a flat one."""
    home = tmp_path_factory.mktemp("scene")
    write_run(home / "run")
    draw_folder(home / "support", KNOWN, 2)
    draw_folder(home / "query", SHAPES, 3, seed=1)
    (home / "flat").mkdir()
    for file in (home / "query" / "ring").iterdir():
        shutil.copy(file, home / "flat")
    return home


@pytest.fixture(scope="module")
def done(scene):
    """The command with all that it writes."""
    words = ("--support", scene / "support", "--query", scene / "query")
    run = call("adapt", scene / "run", *words, "--out", scene / "out", "--save", scene / "mine")
    assert run.code == 0, run.err
    return dataclasses.replace(run, folder=scene / "out")


def table(folder):
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_predictions_are_those_of_the_same_in_python(done, scene):
    support = fj.datasets.few_pictures(scene / "support")
    query = fj.datasets.few_pictures(scene / "query")
    classifier = fj.load_classifier(scene / "run")
    adapt = jax.jit(lambda x, y: fj.adapt_classifier(classifier, (x, y), names=KNOWN))
    adapted = adapt(support.images, support.labels)
    said = adapted.predict(query.images)
    rows = table(done.folder)
    assert [row["picture"] for row in rows] == [f"{s}/{k}.png" for s in SHAPES for k in range(3)]
    for place, row in enumerate(rows):
        probabilities = [float(row[f"probability of {name}"]) for name in KNOWN]
        np.testing.assert_allclose(probabilities, said.probabilities[place], rtol=1e-3, atol=1e-6)
        nearest = KNOWN[int(said.probabilities[place].argmax())]
        assert row["class"] == nearest
        assert row["prediction"] == (nearest if said.is_known[place] else "none of these")
        assert float(row["probability"]) == max(probabilities)
        assert float(row["similarity"]) == pytest.approx(float(said.similarity[place]), rel=1e-3)
    threshold = done.result["calibration"]["threshold"]
    assert threshold == pytest.approx(float(adapted.calibration.threshold), rel=1e-4)


def test_the_result_counts_what_the_table_says(done):
    rows = table(done.folder)
    known = [row for row in rows if row["folder"] != STRANGER]
    strangers = [row for row in rows if row["folder"] == STRANGER]
    none = [row["prediction"] == "none of these" for row in strangers]
    result = done.result
    assert result["accuracy"] == np.mean([row["class"] == row["folder"] for row in known])
    assert (result["known"], result["strangers"]) == (9, 3)
    assert result["strangers_recognised"] == sum(none)
    assert (result["inverted"], result["background"]) == (12, "auto")
    assert (result["statistics"], result["also_in_support"]) == ("one-at-a-time", 0)
    assert f"accuracy {100 * result['accuracy']:.1f} %: " in done.out
    assert "12 of 12 dark on light, so inverted" in done.out
    assert "each query normalised beside the support set alone" in done.out


def test_predict_does_the_same_without_run_and_support(done, scene, tmp_path):
    for name in ("run", "support"):
        (scene / name).rename(scene / f"{name} elsewhere")
    try:
        words = ("--query", scene / "query", "--out", tmp_path / "again", "--format", "jsonl")
        again = call("predict", scene / "mine", *words)
    finally:
        for name in ("run", "support"):
            (scene / f"{name} elsewhere").rename(scene / name)
    assert again.code == 0, again.err
    lines = (tmp_path / "again" / "predictions.jsonl").read_text().splitlines()
    for line, row in zip(map(json.loads, lines), table(done.folder), strict=True):
        assert line["prediction"] == row["prediction"]
        assert line["probabilities"][line["class"]] == line["probability"]
        assert line["similarity"] == pytest.approx(float(row["similarity"]), rel=1e-4)
    result = json.loads((tmp_path / "again" / "result.json").read_text())
    assert result == done.result


def test_a_flat_folder_is_told_about_without_an_accuracy(done, scene, tmp_path):
    shutil.copy(scene / "support" / "dash" / "0.png", scene / "flat" / "seen.png")
    words = ("--query", scene / "flat", "--out", tmp_path / "out", "--statistics", "transductive")
    flat = call("predict", scene / "mine", *words)
    assert flat.code == 0, flat.err
    assert "accuracy" not in flat.out
    assert "normalised together (transductive)" in flat.out
    assert "1 of them are support pictures too, or the same to the network: none counts" in flat.out
    assert "found with each picture normalised alone, and fits less well here" in flat.out
    rows = table(tmp_path / "out")
    assert [row["picture"] for row in rows] == ["0.png", "1.png", "2.png", "seen.png"]
    assert [row["in_support"] for row in rows] == ["False", "False", "False", "True"]
    assert "folder" not in rows[0]


def test_files_that_are_no_pictures_can_be_left_out(done, scene, tmp_path):
    query = shutil.copytree(scene / "query", tmp_path / "query")
    (query / "ring" / "notes.txt").write_text("of Tuesday")
    words = ("--query", query, "--out", tmp_path / "out")
    refused = call("predict", scene / "mine", *words)
    assert (refused.code, "notes.txt cannot be read" in refused.err) == (2, True)
    skipped = call("predict", scene / "mine", *words, "--unreadable", "skip")
    assert skipped.code == 0, skipped.err
    assert "1 file left out, such as: " in skipped.err
    assert table(tmp_path / "out") == table(done.folder)


def test_support_pictures_that_are_asked_about_again_do_not_count(done, scene, tmp_path):
    shutil.copytree(scene / "query", tmp_path / "query")
    for name in KNOWN:
        shutil.copy(scene / "support" / name / "0.png", tmp_path / "query" / name / "seen.png")
    words = ("--query", tmp_path / "query", "--out", tmp_path / "out")
    again = call("predict", scene / "mine", *words)
    assert again.code == 0, again.err
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["pictures"], result["also_in_support"], result["known"]) == (15, 3, 9)
    assert result["accuracy"] == done.result["accuracy"]


def test_what_was_written_is_replaced_only_where_that_is_asked_for(done, scene, tmp_path):
    words = ("--query", scene / "flat", "--out", tmp_path)
    assert call("predict", scene / "mine", *words).code == 0
    before = everything(tmp_path)
    refused = call("predict", scene / "mine", *words)
    assert (refused.code, everything(tmp_path)) == (2, before)
    assert refused.err == (
        f"fomaml-jax: {tmp_path} is not empty; pass --out with a folder, new or empty\n"
    )
    assert call("predict", scene / "mine", *words, "--overwrite", "--format", "jsonl").code == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"predictions.jsonl", "contact_sheet.png", "result.json"}
    (tmp_path / "letter.txt").touch()
    refused = call("predict", scene / "mine", *words, "--overwrite")
    assert refused.code == 2
    assert f"{tmp_path} holds letter.txt, which is no prediction" in refused.err


def test_a_run_of_the_users_own_pictures(tmp_path):
    """In colour, as they are, from one example a class; a learned head with ways to spare."""
    chosen = options.Folder(path=tmp_path, size=12, head="learned", ways=4, width=4)
    write_run(tmp_path / "run", chosen)
    for name in ("support", "query"):
        paint_classes(tmp_path / name, 3)
    for file in (tmp_path / "support").glob("*/[12].png"):
        file.unlink()
    words = ("--support", tmp_path / "support", "--query", tmp_path / "query")
    found = call("adapt", tmp_path / "run", *words, "--out", tmp_path / "out")
    assert found.code == 0, found.err
    assert "3 classes by 1 example each (12 x 12, colour, the middle square of each)" in found.out
    assert "with one example a class nothing tells how alike" in found.out
    assert "3 of them are support pictures too" in found.out
    refused = call("adapt", tmp_path / "run", *words, "--background", "light")
    assert refused.code == 2
    assert "--background light: the run was trained on pictures as they are" in refused.err


# What is refused, in one line and with exit code 2, and nothing is left.


REFUSED = {
    "no such run": (None, "adapt nowhere --support support --query query", "is not a run"),
    "no support folder": (None, "adapt run --support no --query query", "no does not exist"),
    "a flat support folder": (
        None,
        "adapt run --support flat --query query",
        "flat holds pictures and no class folders: put those of each class into a folder of its",
    ),
    "one class": (
        lambda home: [shutil.rmtree(home / "support" / shape) for shape in KNOWN[1:]],
        "adapt run --support support --query query",
        "there must be two classes or more to tell apart, got 1",
    ),
    "an empty class": (
        lambda home: (home / "support" / "zigzag").mkdir(),
        "adapt run --support support --query query",
        "zigzag is empty, expected the images of a class",
    ),
    "more classes than a learned head has": (
        lambda home: write_run(home / "run", dataclasses.replace(SMALL, head="learned", ways=2)),
        "adapt run --support support --query query",
        "the network's head was learned for 2 classes, got 3: leave out 1, or train a network",
    ),
    "a class that is none": (
        lambda home: (home / "support" / "ring").rename(home / "support" / "none of these"),
        "adapt run --support support --query query",
        'support has a class called "none of these", which is found out without one',
    ),
    "no picture": (
        lambda home: (home / "support" / "ring" / "0.png").write_text("ring"),
        "adapt run --support support --query query",
        "0.png cannot be read as an image",
    ),
    "a strip": (
        lambda home: strip(home / "query" / "ring" / "0.png"),
        "adapt run --support support --query query",
        "0.png is a strip of pixels: cut it nearer to a square",
    ),
    "the same picture twice": (
        lambda home: shutil.copy(home / "support" / "ring" / "0.png", home / "support" / "dash"),
        "adapt run --support support --query query --overwrite",
        "are the same picture: remove one of them",
    ),
    "the same drawing at two places": (
        lambda home: shifted(home / "support" / "ring" / "0.png", home / "support" / "dash"),
        "adapt run --support support --query query --overwrite",
        "are the same at 28 x 28 pixels, drawings without their place and size on paper: remove",
    ),
    "a folder that is not there, before anything is saved": (
        None,
        "adapt run --support support --query qurey --save mine",
        "qurey does not exist",
    ),
    "a file among the predictions": (
        None,
        "adapt run --support support --query query --out there --save there/result.json",
        "there/result.json would be among the predictions",
    ),
    "a file among the pictures": (
        None,
        "adapt run --support support --save support/ring/mine",
        "support/ring/mine would be among the pictures in support; pass another --save",
    ),
    "a tiny picture": (
        lambda home: Image.new("L", (3, 2)).save(home / "query" / "ring" / "0.png"),
        "adapt run --support support --query query",
        "0.png is a picture of 3 x 2 pixels, expected at least 8 x 8",
    ),
    "no query pictures": (
        lambda home: (home / "none").mkdir(),
        "adapt run --support support --query none",
        "none holds no pictures",
    ),
    "nothing to do": (None, "adapt run --support support", "pass --query with pictures to"),
    "predictions of nothing": (
        None,
        "adapt run --support support --save mine --out never",
        "--out and --format are of predictions; pass --query with pictures too",
    ),
    "a file that is there": (
        lambda home: (home / "mine").touch(),
        "adapt run --support support --save mine",
        "mine is there already; pass another --save, or --overwrite",
    ),
    "a folder for a file": (
        None,
        "adapt run --support support --save flat",
        "flat is a folder; pass --save with a file",
    ),
    "a regression": (
        lambda home: runs.write_json(
            home / "run" / runs.CONFIG, options.to_json(options.Sinusoid())
        ),
        "adapt run --support support --query query",
        "run is a run of sinusoid, which has no classes",
    ),
    "no saved classifier": (None, "predict mine --query flat", "mine is not a file, expected"),
    "another kind of file": (
        None,
        "predict run/parameters.npz --query flat",
        "parameters.npz is of another kind: expected what fomaml-jax adapt --save",
    ),
}


def strip(file):
    """A stroke on paper, 100 times as wide as high."""
    paper = np.full((12, 1200), 255, np.uint8)
    paper[4:8, 100:900] = 0
    Image.fromarray(paper).save(file)


def shifted(file, folder):
    """The drawing on more paper."""
    with Image.open(file) as drawn:
        paper = Image.new(drawn.mode, (drawn.width + 40, drawn.height + 40), drawn.getpixel((0, 0)))
        paper.paste(drawn, (40, 40))
    paper.save(folder / "shifted.png")


@pytest.mark.parametrize(("change", "words", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(change, words, message, scene, tmp_path, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(scene, home, ignore=shutil.ignore_patterns("out", "mine"))
    if change is not None:
        change(home)
    monkeypatch.chdir(home)
    before = everything(home)
    refused = call(*words.split())
    assert refused.code == 2
    assert refused.err.startswith("fomaml-jax: ")
    assert message in refused.err
    assert refused.err.count("\n") == 1
    assert everything(home) == before


# The contact sheet.


def test_the_sheet_shows_every_picture_with_what_is_said_of_it(done):
    with Image.open(done.folder / "contact_sheet.png") as image:
        pixels = np.asarray(image.convert("RGB")) / 255
    rows = table(done.folder)
    right = {
        row["prediction"] == (row["folder"] if row["folder"] in KNOWN else "none of these")
        for row in rows
    }
    for colour, there in ((RIGHT, True in right), (WRONG, False in right), (ACCENT, False)):
        assert np.isclose(pixels, to_rgb(colour), atol=0.02).all(-1).any() == there


def test_the_sheet_has_a_place_for_each_and_says_how_many_it_leaves_out():
    image = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    cells = [Cell(image + k % 7, (f"costs ${k} and much more", "9 %"), ACCENT) for k in range(305)]
    (axes,) = contact_sheets.contact_sheet(cells[:2], cells).axes
    assert len(axes.images) == 302
    np.testing.assert_array_equal(axes.images[5].get_array(), image[..., 0] + 3)
    corners = {tuple(shown.get_extent()) for shown in axes.images}
    assert len(corners) == 302
    texts = [text.get_text() for text in axes.texts]
    assert "the first 300 of 305 pictures, orange is none of these" in texts
    assert "costs \\$7 and mu…\n9 %" in texts
    contact_sheets.contact_sheet(cells[:2], cells[:3]).canvas.draw()  # no mathematics in names


@pytest.mark.parametrize(("of_strokes", "corner"), [(False, 0), (True, 255)])
def test_photographs_are_shown_as_they_are_and_strokes_as_ink(of_strokes, corner):
    dark = Cell(np.zeros((8, 8, 1), np.uint8), ("dark",), ACCENT)
    (axes,) = contact_sheets.contact_sheet([dark], [dark], of_strokes=of_strokes).axes
    shown = axes.images[0]
    assert (255 * np.asarray(shown.to_rgba(shown.get_array()))[0, 0, 0]).round() == corner


def test_a_name_that_is_not_unicode_is_drawn_as_it_can_be(tmp_path):
    """Such as one from an archive in Latin-1."""
    cells = [Cell(np.zeros((4, 4, 1), np.uint8), ("caf\udce9 $x", "1.00"), RIGHT)]
    figure = contact_sheets.contact_sheet(cells, cells)
    figure.savefig(tmp_path / "sheet.png")
    assert any(r"caf\udce9" in text.get_text() for text in figure.axes[0].texts)
