"""What the command line refuses: in one line, with exit code 2, and nothing is left or lost."""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from command_line import TINY, call, everything, paint_classes, rows_of
from PIL import Image

from fomaml_jax import cli

pytestmark = pytest.mark.usefixtures("small_world")

# Refusals: of words, that the parser finds (its texts are its own; ours follow further below).

PARSER = {
    "an unknown option": ("train glyphs --wyas 3", "--wyas"),
    "an option of another data set": ("train sinusoid --ways 3", "--ways"),
    "a word too many": ("train glyphs letters", "letters"),
    "a word for a number": ("train glyphs --ways five", "'five'"),
    "a fraction for a count": ("train sinusoid --shots 1.5", "'1.5'"),
    "a word for a rate": ("train glyphs --rate fast", "'fast'"),
    "an unknown choice": ("train glyphs --pooling mean", "'mean'"),
    "an unknown split": ("train omniglot --split test", "'test'"),
    "two channels": ("train folder --path . --channels 2", "'2'"),
    "no value": ("train glyphs --out", "--out"),
    "no path": ("train folder", "--path"),
    "no run": ("evaluate", "PATH"),
    "an unknown option of evaluate": ("evaluate here --width 3", "--width"),
}


class Terminal(io.StringIO):
    """Colours and box characters, or neither."""

    def __init__(self, encoding):
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self):
        return self._encoding

    def isatty(self):
        return self._encoding == "utf-8"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(("words", "named"), PARSER.values(), ids=PARSER)
def test_words_are_refused_in_one_plain_line(words, named, encoding, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "xterm-256color")
    out, err = Terminal(encoding), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as stop:
        cli.main(words.split())
    command = words.split(" --")[0].removesuffix(" here").removesuffix(" letters")
    assert stop.value.code == 2
    assert out.getvalue() == ""
    line = err.getvalue()
    assert re.fullmatch(rf"fomaml-jax: [ -~]+ \(see fomaml-jax {command} --help\)\n", line)
    assert named in line
    assert not re.search(r"--- |  |Perhaps|helptext", line)
    assert not list(tmp_path.iterdir())


# Refusals: of what the words mean. The scene is a folder with a file, an empty and a full folder.

