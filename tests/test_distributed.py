"""On any number of devices and processes the same numbers; a lost process loses no step."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import paint_classes
from problems import every

SCALE = Path(__file__).with_name("scale.py")
QUIET = os.environ | {"PYTHONWARNINGS": "ignore"}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(words, **environment):
    pipe = subprocess.PIPE
    process = [sys.executable, *map(str, words)]
    return subprocess.Popen(
        process, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=QUIET | environment
    )


def ended(process, timeout=200):
    said, _ = process.communicate(timeout=timeout)
    return process.returncode, said


def scaled(out, devices, processes=1):
    """What `scale.py` found on so many devices a process."""
    port = free_port()
    joined = [[processes, i, port] if processes > 1 else [] for i in range(processes)]
    started = [start([SCALE, out, devices, *words]) for words in joined]
    for process in started:
        code, said = ended(process)
        assert code == 0, said
    with np.load(out) as found:
        return dict(found)


@pytest.mark.slow
def test_devices_and_processes_change_no_number(tmp_path):
    found = scaled(tmp_path / "one.npz", 8) | {
        f"{name}, two processes": value
        for name, value in scaled(tmp_path / "two.npz", 2, processes=2).items()
    }
    program = str(found.pop("sharded program"))
    assert len(found) == 5 * 11 + 2
    for name, value in found.items():
        kind, _, mesh = name.partition(" on ")
        if not kind.endswith("sent"):
            np.testing.assert_allclose(value, found[f"{kind} on 1"], rtol=1e-6, atol=1e-12)
        elif mesh != "1":  # one all-reduce for each of two dtypes, and nothing else
            np.testing.assert_array_equal(value, [2, 0, 0, 0, 0])
    # Of a quarter of the parameters on each device, that is all that a device ever holds.
    assert not re.search(r"all-gather|all-to-all|f64\[(16,4096|4096,16|131072)\]", program)
    assert "f64[16,1024]" in program


# The command line in several processes.

WORDS = "sinusoid --tasks-per-step 4 --steps 300 --eval-tasks 6 --eval-steps 2 --inner-steps 2"


def launched(*words, devices=2, processes=2):
    """The processes of one run, told to find each other."""
    port, started = free_port(), []
    for i in range(processes):
        join = ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--processes", processes]
        train = ["-m", "fomaml_jax", "train", *words, *join, "--process", i, "--lost-after", 10]
        started.append(start(train, JAX_NUM_CPU_DEVICES=str(devices)))
    return started


def numbers_of(folder):
    with np.load(folder / "parameters.npz") as parameters:
        flat = np.concatenate([array.ravel() for array in parameters.values()])
    return flat, (folder / "metrics.jsonl").read_bytes(), np.load(folder / "per_task.npy")


def has_checkpoints(folder, count):
    return len([p for p in folder.glob("checkpoints/*") if p.name.isdigit()]) >= count


def uninterrupted(folder):
    first, second = (ended(process) for process in launched(*WORDS.split(), "--out", folder))
    assert first[0] == second[0] == 0, first[1] + second[1]
    assert "after 2 steps" in first[1]
    assert "after 2 steps" not in second[1]
    assert (folder / "learning_curve.png").exists()
    return numbers_of(folder)


@pytest.mark.slow
def test_a_lost_process_ends_the_others_and_the_run_goes_on(tmp_path):
    """On as many processes and devices, to the same bits; on others, to the same but for sums."""
    expected, folder = uninterrupted(tmp_path / "whole"), tmp_path / "cut"
    victim, other = launched(*WORDS.split(), "--out", folder, "--checkpoint-every", "10")
    while not has_checkpoints(folder, 2):
        assert victim.poll() is other.poll() is None
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    lost = time.monotonic()
    code, said = ended(other, 60)
    assert time.monotonic() - lost < 40
    assert code in (4, -signal.SIGABRT), said
    assert "lost" in said or "another task died" in said
    victim.communicate()
    assert not (folder / "result.json").exists()
    for processes, devices in [(2, 2), (1, 4), (4, 1)]:
        again = shutil.copytree(folder, tmp_path / f"{processes} x {devices}")
        resumed = launched("--resume", again, devices=devices, processes=processes)
        for code, said in map(ended, resumed):
            assert code == 0, said
        found, same = numbers_of(again), processes == 2
        for one, array in zip(found[::2], expected[::2], strict=True):
            close = {"rtol": 0, "atol": 0} if same else {"rtol": 1e-3, "atol": 1e-4}
            np.testing.assert_allclose(one, array, **close)
        assert found[1] == expected[1] or not same


REFUSED = {
    "train --coordinator here:1": "--coordinator goes with --distributed",
    "train --lost-after 5": "--lost-after goes with --distributed",
    "train --distributed --processes two": "--processes must be a number of at least 1, got 'two'",
    "train --distributed --lost-after 0": "--lost-after must be a number of at least 1, got '0'",
    "train --distributed --process": "--process needs the number of this one",
    "train --distributed": "--distributed needs --out, a folder that all processes see",
    "train --distributed --tune --out run": "--tune measures one process; leave it out with "
    "--distributed",
}


@every("line", {line: line for line in REFUSED}, "train --lost-after 5", "train --distributed")
def test_what_several_processes_cannot_do_is_refused(line):
    code, said = ended(start(["-m", "fomaml_jax", *line.split()]))
    assert (code, said) == (2, f"fomaml-jax: {REFUSED[line]}\n")


@pytest.mark.slow
def test_processes_that_were_not_started_alike_are_refused(tmp_path):
    port, started = free_port(), []
    for i, rate in enumerate(("0.01", "0.02")):
        join = ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--processes", 2]
        words = [*WORDS.split(), "--inner-rate", rate, "--out", tmp_path / "run"]
        train = ["-m", "fomaml_jax", "train", *words, *join, "--process", i, "--lost-after", 10]
        started.append(start(train, JAX_NUM_CPU_DEVICES="1"))
    ends = [ended(process) for process in started]
    assert all(code != 0 for code, _ in ends)
    assert any(code == 2 and "were not started alike; give all" in said for code, said in ends)
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
def test_a_process_that_is_terminated_while_judging_ends_the_others_too(tmp_path):
    words = [*WORDS.split(), "--eval-tasks", "200000", "--steps", "3", "--out", tmp_path / "run"]
    victim, other = launched(*words)[::-1]
    while not has_checkpoints(tmp_path / "run", 1):
        assert victim.poll() is other.poll() is None
        time.sleep(0.1)
    time.sleep(3)
    assert victim.poll() is other.poll() is None
    victim.send_signal(signal.SIGTERM)
    began = time.monotonic()
    for process in (victim, other):
        ended(process, 60)
    assert time.monotonic() - began < 40


@pytest.mark.slow
def test_tasks_that_do_not_divide_among_all_devices_are_refused(tmp_path):
    words = ("sinusoid", "--tasks-per-step", "6", "--out", tmp_path / "run")
    (first, said), (second, nothing) = map(ended, launched(*words))
    assert (first, second) == (2, 2)
    assert "6 tasks do not divide among the 4 devices of the mesh; pass 4 or 8" in said
    assert "fomaml-jax: " not in nothing
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_pictures_and_their_baselines_on_devices_that_do_not_divide_the_baselines_tasks(tmp_path):
    """Joint pre-training takes 4 tasks a step, and here are 6 devices."""
    small = "--steps 2 --tasks-per-step 6 --eval-tasks 4 --width 4 --inner-steps 1 --size 8"
    data = paint_classes(tmp_path / "data", 6)
    classes = ("--queries", "2", "--train-ways", "2", "--ways", "2")
    words = ("folder", "--path", data, *small.split(), *classes, "--out", tmp_path / "run")
    for code, said in map(ended, launched(*words, devices=3)):
        assert code == 0, said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "joint pre-training, fine-tuned" in result["baselines"]
