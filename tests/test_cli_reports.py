"""`fomaml-jax report`: one page, and its pictures."""

import shutil

import pytest
from command_line import TINY, call, is_picture, trained

pytestmark = pytest.mark.usefixtures("small_world")


def test_a_report_is_one_page_and_its_pictures(sinusoid, tmp_path):
    other = trained(tmp_path / "a <b> & c", "sinusoid", *TINY, "--eval-steps", "1", "--rate", "0.1")
    made = call("report", sinusoid.folder, other.folder, "--out", tmp_path / "out")
    assert (made.code, made.err) == (0, "")
    names = {"report.html", "learning_curves.png", "accuracy_per_step.png", "tasks.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 3
    assert "http" not in text
    assert "a &lt;b&gt; &amp; c" in text
    assert "<td>rate</td><td>0.001</td><td>0.1</td>" in text
    assert "<td>seed</td>" not in text  # the same in both
    assert "<td>overwrite</td>" not in text  # no property of a run
    assert f"{other.result['mean']:.3f} ± {other.result['ci95']:.3f}" in text
    judged_on = sinusoid.result["num_tasks"]
    assert f"interval over tasks, too narrow for so few as {judged_on}," in text
    for name in names - {"report.html"}:
        assert is_picture(tmp_path / "out" / name)


def test_a_report_of_the_folder_where_one_stands(sinusoid, tmp_path, monkeypatch):
    monkeypatch.chdir(sinusoid.folder)
    assert call("report", ".", "--out", tmp_path).code == 0
    title = f"<title>{sinusoid.folder.name}</title>"
    assert title in (tmp_path / "report.html").read_text()


def test_a_name_that_the_font_has_not(sinusoid, tmp_path):
    made = call(
        "report", shutil.copytree(sinusoid.folder, tmp_path / "字"), "--out", tmp_path / "out"
    )
    assert made.code == 0
    assert all(line.startswith("fomaml-jax: ") for line in made.err.splitlines())


def test_a_report_of_an_unfinished_run(glyphs, tmp_path):
    folder = shutil.copytree(glyphs.folder, tmp_path / "run")
    for name in ("result.json", "per_task.npy"):
        (folder / name).unlink()
    made = call("report", folder, "--out", tmp_path / "out")
    assert made.code == 0
    assert "not finished" in (tmp_path / "out" / "report.html").read_text()
    (folder / "metrics.jsonl").write_text("{\n")
    refused = call("report", folder, "--out", tmp_path / "out")
    assert refused.code == 2
    assert "metrics.jsonl is damaged" in refused.err


def test_runs_of_different_metrics_are_no_report(glyphs, sinusoid, tmp_path):
    refused = call("report", glyphs.folder, sinusoid.folder, "--out", tmp_path / "out")
    assert refused.code == 2
    assert "runs of different metrics in one report: accuracy, mean squared error" in refused.err
    assert not (tmp_path / "out").exists()
