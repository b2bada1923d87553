"""Recipes known by name: what the papers say, and that what is given goes over it."""

import dataclasses
import json

import jax
import pytest
from command_line import TINY, call
from problems import assert_close
from test_problems import build, noise

from fomaml_jax import baselines, datasets, option_checks, options, problems, recipes
from fomaml_jax.datasets import Splits

PAPER = {  # steps of adaptation, their rate, tasks a step: appendix A.1 of the MAML paper, where
    # the rate of twenty ways is 0.1 (`recipes.paper` says why not here)
    (5, 1): (1, 0.4, 32),
    (5, 5): (1, 0.4, 32),
    (20, 1): (5, 0.4, 16),
    (20, 5): (5, 0.4, 16),
}


@pytest.mark.parametrize(("ways", "shots"), PAPER)
def test_the_papers_recipe(ways, shots):
    found = recipes.paper(ways, shots)
    assert (found.inner_steps, found.inner_rate, found.tasks_per_step) == PAPER[ways, shots]
    assert found.head_rate * ways == pytest.approx(found.inner_rate)  # one rate for all layers
    assert (found.width, found.pooling, found.head) == (64, "stride", "learned")
    assert found.queries == found.train_shots == found.shots == shots
    assert (found.steps, found.rate, found.schedule) == (60_000, 1e-3, "constant")


@pytest.mark.parametrize("name", ["quick", "paper", "best"])
@pytest.mark.parametrize(("ways", "shots"), PAPER)
def test_every_recipe_is_of_the_tasks_asked_for(name, ways, shots):
    found = recipes.omniglot(options.Omniglot(recipe=name, ways=ways, shots=shots))
    option_checks.check(found)
    assert (found.recipe, found.ways, found.shots) == (name, ways, shots)


def test_the_best_recipe_trains_the_same_network_whatever_is_asked_for():
    one, other = recipes.best(5, 1), recipes.best(20, 5)
    assert dataclasses.replace(one, ways=20, shots=5) == other


def test_what_is_given_goes_over_what_a_recipe_says(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(problems, "build", lambda chosen: asked.append(chosen) or 1 / 0)
    words = ("--recipe", "paper", "--ways", "20", "--inner-rate", "0.3", "--width", "8")
    assert call("train", "omniglot", *words, "--out", tmp_path / "run").code == 1
    (chosen,) = asked
    expected = dataclasses.replace(
        recipes.paper(20, 1), recipe="paper", inner_rate=0.3, width=8, out=tmp_path / "run"
    )
    assert chosen == expected


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["paper", "best"])
def test_a_run_of_each_recipe(recipe, tmp_path, monkeypatch, standard_promotion):
    splits = Splits(noise(9, seed=0), noise(7, seed=1), noise(8, seed=2))
    monkeypatch.setattr(datasets, "omniglot", lambda *args, **kwargs: splits)
    words = ("--recipe", recipe, "--ways", "3", "--queries", "2", "--train-ways", "3")
    run = tmp_path / "run"
    trained = call("train", "omniglot", *words, "--width", "4", *TINY, "--out", run)
    assert trained.code == 0, trained.err
    config = json.loads((run / "config.json").read_text())
    assert (config["recipe"], config["learned_rates"]) == (recipe, recipe == "best")
    result = json.loads((run / "result.json").read_text())
    again = call("evaluate", run)
    assert again.code == 0, again.err
    assert f"{100 * result['mean']:.2f}" in again.out
    other = call("evaluate", run, "--ways", "4", "--shots", "2", "--queries", "1")
    if recipe == "paper":
        assert other.code == 2
        assert other.err == "fomaml-jax: --ways: the run's head is learned for 3, got 4\n"
    else:
        assert other.code == 0, other.err
        assert "before adaptation                   25.00 %" in other.out


def test_help_shows_what_the_recipe_says():
    found = call("train", "omniglot", "--recipe", "paper", "--help")
    assert found.code == 0
    assert "(default: 60000)" in found.out


def test_the_baseline_of_the_papers_recipe_sees_turned_characters_too():
    chosen = dataclasses.replace(recipes.paper(3, 1), width=4, steps=2)
    problem, seen = build(chosen), []

    def fit(meta_gradient, tasks, params, optimizer, **kwargs):
        seen.append(params["params"]["head"]["kernel"].shape[-1])
        return jax.tree.map(lambda x: x + 1, params)

    shared = baselines._pretrain_on_classes(chosen, problem, fit)
    assert problem.splits is not None
    assert seen == [4 * len(problem.splits.train.images)]
    for name, layer in shared["params"].items():  # its own head made way for the problem's
        first = problem.params["params"][name]
        added = 0 if name == "head" else 1
        assert_close(layer, jax.tree.map(lambda x, n=added: x + n, first), 1e-6)


def test_what_has_no_classes_is_not_asked_for_ways():
    with pytest.raises(ValueError, match=r"^--queries: sinusoid is judged on a fixed number$"):
        option_checks.check_judged_otherwise(options.Sinusoid(), {"queries": 3})
