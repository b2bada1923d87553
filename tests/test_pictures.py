"""The pictures of a run show what happened, and are written whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

import fomaml_jax as fj
from fomaml_jax import classifiers, options, pictures, problems, runs
from fomaml_jax.pictures import ACCENT, INK, RIGHT, WRONG

KEY = jax.random.key(0)


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")) / 255


def share_of(colour, path):
    """The fraction of pixels of this very colour."""
    return np.isclose(pixels(path), to_rgb(colour), atol=0.02).all(-1).mean()


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


# Learning curve.

ROWS = [
    {"step": 1, "tasks": 4, "loss": 2.0},
    {"step": 2, "tasks": 8, "loss": 1.0, "validation": 0.3},
    {"step": 3, "tasks": 12, "loss": 0.5},
    {"step": 4, "tasks": 16, "loss": 0.25, "validation": 0.8},
]
RESULT = {
    "metric": "accuracy",
    "inner_steps": 3,
    "tasks_seen": 16,
    "mean": 0.7,
    "ci95": 0.1,
    "baselines": {"nearest": {"mean": 0.4, "ci95": 0.1}, "joint": {"mean": 0.6, "ci95": 0.1}},
}


BESIDE = {"step": 1, "grad_norm": 1.0, "left_out": 0}


def write_metrics(folder, rows=ROWS):
    for row in rows:
        runs.append_metrics(folder, BESIDE | row)
    return folder


def test_the_learning_curve_draws_loss_validation_result_and_baselines(tmp_path):
    left, right = pictures.learning_curve(write_metrics(tmp_path), RESULT).axes
    (loss,) = left.lines
    np.testing.assert_array_equal(loss.get_xydata(), [[4, 2], [8, 1], [12, 0.5], [16, 0.25]])
    assert left.get_yscale() == "log"
    np.testing.assert_array_equal(right.lines[0].get_xydata(), [[8, 0.3], [16, 0.8]])
    (unseen,) = right.containers
    np.testing.assert_array_equal(unseen.lines[0].get_xydata(), [[16, 0.7]])
    assert [line.get_ydata()[0] for line in right.lines[-2:]] == [0.4, 0.6]
    assert labels(right) == ["validation tasks", "nearest", "joint", "unseen tasks"]
    assert right.get_ylabel() == "accuracy after 3 steps"


def test_the_learning_curve_of_a_diverged_run_is_drawn(tmp_path):
    nan = float("nan")
    rows = [{"tasks": 4, "loss": 0.0, "validation": nan}, {"tasks": 8, "loss": nan}]
    figure = pictures.learning_curve(
        write_metrics(tmp_path, rows), RESULT | {"mean": nan, "ci95": nan, "baselines": {}}
    )
    pictures.save(figure, tmp_path / "curve.png")
    assert pixels(tmp_path / "curve.png").std() > 0.01


def test_a_picture_that_cannot_be_drawn_leaves_nothing_behind(tmp_path):
    class Unfinished:
        def savefig(self, path, **kwargs):
            path.write_bytes(b"half a pic")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pictures.save(Unfinished(), tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())


# Episodes, of four-pixel pictures: one pixel a class, told apart by a product.

WAYS, QUERIES = 4, 3
IMAGES = np.eye(WAYS, dtype=np.float32).reshape(WAYS, 1, 2, 2, 1).repeat(1 + QUERIES, 1)


def product(weights, x):
    return x.reshape(len(x), -1) @ weights


def episode_problem(predict=product, images=IMAGES):
    weights = jnp.zeros((images[0, 0].size, WAYS))
    tasks = fj.tasks.episodes(images, ways=WAYS, shots=1, queries=QUERIES)
    loss = classifiers.cross_entropy(product)
    return problems.Problem(
        params=weights,
        start=lambda params, _: params,
        predict=predict,
        loss_fn=loss,
        metric_fn=loss,
        metric="accuracy",
        inner=lambda shared: optax.sgd(1.0),
        meta_gradient=fj.fomaml(loss, optax.sgd(1.0), 1),
        outer=lambda steps: optax.sgd(0.1),
        train=tasks,
        validation=tasks,
        test=tasks,
    )


CHOSEN = options.Glyphs(ways=WAYS, queries=QUERIES, inner_steps=2)


def draw_episodes(problem, count):
    figure = pictures.episodes(CHOSEN, problem, problem.params, KEY, count)
    assert len(figure.axes) == count * WAYS * (1 + QUERIES)
    return [np.reshape(panel.axes, (1 + QUERIES, WAYS)) for panel in figure.subfigs]


def shown(axes):
    return axes.images[0].get_array()


def test_episodes_show_each_class_in_its_column_and_all_is_right(tmp_path):
    problem = episode_problem()
    task = problem.test(jax.random.fold_in(KEY, 0))
    (grid,) = draw_episodes(problem, 1)
    for way, column in enumerate(grid.T):
        (example,) = np.asarray(task.support[0])[np.asarray(task.support[1]) == way]
        assert column[0].get_title() == str(way + 1)
        for axes in column:  # the pictures of a class are all alike
            np.testing.assert_array_equal(shown(axes), example[..., 0])
        for axes in column[1:]:
            assert axes.get_title() == ""
            assert {s.get_edgecolor() for s in axes.spines.values()} == {(*to_rgb(RIGHT), 1)}
    assert len({shown(axes).tobytes() for axes in grid[0]}) == WAYS


def test_episodes_say_what_was_said_wrongly():
    problem = episode_problem(lambda weights, x: jnp.eye(WAYS)[jnp.full(len(x), 1)])
    for grid in draw_episodes(problem, 2):
        for way, column in enumerate(grid.T):
            good = way == 1
            assert [axes.get_title() for axes in column[1:]] == ["" if good else "said 2"] * QUERIES
            colours = {s.get_edgecolor() for axes in column[1:] for s in axes.spines.values()}
            assert colours == {(*to_rgb(RIGHT if good else WRONG), 1)}


def test_episodes_in_colour_are_shown_in_colour():
    images = np.concatenate([IMAGES, 1 - IMAGES, 0 * IMAGES], -1)
    (grid,) = draw_episodes(episode_problem(images=images), 1)
    assert shown(grid[0, 0]).shape == (2, 2, 3)


def test_a_finished_run_of_pictures_is_drawn(tmp_path):
    problem = episode_problem()
    pictures.draw_run(CHOSEN, problem, problem.params, KEY, write_metrics(tmp_path), RESULT)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"metrics.jsonl", "learning_curve.png", "episodes.png"}
    assert share_of(ACCENT, tmp_path / "learning_curve.png") > 1e-4
    assert share_of(INK, tmp_path / "learning_curve.png") > 1e-4
    assert share_of(RIGHT, tmp_path / "episodes.png") > 0.01
    assert share_of(WRONG, tmp_path / "episodes.png") == 0


# Sine waves.


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    """The problem, with the folder and the last figure of its run."""
    folder = write_metrics(tmp_path_factory.mktemp("waves"))
    chosen = options.Sinusoid(eval_steps=4)
    problem = problems.build(chosen)
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        save = pictures.save
        patch.setattr(pictures, "save", lambda *args: (drawn.append(args[0]), save(*args)))
        pictures.draw_run(chosen, problem, problem.params, KEY, folder, RESULT)
    return problem, folder, drawn[-1]


def test_a_finished_run_of_sine_waves_is_drawn(waves):
    _, folder, _ = waves
    names = {path.name for path in folder.iterdir()}
    assert names == {"metrics.jsonl", "learning_curve.png", "adaptation.png"}
    assert share_of(ACCENT, folder / "adaptation.png") > 1e-3
    assert share_of(RIGHT, folder / "adaptation.png") > 1e-3


def test_each_panel_shows_the_wave_its_points_and_the_network_before_and_after(waves):
    problem, _, figure = waves
    adapt_path = jax.jit(problems.adapt_path(problem, 4))
    predict = jax.jit(problem.predict)
    assert len(figure.axes) == 3
    assert labels(figure.axes[0]) == [
        "the wave",
        "before adaptation",
        "after 1 step",
        "after 4 steps",
        "points given",
    ]
    for index, axes in enumerate(figure.axes):
        task = jax.jit(problem.test)(jax.random.fold_in(KEY, index))
        wave, *curves, points = axes.lines
        x, y = map(np.ravel, task.query)
        np.testing.assert_allclose(wave.get_xydata(), np.stack([x, y], 1)[np.argsort(x)])
        np.testing.assert_allclose(points.get_xydata(), np.concatenate(task.support, 1))
        path = adapt_path(problem.params, task.support)
        for curve, step in zip(curves, (0, 1, 4), strict=True):
            params = jax.tree.map(lambda p, step=step: p[step], path)
            expected = predict(params, jnp.linspace(-5, 5, 201)[:, None])
            np.testing.assert_allclose(curve.get_ydata(), expected[:, 0], rtol=1e-4, atol=1e-4)