COUNT = "must be an integer of at least"
RATE = "must be a finite number above 0, got"
CHECKPOINTS = "--checkpoint-every must be steps (a number above 0) or time (30s, 5min, 1h), got"
RESUMED = "leave it out to resume the run, or start another"
IMAGES = "one folder a class with its images, or train/ and test/ with such folders"
ARCHIVES = (
    "a folder with Omniglot's images_background.zip and images_evaluation.zip, or both unpacked"
)
REFUSED = {
    "trian": "unknown command 'trian'; there are train, evaluate, report, adapt and predict",
    "report": "report needs at least one run",
    "report nowhere": "nowhere is not a run: it does not exist",
    "report run --out file": "file is a file; pass --out with a folder",
    "report run --out file/sub/report": "file is a file; pass another --out",
    "evaluate run --shift --out file/report": "file is a file; pass another --out",
    "adapt pretrained:omniglot --support full --save file/a.npz": "file is a file; pass another "
    "--save",
    "adapt pretrained:omniglot --support full --save empty": "empty is a folder; pass --save with "
    "a file",
    "predict a.npz --query full --out file/b": "file is a file; pass another --out",
    "predict run --file new.csv --out file/c.csv": "file is a file; pass another --out",
    "train glyphs --compilation-cache file": "--compilation-cache file: File exists",
    "report run empty": "empty is not a run: it has no config.json",
    "train mnist": "unknown data set 'mnist'; there are glyphs, omniglot, sinusoid, folder, table",
    "train --steps 3 glyphs": "the data set comes first: fomaml-jax train glyphs ...",
    "train glyphs --shift 28": "--shift must be below a picture's 28 pixels, got 28",
    "train folder --path full --size 16 --shift 16": "--shift must be below a picture's 16 pixels, "
    "got 16",
    "train folder --path full --out full/runs/a": "full/runs/a would be among the pictures in "
    "full; pass another --out",
    "adapt pretrained:omniglot --support full --query full --out full/b": "full/b would be among "
    "the pictures in full; pass another --out",
    "train ''": "unknown data set ''; there are glyphs, omniglot, sinusoid, folder, table",
    "train glyphs --ways 1": f"--ways {COUNT} 2, got 1",
    "train glyphs --shots -1": f"--shots {COUNT} 1, got -1",
    "train glyphs --queries 0": f"--queries {COUNT} 1, got 0",
    "train --steps 0": f"--steps {COUNT} 1, got 0",
    "train sinusoid --tasks-per-step 0": f"--tasks-per-step {COUNT} 1, got 0",
    "train glyphs --inner-steps -1": f"--inner-steps {COUNT} 0, got -1",
    "train glyphs --eval-tasks 1": f"--eval-tasks {COUNT} 2, got 1",
    "train glyphs --seed -1": f"--seed {COUNT} 0, got -1",
    "train glyphs --seed 99999999999999999999": "--seed must be at most 2147483647, "
    "got 99999999999999999999",
    "train folder --path full --size 0": f"--size {COUNT} 1, got 0",
    "train glyphs --inner-rate nan": f"--inner-rate {RATE} nan",
    "train glyphs --rate inf": f"--rate {RATE} inf",
    "train glyphs --head-rate -0.1": f"--head-rate {RATE} -0.1",
    "train sinusoid --inner-clip 0": f"--inner-clip {RATE} 0.0",
    "train glyphs --ways 8": "test split: ways=8 is more than the 7 classes there are; "
    "ask for fewer with --ways",
    "train glyphs --train-ways 9": "train split: ways=9 is more than the 8 classes there are; "
    "ask for fewer with --train-ways",
    "train glyphs --ways 2 --train-ways 2 --shots 3 --queries 4": "validation split: the class 0 "
    "has 6 pictures, but shots=3 plus queries=4 are asked of every class; ask for fewer, or leave "
    "that class out",
    "train glyphs --out file": "file is a file; pass --out with a folder, new or empty",
    "train glyphs --out full": "full is not empty; pass --out with a folder, new or empty",
    "train sinusoid --out file/run": "cannot write a run to file/run: Not a directory",
    "train glyphs --max-left-out 2": "--max-left-out must be a share between 0 and 1, got 2.0",
    "train glyphs --max-left-out nan": "--max-left-out must be a share between 0 and 1, got nan",
    "train glyphs --affine 0.5": "--affine must be above 0 and below 0.5, got 0.5",
    "train glyphs --minutes 0": f"--minutes {RATE} 0.0",
    "train glyphs --checkpoint-every 0": f"{CHECKPOINTS} '0'",
    "train glyphs --checkpoint-every 5days": f"{CHECKPOINTS} '5days'",
    "train glyphs --checkpoint-every -3s": f"{CHECKPOINTS} '-3s'",
    "train --resume": "--resume needs the folder of a run",
    "train --resume --steps 3": "--resume needs the folder of a run",
    "train --resume nowhere": "nowhere is not a run: it does not exist",
    "train omniglot --resume run": "run is a run of glyphs, not of omniglot",
    "train --resume run --steps 4": f"--steps: the run was started with 3, got 4; {RESUMED}",
    "train --resume run --out other": f"--out: the run was started with None, got other; {RESUMED}",
    "train --resume run --rate 0.5": f"--rate: the run was started with 0.01, got 0.5; {RESUMED}",
    "train folder --path nowhere": f"nowhere does not exist, expected {IMAGES}",
    "train folder --path empty": f"empty holds no class folders, expected {IMAGES}",
    "train folder --path file": f"file is not a folder, expected {IMAGES}",
    "train omniglot --path nowhere": f"nowhere does not exist, expected {ARCHIVES}",
    "train omniglot --path empty": f"empty holds no Omniglot, expected {ARCHIVES}",
    "train sinusoid --out new --compilation-cache new/kept": (
        "new/kept would be inside of new; pass another --compilation-cache"
    ),
    "evaluate nowhere": "nowhere is not a run: it does not exist",
    "evaluate empty": "empty is not a run: it has no config.json",
    "evaluate file": "file is not a run: it has no config.json",
    "evaluate run --eval-tasks 0": f"--eval-tasks {COUNT} 2, got 0",
    "evaluate run --eval-steps 0": f"--eval-steps {COUNT} 1, got 0",
    "evaluate run --path here": "--path is no option of runs of glyphs",
}


def words_of(line):
    return ["" if word == "''" else word for word in line.split()]


