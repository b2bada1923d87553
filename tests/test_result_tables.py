"""A result as people read it: its rows, and what should be seen first."""

import pytest

from fomaml_jax.commands.tables import table


def result(metric="accuracy", before=(0.2, 0.01), after=(0.9, 0.01), tasks=100, **baselines):
    rows = [{"inner_steps": n, "mean": m, "ci95": c} for n, (m, c) in enumerate((before, after))]
    return {
        "metric": metric,
        "num_tasks": tasks,
        "statistics": None,
        "otherwise": {},
        "per_step": rows,
        "mean": after[0],
        "ci95": after[1],
        "baselines": {name: {"mean": m, "ci95": c} for name, (m, c) in baselines.items()},
    }


def last_lines(found):
    return table(found).split("± is a 95 % interval over tasks")[1].splitlines()


@pytest.mark.parametrize(
    ("mean", "ci95", "said"),
    [(12.3456, 0.5, "12.346 ± 0.500"), (2.36e-4, 3e-6, "0.000236 ± 0.000003"), (0, 0, "0.000")],
)
def test_small_errors_are_told_in_three_digits(mean, ci95, said):
    assert said in table(result("mean squared error", (mean, ci95), (mean, ci95)))


def test_few_tasks_are_called_few():
    assert last_lines(result(tasks=15)) == []
    (few,) = last_lines(result(tasks=2))
    assert few == ", too narrow for so few as 2, of which little can be said"


@pytest.mark.parametrize("metric", ["accuracy", "mean squared error"])
def test_what_is_better_than_adaptation_is_named(metric):
    good, bad = ((0.9, 0.01), (0.8, 0.02)) if metric == "accuracy" else ((0.1, 0.02), (0.2, 0.01))
    near = (good[0] + bad[0]) / 2, 0.05  # by its interval not to be told from either
    assert last_lines(result(metric, before=bad, after=good, mine=near, theirs=bad)) == []
    found = last_lines(result(metric, before=bad, after=bad, mine=near, theirs=good))
    assert found == ["", "better than this here: theirs"]
    found = last_lines(result(metric, before=good, after=bad))
    assert found == ["", "adaptation makes it worse here: lower --inner-rate, or train for longer"]


def test_what_is_not_finite_is_better_than_nothing_and_worse_than_nothing():
    assert last_lines(result(before=(None, None), after=(0.5, 0.1), nan=(None, None))) == []
    assert last_lines(result(before=(0.9, 0.0), after=(None, None), other=(0.9, 0.0))) == []
