"""A classifier of one's own classes: its threshold against a plain loop, and its file."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from few_shot_runs import small_classifier, small_networks, write_run
from problems import assert_close

import fomaml_jax as fj
from fomaml_jax import adapted_files, classifiers, named_arrays, options, runs, thresholds
from fomaml_jax.batch_statistics import Beside
from fomaml_jax.heads import HEAD, with_head, without_head

NETWORK = classifiers.network
predict = jax.jit(fj.AdaptedClassifier.predict, static_argnames="statistics")

NAMES = "ant", "bee", "cat"
LABELS = np.array([0, 1, 2, 0, 1, 0], np.int32)  # three, two and one


@pytest.fixture(scope="module", autouse=True)
def small_world():
    with small_networks():
        yield


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (6, 28, 28, 1), np.uint8)


@pytest.fixture(scope="module")
def classifier(small_world):
    return small_classifier()


def adapt_jitted(classifier, names=NAMES):
    return jax.jit(lambda x, y: fj.adapt_classifier(classifier, (x, y), names=names))


@pytest.fixture(scope="module")
def adapted(classifier, pictures):
    return adapt_jitted(classifier)(pictures, LABELS)


def features(classifier, params, x):
    """What the head sees, by putting the identity in its place."""
    size = params["params"][HEAD]["kernel"].shape[0]
    identity = {"kernel": jnp.eye(size), "bias": jnp.zeros(size)}
    seen = np.asarray(jax.jit(classifier.predict)(with_head(without_head(params), identity), x))
    return seen / np.linalg.norm(seen, axis=1, keepdims=True)


def nearest(classifier, x, y, held_out):
    """The similarity of one picture to the nearest class, adapted to nothing but these."""
    params = jax.jit(functools.partial(classifier.adapt, ways=3))((x, y))
    seen = features(classifier, params, x)
    means = np.stack([seen[y == c].mean(0) for c in np.unique(y)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return (features(classifier, params, Beside(x, held_out[None])) @ means.T).max()


@pytest.mark.slow
def test_the_threshold_is_that_of_a_loop_over_what_is_left_out(classifier, pictures, adapted):
    """Examples really taken away, where the library gives them no weight."""
    strangers = [
        nearest(classifier, pictures[others], LABELS[others], x)
        for x, others in zip(pictures, LABELS[:, None] != LABELS, strict=True)
    ]
    parts = [[0, 1], [3, 4], [5]]  # the only one of its class stays
    relatives = [
        nearest(classifier, np.delete(pictures, part, 0), np.delete(LABELS, part), pictures[i])
        for part in parts
        for i in part
    ]
    found = adapted.calibration
    np.testing.assert_allclose(found.strangers, np.mean(strangers), rtol=1e-4)
    np.testing.assert_allclose(found.held_out, np.mean(relatives), rtol=1e-4)
    np.testing.assert_allclose(found.threshold, np.mean([found.strangers, found.held_out]), 1e-6)


def test_with_one_example_a_class_the_threshold_is_a_share_of_the_way(classifier, pictures):
    found = adapt_jitted(classifier)(pictures[:3], LABELS[:3]).calibration
    assert np.isnan(found.held_out)
    np.testing.assert_allclose(found.threshold, 0.7 * found.strangers + 0.3, rtol=1e-6)


def test_predictions_are_the_classifiers_own(classifier, pictures, adapted):
    params = jax.jit(functools.partial(classifier.adapt, ways=3))((pictures, LABELS))
    logits = jax.jit(classifier.predict)(params, Beside(pictures, pictures[:2]))
    said = predict(adapted, pictures[:2])
    np.testing.assert_allclose(said.probabilities, jax.nn.softmax(logits), rtol=1e-4)
    np.testing.assert_array_equal(said.is_known, said.similarity >= adapted.calibration.threshold)


def test_a_prediction_depends_on_other_queries_only_where_that_is_asked_for(pictures, adapted):
    for statistics, same in (("one-at-a-time", True), ("transductive", False)):
        all_of_them, first = (
            predict(adapted, pictures[:n], statistics=statistics).similarity[0] for n in (6, 1)
        )
        assert np.isclose(all_of_them, first, rtol=1e-4) == same


def test_strangers_are_told_apart_by_the_trained_network(monkeypatch):
    """Crosses, dashes and rings, and noise, which is neither."""
    monkeypatch.setattr(classifiers, "network", NETWORK)
    rng = np.random.default_rng(0)
    shapes = np.zeros((3, 28, 28, 1), np.uint8)
    shapes[0, 12:15, 6:22] = shapes[0, 6:22, 12:15] = shapes[1, 12:15, 6:22] = 255
    shapes[2, 6:22, 6:22] = 255
    shapes[2, 9:19, 9:19] = 0
    moved = np.concatenate([np.roll(shapes, step, (1, 2)) for step in ((0, 1), (1, 0), (1, 1))])
    adapted = adapt_jitted(fj.load_classifier("pretrained:omniglot"))(moved, np.tile(range(3), 3))
    noise = rng.integers(0, 256, shapes.shape, np.uint8)
    said = predict(adapted, np.concatenate([shapes, noise]))
    np.testing.assert_array_equal(said.probabilities[:3].argmax(1), range(3))
    np.testing.assert_array_equal(said.is_known, [True] * 3 + [False] * 3)


def test_a_learned_head_takes_fewer_classes_than_it_has(pictures):
    classifier = small_classifier(head="learned", ways=5)
    adapted = adapt_jitted(classifier)(pictures, LABELS)
    said = predict(adapted, pictures)
    assert said.probabilities.shape == (6, 3)
    np.testing.assert_allclose(said.probabilities.sum(1), 1, rtol=1e-5)
    assert said.similarity.max() <= 1 + 1e-6


def test_many_tasks_at_once(classifier, pictures, adapted):
    tasks = jnp.stack([pictures, pictures[::-1]])
    many = jax.jit(jax.vmap(lambda x: fj.adapt_classifier(classifier, (x, LABELS), names=NAMES)))
    assert_close(jax.tree.map(lambda leaf: leaf[0], many(tasks)).means, adapted.means, 1e-4)


def test_pictures_of_no_weight_are_as_if_they_were_not_there(classifier, pictures):
    weights = np.array([1, 1, 1, 0, 1, 0], np.float32)
    there = weights > 0
    adapt = jax.jit(functools.partial(classifier.adapt, ways=3))
    one = adapt((pictures, LABELS), weights=weights)
    assert_close(one, adapt((pictures[there], LABELS[there])), 1e-4)


def test_refusals(classifier, pictures, adapted):
    learned = small_classifier(head="learned")
    refused = {
        "two classes or more to tell apart, got 1": (classifier, LABELS * 0, ("ant",)),
        "head was learned for 3 classes, got 4: leave out 1, or train": (learned, LABELS, "abcd"),
        "every class needs an example, dog has none": (classifier, LABELS, (*NAMES, "dog")),
        "names must differ, 'ant' is there twice": (classifier, LABELS, ("ant", "bee", "ant")),
        "labels must be from 0 to 1 for 2 names, got 0 to 2": (classifier, LABELS, NAMES[:2]),
        r"labels must be \[6\], one a picture, got \[5\]": (classifier, LABELS[:5], NAMES),
    }
    for message, (of, labels, names) in refused.items():
        with pytest.raises(ValueError, match=message):
            fj.adapt_classifier(of, (pictures, labels), names=tuple(names))
    with pytest.raises(TypeError, match=r"^labels must be integers, got float32$"):
        fj.adapt_classifier(classifier, (pictures, np.float32(LABELS)), names=NAMES)
    with pytest.raises(ValueError, match="two classes or more to tell apart"):
        fj.adapt_classifier(classifier, (pictures[:0], LABELS[:0]))
    with pytest.raises(TypeError, match=r"^labels are traced: pass names"):
        jax.eval_shape(lambda y: fj.adapt_classifier(classifier, (pictures, y)), LABELS)
    with pytest.raises(ValueError, match=r"^pictures must be \[n, 28, 28, 1\], got \[6, 28, 28\]$"):
        adapted.predict(pictures[..., 0])
    with pytest.raises(ValueError, match=r"^background must be one of .*, got 'blue'$"):
        fj.adapt_classifier(classifier, (pictures, LABELS), background="blue")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^statistics must be one of .*, got 'batch'$"):
        adapted.predict(pictures, statistics="batch")


# Its file.


def test_a_file_keeps_everything(adapted, pictures, tmp_path):
    path = tmp_path / "new" / "mine"
    fj.save_adapted(adapted, path)
    again = fj.load_adapted(path)
    assert (again.names, again.chosen, again.picture) == (NAMES, adapted.chosen, (28, 28, 1))
    assert again.background == "auto"
    for kept, one in zip(jax.tree.leaves(again), jax.tree.leaves(adapted), strict=True):
        np.testing.assert_array_equal(kept, one)
        assert kept.dtype == one.dtype
    assert [file.name for file in path.parent.iterdir()] == ["mine"]
    one, other = (predict(each, pictures).probabilities for each in (adapted, again))
    np.testing.assert_array_equal(one, other)


def test_a_file_that_is_damaged_or_another_is_refused(adapted, tmp_path):
    path = tmp_path / "mine.npz"
    expected = "expected what fomaml-jax adapt --save or fj.save_adapted has written"
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is not a file, {expected}$"):
        fj.load_adapted(path)
    fj.save_adapted(adapted, path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    for damaged in (b"", b"hello", whole[:middle], flipped):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"is damaged, or of another kind: {expected}$"):
            fj.load_adapted(path)
    with pytest.raises(ValueError, match=f"parameters.npz is of another kind: {expected}$"):
        fj.load_adapted(write_run(tmp_path / "run") / runs.PARAMETERS)
    kept = named_arrays.by_name(adapted)
    about = {
        "kind": f"{adapted_files.KIND}, {adapted_files.VERSION}",
        "config": options.to_json(adapted.chosen),
        "picture": [28, 28, 1],
        "names": NAMES,
        "background": "auto",
    }
    wrong = {
        "another kind": (about | {"kind": "?"}, kept),
        "no names": ({k: v for k, v in about.items() if k != "names"}, kept),
        "other names": (about | {"names": ["ant"]}, kept),
        "a regression": (about | {"config": options.to_json(options.Sinusoid())}, kept),
        "no object": ([], kept),
        "no labels": (about, {k: v for k, v in kept.items() if k != ".support[1]"}),
        "a mean too many": (about, kept | {".means": np.zeros((4, 16), np.float32)}),
    }
    for said, arrays in wrong.values():
        np.savez(path, **{adapted_files.ABOUT: np.asarray(json.dumps(said))}, **arrays)
        with pytest.raises(ValueError, match=f"of another kind: {expected}"):
            fj.load_adapted(path)
    younger = {
        "was written by another version of fomaml_jax, as 2": {"kind": f"{adapted_files.KIND}, 2"},
        "options differ from this version's: waves": {"config": about["config"] | {"waves": 3}},
    }
    for message, change in younger.items():
        np.savez(path, **{adapted_files.ABOUT: np.asarray(json.dumps(about | change))}, **kept)
        with pytest.raises(ValueError, match=message):
            fj.load_adapted(path)


def test_what_the_share_of_one_shot_is_said_to_be():
    assert str(thresholds.ONE_SHOT_SHARE) in (thresholds.Calibration.__doc__ or "")


def test_what_is_done_again_is_not_compiled_again(classifier, pictures, caplog):
    def whole(pictures):
        adapted = fj.adapt_classifier(classifier, (pictures, LABELS), names=NAMES)
        params = classifier.adapt((pictures, LABELS), ways=3)
        return adapted.predict(pictures), classifier.predict(params, pictures)

    whole(pictures)
    with jax.log_compiles():
        whole(255 - pictures)
    assert "Compiling" not in caplog.text


def test_in_double_precision_files_are_the_same(classifier, pictures, tmp_path):
    for_both = tmp_path / "mine.npz"
    with jax.enable_x64(True):
        fj.save_adapted(fj.adapt_classifier(classifier, (pictures, LABELS)), for_both)
        there = fj.load_adapted(for_both)
    for one, other in zip(
        jax.tree.leaves(there), jax.tree.leaves(fj.load_adapted(for_both)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