@pytest.fixture
def scene(glyphs, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "result.json").touch()
    shutil.copytree(glyphs.folder, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_refused(scene, words, message):
    before = everything(scene)
    run = call(*words)
    assert (run.code, run.out, run.err) == (2, "", f"fomaml-jax: {message}\n")
    assert everything(scene) == before


@pytest.mark.parametrize("line", REFUSED)
def test_refused(scene, line):
    assert_refused(scene, words_of(line), REFUSED[line])


def test_what_may_not_be_written_is_refused_before_the_work(scene, monkeypatch):
    """Root may write anywhere, so the system's answer is put in its place."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "empty")
    message = "empty may not be written to; pass another --out"
    assert_refused(scene, ["report", "run", "--out", "empty/new"], message)
    message = "empty may not be written to; pass another --save"
    words = ["adapt", "pretrained:omniglot", "--support", "full", "--save", "empty/a.npz"]
    assert_refused(scene, words, message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_refused(scene):
    (scene / "locked").mkdir(mode=0o500)
    message = "cannot write a run to locked/run: Permission denied"
    assert_refused(scene, ["train", "sinusoid", "--out", "locked/run"], message)


# Refusals: of pictures. The scene is a folder of six classes, three pictures each.


def write(name, content=b""):
    def change(data):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_bytes(content)

    return change


def cut_picture(data):
    path = data / "class 1" / "0.png"
    path.write_bytes(path.read_bytes()[:200])


def huge_picture(data):
    """A small file that says it holds 3,600,000,000 pixels."""

    def chunk(content):
        return (
            struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
        )

    head = chunk(b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    write("class 1/0.png", b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT"))(data)


def nan_picture(data):
    pixels = np.full((8, 8), np.nan, np.float32)
    Image.fromarray(pixels).save(data / "class 1" / "x.tif")


def in_splits(data):
    """Classes 0 to 2 to train on, 3 to 5 to be judged on."""
    for c in range(6):
        (data / ("train" if c < 3 else "test")).mkdir(exist_ok=True)
        (data / f"class {c}").rename(data / ("train" if c < 3 else "test") / f"class {c}")


def twice(data):
    in_splits(data)
    shutil.copy(data / "train" / "class 1" / "2.png", data / "test" / "class 4" / "again.png")


def class_in_both(data):
    in_splits(data)
    shutil.copytree(data / "train" / "class 1", data / "test" / "class 1")


def only(count):
    return lambda data: [shutil.rmtree(data / f"class {c}") for c in range(count, 6)]


def unreadable(error, name="class 1/0.png"):
    return (
        f"data/{name} cannot be read as an image ({error}), expected a picture that Pillow opens: "
        "remove or replace the file"
    )


NO_FILE = "is not a file, expected a picture: remove or replace it"
PICTURES = {
    "a text": (write("class 1/0.png", b"text"), "", unreadable("UnidentifiedImageError")),
    "an empty file": (write("class 1/0.png"), "", unreadable("UnidentifiedImageError")),
    "half a picture": (cut_picture, "", unreadable("OSError")),
    "a decompression bomb": (
        huge_picture,
        "",
        "data/class 1/0.png has more than 89,478,485 pixels: save it smaller",
    ),
    "pixels of nan": (
        nan_picture,
        "",
        "data/class 1/x.tif has pixels from nan to nan in mode 'F', expected 8 or 16 bits: save it "
        "as PNG",
    ),
    "a broken link": (
        lambda data: (data / "class 1" / "link.png").symlink_to("nowhere"),
        "",
        f"data/class 1/link.png {NO_FILE}",
    ),
    "a link to itself": (
        lambda data: (data / "class 1" / "link.png").symlink_to("link.png"),
        "",
        f"data/class 1/link.png {NO_FILE}",
    ),
    "a link to a folder": (
        lambda data: (data / "class 1" / "up").symlink_to(".."),
        "",
        f"data/class 1 holds the folder up where images should be, expected {IMAGES}",
    ),
    "a device": (
        lambda data: (data / "class 1" / "zero.png").symlink_to("/dev/zero"),
        "",
        f"data/class 1/zero.png {NO_FILE}",
    ),
    "a pipe": (
        lambda data: os.mkfifo(data / "class 1" / "pipe.png"),
        "",
        f"data/class 1/pipe.png {NO_FILE}",
    ),
    "an empty class": (
        lambda data: (data / "class 9").mkdir(),
        "",
        "data/class 9 is empty, expected the images of a class",
    ),
    "an empty class after skipping": (
        write("class 9/0.png"),
        "--unreadable skip",
        "data/class 9 holds no picture that can be read: remove the folder",
    ),
    "one picture in two splits": (
        twice,
        "",
        "data/train/class 1/2.png and data/test/class 4/again.png are the same picture in two "
        "splits (1 such in all), so that a model would be judged on what it was trained on: remove "
        "one of each, or keep them (duplicates='keep', --duplicates keep)",
    ),
    "one class in two splits": (
        class_in_both,
        "",
        "data holds the class class 1 in two splits, expected every class in one: keep all class "
        "folders in one folder and pass that, to have whole classes dealt out",
    ),
    "too few classes": (
        only(3),
        "",
        "data holds too few class folders (class 0, class 1, class 2), expected at least 4: two to "
        "train on and two others to test on",
    ),
    "too few pictures": (
        lambda data: next((data / "class 1").iterdir()).unlink(),
        "--queries 4",
        "train split: the class class 1 has 2 pictures, but shots=1 plus queries=4 are asked of "
        "every class; ask for fewer, or leave that class out",
    ),
}


@pytest.mark.parametrize(("change", "words", "message"), PICTURES.values(), ids=PICTURES)
def test_pictures_are_refused(tmp_path, monkeypatch, change, words, message):
    monkeypatch.chdir(tmp_path)
    paint_classes(Path("data"), 6)
    change(Path("data"))
    small = "--size 8 --train-ways 2 --ways 2 --queries 2 --out run"
    run = call("train", "folder", "--path", "data", *small.split(), *words.split())
    said = [line for line in run.err.splitlines() if "left out" not in line]
    assert (run.code, run.out, said) == (2, "", [f"fomaml-jax: {message}"])
    assert not Path("run").exists()


def test_more_pictures_than_memory_are_refused(tmp_path):
    data = paint_classes(tmp_path / "data", 6)
    run = call("train", "folder", "--path", data, "--size", "9999999", "--out", tmp_path / "run")
    assert run.code == 2
    assert re.fullmatch(
        r"fomaml-jax: pictures of 9999999 x 9999999 x 3 bytes, for every class as many as the "
        r"largest of its split has, need 5399999 GB, and there are \d+: pass a smaller size, or "
        r"keep fewer pictures of large classes \(in class \d there are 3\)\n",
        run.err,
    )


# Refusals: of a disk on which no more than so many bytes of a file can be written.


@contextlib.contextmanager
def files_of_at_most(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


TRAIN = ("train", "sinusoid", *TINY, "--eval-steps", "2", "--checkpoint-every", "1")


@pytest.mark.parametrize(
    "size", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (100, 2_000)), 25_000]
)
def test_a_full_disk_loses_nothing(size, sinusoid, tmp_path):
    with files_of_at_most(size):
        stopped = call(*TRAIN, "--out", tmp_path / "run")
    assert (stopped.code, stopped.out) == (2, "")
    line = stopped.err.splitlines()[-1]
    assert "Traceback" not in stopped.err
    begun = (tmp_path / "run" / "config.json").exists()
    folder = tmp_path / "run"
    said = rf"(File too large|cannot write the checkpoint {folder}/checkpoints/\S+: .*)"
    remedy = f"; go on with: fomaml-jax train --resume {folder}" if begun else ""
    assert re.fullmatch(rf"fomaml-jax: cannot write to {folder}: {said}{remedy}", line), line
    again = (
        call("train", "--resume", tmp_path / "run")
        if begun
        else call(*TRAIN, "--out", tmp_path / "run")
    )
    assert again.code == 0, again.err
    assert rows_of(again.out) == rows_of(sinusoid.out)


def test_a_disk_too_full_for_a_checkpoint_is_seen_before_it_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    folder = tmp_path / "run"
    run = call(*TRAIN, "--out", folder)
    assert (run.code, run.out) == (2, "")
    assert re.fullmatch(
        rf"fomaml-jax: cannot write to {folder}: cannot write the checkpoint "
        rf"{folder}/checkpoints/\.0000000001: the disk is full, 1,0\d\d,\d\d\d bytes are needed; "
        rf"go on with: fomaml-jax train --resume {folder}",
        run.err.splitlines()[-1],
    )


# Refusals: of a run that something happened to.


def write_config(**changes):
    def write(run):
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | changes))

    return write


def cut_parameters(run):
    path = run / "parameters.npz"
    path.write_bytes(path.read_bytes()[:-30])


SPOILED = {
    "configuration is no JSON": (
        lambda run: (run / "config.json").write_text("{steps"),
        r"run/config.json is not JSON: Expecting property name .*",
    ),
    "configuration is no object": (
        lambda run: (run / "config.json").write_text("3"),
        r"run/config.json is not a run's configuration: expected an object",
    ),
    "configuration names no data set": (
        write_config(dataset="mnist"),
        "the configuration names none of the data sets glyphs, omniglot, sinusoid, folder, table",
    ),
    "configuration of another version": (
        write_config(zeal=1),
        "the configuration's options differ from this version's: zeal",
    ),
    "numbers made impossible": (write_config(ways=-3), f"--ways {COUNT} 2, got -3"),
    "parameters of another shape": (
        write_config(width=5),
        r"run/parameters.npz does not fit its configuration: \['params'\]\['body'\]\['bias'\] "
        r"should be float32\[5\], found float32\[4\]",
    ),
    "parameters cut short": (
        cut_parameters,
        r"cannot read the parameters in run/parameters.npz: File is not a zip file",
    ),
    "parameters missing": (
        lambda run: (run / "parameters.npz").unlink(),
        r"cannot read the parameters in run/parameters.npz: .*No such file or directory.*",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_a_spoiled_run_is_refused(scene, spoil, message):
    spoil(scene / "run")
    run = call("evaluate", "run")
    assert (run.code, run.out) == (2, "")
    assert re.fullmatch(f"fomaml-jax: {message}\n", run.err)
