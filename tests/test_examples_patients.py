"""The examples of patients: their models against closed forms, and a short run of each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_a_concentration_is_the_solution_of_the_compartments_equations():
    """Three in parallel, `c_j' = gain_j rate - constant_j c_j`, integrated by scipy."""
    import pharmacokinetics

    gains, constants = np.array([0.2, 0.05, 0.002]), np.array([0.9, 0.2, 0.01])
    rate, end, minutes = 200.0, 10.0, np.array([0.5, 4.0, 9.9, 10.1, 15.0, 60.0])

    def slope(t, c):
        return gains * rate * (t < end) - constants * c

    during = scipy.integrate.solve_ivp(slope, (0, end), np.zeros(3), rtol=1e-9, dense_output=True)
    after = scipy.integrate.solve_ivp(
        slope, (end, 60), during.y[:, -1], rtol=1e-9, dense_output=True
    )
    expected = [(during if t < end else after).sol(t).sum() for t in minutes]
    params = pharmacokinetics.first_params(jax.random.key(0)) | {
        "base": jnp.log(jnp.array([*gains, *constants])),
    }
    x = np.stack([[t, np.log(rate), end, 0, 0, 0, 0, 0] for t in minutes]).astype(np.float32)
    with jax.numpy_rank_promotion("allow"):
        found = np.exp(pharmacokinetics.log_concentration(params, jnp.asarray(x)))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_score_is_a_level_and_a_drift():
    import patients

    params = patients.first_params(jax.random.key(0)) | {
        "level": jnp.float32(2.0),
        "drift": jnp.float32(0.1),
        "directions": jnp.diag(jnp.array([0.3, 0.1])),
        "patient": jnp.array([1.0, -1.0]),
    }
    x = np.zeros((3, 19), np.float32)
    x[:, 0] = [0.0, 1.0, 2.0]
    # 10 (2 + 0.3) at first, and 10 (0.1 - 0.1) a hundred days.
    np.testing.assert_allclose(patients.score(params, jnp.asarray(x)), [23, 23, 23], rtol=1e-6)


def test_a_patient_counts_once_however_often_he_is_unseen():
    import patient_reports

    unseen = np.array([[0, 1], [0, 2], [0, 1]])
    ours = np.array([[1.0, 4.0], [3.0, 7.0], [2.0, 6.0]])  # means of patients: 2, 5, 7
    theirs = ours + np.array([[1.0, 2.0], [1.0, 3.0], [1.0, 2.0]])
    found = patient_reports.summary({"ours": ours, "theirs": theirs}, unseen, ("a", "b", "c"))
    models = found["models"]
    assert models["ours"]["mean"] == pytest.approx(14 / 3)
    apart = np.array([1.0, 2.0, 3.0])
    difference = models["theirs"]["ours_minus_this"]
    assert difference["mean"] == pytest.approx(-apart.mean())
    assert difference["ci95"] == pytest.approx(1.96 * apart.std(ddof=1) / np.sqrt(3))


def test_offsets_remove_what_a_patient_differs_in():
    """Scores that are a line and an offset of the patient are predicted without error."""
    import patient_baselines

    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 8, 2))
    y = x @ [1.0, -2.0] + 2 * rng.normal(size=(60, 1))
    counts = np.array([8, 6] * 30)
    orders = rng.permutation(60)[None]
    found = patient_baselines.of_tables(
        x, y, counts, orders[:, :50], orders[:, 50:], 3, second_order=False, boosted=False
    )
    truth, real = y[orders[:, 50:]], counts[orders[:, 50:]]
    errors = {n: patient_baselines.later_error(truth, p, real, 3).mean() for n, p in found.items()}
    assert errors["ridge, offset"] < 0.3 < errors["ridge"]
    own = truth[..., :3].mean(-1, keepdims=True)
    expected = patient_baselines.later_error(truth, own, real, 3).mean()
    assert errors["patient's own mean"] == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pharmacokinetics", "patients"])
def test_a_short_run(name, tmp_path):
    data = Path(os.environ.get("FOMAML_JAX_DATA", "/nowhere"))
    if not (data / "parkinsons").is_dir() or not (data / "remifentanil").is_dir():
        pytest.skip("needs $FOMAML_JAX_DATA with the tables of patients")
    words = ("--splits", "2", "--seeds", "2", "--steps", "10", "--out", tmp_path)
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *words],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    models = json.loads((tmp_path / f"{name}.json").read_text())["models"]
    assert models["meta-learned"]["mean"] < models["population model, not adapted"]["mean"]
    assert {"patient's own mean", "ridge, shrunk offset"} < models.keys()
    assert all(0 < model["mean"] < np.inf for model in models.values())
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_without_data_it_says_so_in_a_line(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "patients.py", "--data", tmp_path],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2
    assert "must be a folder that holds parkinsons/parkinsons_updrs.csv" in done.stderr
