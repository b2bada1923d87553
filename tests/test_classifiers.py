"""Trained classifiers in Python: the same numbers as a run's, for pictures in memory."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import call
from problems import assert_close
from test_problems import CHOSEN, SIZE, WAYS, build, sample

import fomaml_jax as fj
from fomaml_jax import classifiers, options, problems, recipes, runs

KEY = jax.random.key(0)
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def ready():
    return fj.load_classifier("pretrained:omniglot")


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (6, 28, 28, 1), np.uint8)


@pytest.mark.parametrize("head", ["zero", "learned"])
@pytest.mark.parametrize("learned_rates", [False, True])
def test_a_classifier_does_what_its_problem_does(head, learned_rates):
    chosen = dataclasses.replace(CHOSEN, head=head, learned_rates=learned_rates, inner_steps=2)
    built = build(chosen)
    task = sample(built.test)
    classifier = fj.Classifier(chosen, built.params, (SIZE, SIZE, 1))
    expected = jax.jit(problems.adapt_path(built, 2))(built.params, task.support)
    adapted = jax.jit(functools.partial(classifier.adapt, ways=WAYS))(task.support)
    assert_close(adapted, jax.tree.map(lambda x: x[-1], expected), 1e-5)
    x, _ = task.query
    logits = jax.jit(classifier.predict)(adapted, x)
    np.testing.assert_allclose(logits, jax.jit(built.predict)(adapted, x), rtol=1e-5)
    assert_close(classifier.adapt(task.support, steps=0), built.start(built.params, None), 0)


def test_balanced_cross_entropy_is_the_mean_over_classes_of_their_means():
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(6, 4)).astype(np.float32), np.array([2, 0, 0, 1, 0, 1])
    each = -np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[np.arange(6), y]
    found = classifiers.cross_entropy(lambda params, x: x, balanced=True)(None, (logits, y))
    expected = np.mean([each[y == label].mean() for label in (0, 1, 2)])  # there is none of 3
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    found = classifiers.cross_entropy(lambda params, x: x)(None, (logits, y))
    np.testing.assert_allclose(found, each.mean(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float64])
def test_a_mask_of_any_dtype_leaves_pictures_out(ready, pictures, dtype):
    """Added up in booleans the pictures of a class would be one."""
    labels = np.array([0, 0, 0, 0, 1, 1])
    more, weights = np.concatenate([pictures, pictures[:1]]), np.array([1] * 6 + [0], dtype)
    adapt = jax.jit(lambda x, y, weights: ready.adapt((x, y), ways=2, weights=weights))
    found = adapt(more, np.append(labels, 1), weights)
    assert_close(found, adapt(pictures, labels, None), 1e-4)


def test_pictures_of_a_class_are_counted_in_more_than_8_bits():
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(257, 2)).astype(np.float32), np.array([0] * 256 + [1])
    loss = classifiers.cross_entropy(lambda params, x: x.pictures, balanced=True)
    few, many = (
        loss(None, (classifiers.Weighted(logits, jnp.ones(257, dtype)), jnp.asarray(y)))
        for dtype in (jnp.uint8, jnp.float32)
    )
    np.testing.assert_allclose(few, many, rtol=1e-6)


def test_a_classifier_can_be_loaded_in_double_precision():
    with jax.enable_x64(True):
        loaded = fj.load_classifier("pretrained:omniglot")
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("weights", [np.zeros(6), -np.ones(6), np.full(6, np.nan)])
def test_weights_that_leave_nothing_to_learn_from_are_refused(ready, pictures, weights):
    with pytest.raises(ValueError, match=r"^weights must be at least 0, finite, and some of them"):
        ready.adapt((pictures, np.arange(6)), weights=weights)


def test_pictures_of_other_integers_are_refused(ready, pictures):
    with pytest.raises(
        TypeError, match=r"^pictures must be uint8, or floats in \[0, 1\], got int32"
    ):
        ready.adapt(((255 * pictures).astype(np.int32), np.arange(6)))


def test_a_class_with_more_pictures_gets_no_greater_bias(ready, pictures):
    """From a head of zeros the gradient of a bias is 1 / ways less the share of its class."""
    labels = np.array([0, 0, 0, 0, 1, 2])
    head = ready.adapt((pictures, labels))["params"]["head"]
    np.testing.assert_allclose(head["bias"], 0, atol=1e-6)
    assert np.abs(head["kernel"]).max() > 0.01


@pytest.mark.parametrize("chosen", [CHOSEN, dataclasses.replace(CHOSEN, head="learned")])
def test_what_a_run_leaves_can_be_loaded_without_its_data(chosen, tmp_path):
    params = classifiers.initial_params(chosen, WAYS, (28, 28, 1))
    shared = classifiers.shared_of(chosen, jax.tree.map(lambda x: x + 1.0, params))
    runs.write_json(tmp_path / runs.CONFIG, options.to_json(chosen))
    runs.save_parameters(tmp_path, shared)
    loaded = fj.load_classifier(tmp_path)
    assert loaded.chosen == chosen
    assert_close(loaded.params, shared, 0)


@pytest.mark.parametrize("ways", [2, 6])
def test_one_network_serves_any_number_of_classes(ready, pictures, ways):
    labels = np.arange(6) % ways
    adapted = jax.jit(lambda x, y: ready.adapt((x, y), ways=ways))(pictures, labels)
    logits = jax.jit(ready.predict)(adapted, pictures)
    assert logits.shape == (6, ways)
    if ways == 6:  # pictures that it was shown
        np.testing.assert_array_equal(logits.argmax(-1), labels)


def test_bytes_are_grey_levels_and_queries_may_be_alone(ready, pictures):
    support = pictures / np.float32(255), np.arange(6)
    adapted = jax.jit(lambda s: ready.adapt(s, ways=6))(support)
    predict = jax.jit(ready.predict)
    np.testing.assert_allclose(
        predict(adapted, support[0]), predict(adapted, pictures), rtol=1e-4, atol=1e-4
    )
    beside = fj.batch_statistics.Beside(pictures, pictures[:2])
    alone = predict(adapted, beside)
    for k in range(2):  # whatever else is asked
        one = fj.batch_statistics.Beside(pictures, pictures[k : k + 1])
        np.testing.assert_allclose(alone[k], predict(adapted, one)[0], rtol=1e-4, atol=1e-4)


def test_the_readmes_lines(pictures):
    readme = (RESULTS.parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```py\n(.*?)```", readme, re.DOTALL)
    names = {"fj": fj, "images": pictures, "labels": np.arange(6) % 5, "more_images": pictures[:2]}
    exec(code, names)
    assert names["logits"].shape == (2, 5)


def test_many_tasks_at_once(ready, pictures):
    tasks = jnp.stack([pictures, pictures[::-1]])
    adapted = jax.jit(jax.vmap(lambda x: ready.adapt((x, jnp.arange(6)), ways=6)))(tasks)
    logits = jax.jit(jax.vmap(ready.predict))(adapted, tasks)
    np.testing.assert_array_equal(logits.argmax(-1), np.tile(np.arange(6), (2, 1)))


def test_refusals(ready, pictures, tmp_path):
    with pytest.raises(ValueError, match=r"^pictures must be \[n, 28, 28, 1\], got \[6, 28, 28\]$"):
        ready.adapt((pictures[..., 0], np.arange(6)), ways=6)
    learned = fj.Classifier(dataclasses.replace(CHOSEN, head="learned"), {}, (28, 28, 1))
    refused = {
        r"ways must be an integer of at least 1, got 0": (ready, np.arange(6), 0),
        r"labels must be from 0 to 4 for 5 ways, got 0 to 5": (ready, np.arange(6), 5),
        r"labels must be from 0 to 5 for 6 ways, got -1 to 4": (ready, np.arange(6) - 1, 6),
        r"labels must be \[6\], one a picture, got \[5\]": (ready, np.arange(5), 6),
        r"the head is learned for 3 ways, got 4": (learned, np.arange(6), 4),
        r"labels must be from 0 to 2 for 3 ways, got 0 to 5": (learned, np.arange(6), None),
    }
    for message, (classifier, labels, ways) in refused.items():
        with pytest.raises(ValueError, match=f"^{message}$"):
            classifier.adapt((pictures, labels), ways=ways)
    with pytest.raises(ValueError, match=r"^weights must be \[6\], one a picture, got \[5\]$"):
        ready.adapt((pictures, np.arange(6)), weights=np.ones(5))
    with pytest.raises(ValueError, match=r"^there are no pictures to adapt to"):
        ready.adapt((pictures[:0], np.arange(0)))
    with pytest.raises(TypeError, match=r"^labels must be integers, got float32$"):
        ready.adapt((pictures, np.ones(6, np.float32)))
    with pytest.raises(TypeError, match=r"^labels are traced: pass ways, the number of classes"):
        jax.eval_shape(lambda y: ready.adapt((pictures, y)), np.arange(6))
    message = "there is no pretrained:zeal; there are pretrained:omniglot"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fj.load_classifier("pretrained:zeal")
    runs.write_json(tmp_path / runs.CONFIG, options.to_json(options.Sinusoid()))
    with pytest.raises(ValueError, match=r"is a run of sinusoid, which has no classes$"):
        fj.load_classifier(tmp_path)
    refused = call("evaluate", "pretrained:zeal")
    assert (refused.code, refused.err) == (2, f"fomaml-jax: {message}\n")


def test_the_network_that_comes_along_is_small_and_says_what_it_is():
    folder = classifiers.READY / "omniglot"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1e6
    card = (folder / "MODEL.md").read_text()
    ready = fj.load_classifier("pretrained:omniglot")
    count = sum(x.size for x in jax.tree.leaves(ready.params))
    assert f"{count:,} parameters" in card
    trained = options.identity(dataclasses.replace(ready.chosen, ways=20, shots=1))
    recipe = options.identity(dataclasses.replace(recipes.best(20, 1), recipe="best"))
    judged = ("eval_tasks", "eval_steps")
    for name in judged:
        del trained[name], recipe[name]
    assert trained == recipe


@pytest.mark.slow
@pytest.mark.usefixtures("omniglot_folder", "standard_promotion")
def test_its_accuracy_is_within_the_interval_that_was_committed():
    """The number in the README, from other tasks of the same distribution."""
    rows = json.loads((RESULTS / "accuracy-cpu.json").read_text())["rows"]
    (row,) = [
        row for row in rows if (row["recipe"], row["setting"], row["seed"]) == ("best", "5w1s", 0)
    ]
    words = ("--ways", "5", "--shots", "1", "--eval-tasks", "400", "--seed", "7")
    steps = str(row["inner_steps"])
    found = call("evaluate", "pretrained:omniglot", *words, "--eval-steps", steps)
    assert found.code == 0, found.err
    name = f"after {steps} step{'s' * (steps != '1')}"
    (accuracy,) = map(float, re.findall(rf"^  {name} +([\d.]+) %", found.out, re.MULTILINE))
    committed = row["transductive"]
    spread = np.sqrt(committed["variance"] * (1 / 400 + 1 / committed["tasks"]))
    assert abs(accuracy / 100 - committed["mean"]) < 3 * spread


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (lambda x: 255 * x, r"got floats up to 2\d\d.*; divide them by their white, 255"),
        (lambda x: np.where(x > 0.9, np.nan, x), "pictures hold pixels that are not finite"),
        (lambda x: np.where(x > 0.9, -np.inf, x), "pictures hold pixels that are not finite"),
    ],
)
def test_pictures_that_nobody_has_brought_to_one_are_refused(ready, pictures, spoilt, message):
    plain = pictures / np.float32(255)
    wrong, adapted = spoilt(plain), ready.adapt((plain, np.arange(6)))
    for use in (
        lambda: ready.adapt((wrong, np.arange(6))),
        lambda: ready.predict(adapted, wrong),
        lambda: fj.adapt_classifier(ready, (wrong, np.arange(6))),
    ):
        with pytest.raises(ValueError, match=message):
            use()
