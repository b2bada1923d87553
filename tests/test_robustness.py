"""The shift report: its numbers by other paths, its conclusions, and what it leaves out."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import call, rows_of
from PIL import Image
from test_problems import CHOSEN, QUERIES, SIZE, WAYS, build, noise

import fomaml_jax as fj
from fomaml_jax import datasets, options, robustness, shift_pictures, shift_suite
from fomaml_jax.datasets import ImageClasses, Splits
from fomaml_jax.robustness import ADAPTED, FEATURES, PIXELS, Condition, Pool, Setting

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def classifier():
    built = build()
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), built.params
    )
    return fj.Classifier(CHOSEN, params, (SIZE, SIZE, 1))


# Measuring.


def outputs_of(classifier):
    """Compiled: logits and features of a task's queries, and features of its support."""
    alone = classifier.chosen.statistics == "one-at-a-time"

    @jax.jit
    def outputs(task):
        (x, y), (queries, _) = task
        asked = fj.batch_statistics.Beside(x, queries) if alone else queries
        adapted = classifier.adapt((x, y), ways=WAYS)
        features = classifier.features(x), classifier.features(asked)
        return classifier.predict(adapted, asked), features

    return outputs


def by_hand(outputs, task):
    """Accuracies of one task, without anything that the report is made of."""
    (x, y), (queries, truth) = task
    logits, features = outputs(task)
    found = {ADAPTED: np.mean(np.argmax(logits, -1) == truth)}
    pixels = x.reshape(len(x), -1), queries.reshape(len(queries), -1)
    embedded = {FEATURES: features, PIXELS: pixels}
    for name, (known, unknown) in embedded.items():
        means = np.stack([np.asarray(known)[np.asarray(y) == c].mean(0) for c in range(WAYS)])
        apart = np.linalg.norm(np.asarray(unknown)[:, None] - means, axis=-1)
        found[name] = np.mean(apart.argmin(-1) == np.asarray(truth))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("statistics", ["transductive", "one-at-a-time"])
def test_rows_are_what_every_task_by_itself_gives(classifier, statistics):
    chosen = dataclasses.replace(CHOSEN, statistics=statistics)
    classifier = dataclasses.replace(classifier, chosen=chosen)
    classes = noise(7, examples=3, seed=2)
    setting, num_tasks = Setting("own", WAYS, 1), 6
    strengths = {"noise": 0.5, "rotation of the queries": 40.0}
    table = [Condition("s", "none", setting), Condition("s", "some", setting, strengths)]
    pools = {"own": Pool(classes, turned=False)}
    measuring = {"queries": QUERIES, "num_tasks": num_tasks}
    rows = list(robustness.measure(classifier, pools, table, KEY, **measuring))
    plain = fj.tasks.episodes(classes.images, ways=WAYS, shots=1, queries=QUERIES)
    shifted = fj.shifts.shifted(
        plain, *(make(strengths.get(name, 0.0)) for name, make in fj.shifts.NAMED.items())
    )
    keys = [jax.random.fold_in(KEY, i) for i in range(num_tasks)]
    outputs, found = outputs_of(classifier), []
    for sample_task in map(jax.jit, (plain, shifted)):
        each = [by_hand(outputs, sample_task(key)) for key in keys]
        found.append({name: np.array([one[name] for one in each]) for name in each[0]})
    for row, accuracies in zip(rows, found, strict=True):
        for name, each in accuracies.items():
            assert row[name]["mean"] == pytest.approx(each.mean(), abs=1e-6)
        for name in (FEATURES, PIXELS):
            difference = accuracies[ADAPTED] - accuracies[name]
            assert row["ahead"][name]["mean"] == pytest.approx(difference.mean(), abs=1e-6)
            ci95 = 1.96 * difference.std(ddof=1) / np.sqrt(num_tasks)
            assert row["ahead"][name]["ci95"] == pytest.approx(ci95, abs=1e-6)
    assert rows[0]["lost"] is None
    lost = (found[0][ADAPTED] - found[1][ADAPTED]).mean()
    assert rows[1]["lost"]["mean"] == pytest.approx(lost, abs=1e-6)


def test_tasks_of_a_pool_of_groups_have_all_classes_from_one_and_meet_all():
    numbered = np.arange(4 * 6, dtype=np.float32).reshape(24, 1, 1, 1, 1).repeat(3, axis=1)
    classes = ImageClasses(numbered, np.full(24, 3), tuple(map(str, range(24))))
    pool = Pool(classes, turned=False, groups=np.arange(24) // 6)
    tasks = jax.vmap(pool.sampler(jnp.asarray(numbered), ways=3, shots=1, queries=1))
    task = jax.jit(tasks)(jax.random.split(KEY, 200))
    groups = np.concatenate([x.reshape(200, -1) for x, _ in task], 1) // 6
    np.testing.assert_array_equal(groups, groups[:, :1].repeat(6, 1))
    assert np.bincount(groups[:, 0].astype(int)).min() > 25


def test_a_class_without_an_example_is_nobodys_nearest():
    x, y = jnp.array([[0.0], [1.0]]), jnp.array([0, 2])
    means = robustness.class_means(x, y, 3)
    np.testing.assert_array_equal(means, [[0], [np.inf], [1]])
    np.testing.assert_array_equal(robustness.nearest(means, jnp.array([[0.4], [9.0]])), [0, 2])


# Which conditions.


def characters(alphabets):
    """Classes of so many characters an alphabet."""
    classes = noise(sum(alphabets.values()), examples=10)
    names = [f"{alphabet}/{n}" for alphabet, count in alphabets.items() for n in range(count)]
    return ImageClasses(*classes[:2], tuple(names))


OMNIGLOT = Splits(
    characters({"seen": 6}), characters({"chosen": 5}), characters({"seen": 3, "a": 5, "b": 4})
)


@pytest.fixture
def data(monkeypatch):
    """Small pictures in the place of both data sets."""
    print_ = Splits(*(noise(n, examples=10, seed=n) for n in (6, 5, 7)))
    monkeypatch.setattr(datasets, "glyphs", lambda: print_)
    monkeypatch.setattr(datasets, "omniglot", lambda download: OMNIGLOT)
    return monkeypatch


def test_unseen_alphabets_are_those_that_no_known_character_is_of(data):
    chosen = options.Omniglot(ways=4, queries=5)
    pools = shift_suite.suite(chosen, OMNIGLOT).pools
    own, alphabets = list(pools.values())[:2]
    assert own.groups is None
    np.testing.assert_array_equal(own.classes.images, OMNIGLOT.test.images)
    np.testing.assert_array_equal(alphabets.classes.images, OMNIGLOT.test.images[3:])
    np.testing.assert_array_equal(alphabets.groups, [0] * 5 + [1] * 4)
    assert (own.most_ways, alphabets.most_ways) == (12, 5)
    assert own.turned
    assert not pools["print (glyphs)"].turned


def test_every_shift_begins_without_itself_and_shares_programs(data):
    chosen = options.Omniglot(ways=4, queries=5)
    suite = shift_suite.suite(chosen, OMNIGLOT)
    first = {}
    for condition in suite.conditions:
        first.setdefault(condition.shift, condition)
    assert all(not c.strengths and not c.steepness for c in first.values())
    shifts = {name for c in suite.conditions for name in c.strengths}
    assert shifts == set(fj.shifts.NAMED)
    base = Setting("handwriting (Omniglot)", 4, 1)
    of_pictures = [c for c in suite.conditions if c.shift in shift_suite.STRENGTHS]
    assert {c.setting for c in of_pictures} == {base}
    support = {c.setting.support for c in suite.conditions if c.shift == "class imbalance"}
    assert support == {4 * 3}


def test_what_cannot_be_measured_is_left_out_with_a_reason(data):
    def missing(download):
        raise FileNotFoundError("no Omniglot\nanywhere")

    data.setattr(datasets, "omniglot", missing)
    chosen = dataclasses.replace(CHOSEN, ways=3, queries=6, head="learned")
    left_out = shift_suite.suite(chosen, datasets.glyphs()).left_out
    assert left_out == [
        "test classes, omniglot: no Omniglot anywhere",
        "ways, 5-way: the head is learned for 3 ways",
        "ways, 10-way: the head is learned for 3 ways",
        "ways, 20-way: the head is learned for 3 ways",
        *(
            f"{what}: {shots} shots and 6 queries are more than the 10 pictures of the smallest "
            "class"
            for what, shots in [
                ("shots, 5-shot", 5),
                ("shots, 10-shot", 10),
                *((f"label noise, {share} % of 5-shot", 5) for share in (0, 13.3, 20, 26.7)),
                *((f"class imbalance, {how}", 5) for how in ("even", "from 1 to 5", "1 or 5")),
            ]
        ),
    ]
    folder = options.Folder(path="pictures", ways=5, queries=5)
    suite = shift_suite.suite(folder, datasets.glyphs())
    assert list(suite.pools) == ["own pictures"]
    assert suite.left_out[:2] == [
        "test classes: there are no other pictures like those of a folder",
        "ways, 10-way: there are 7 test classes",
    ]


def test_a_run_without_pictures_is_refused():
    with pytest.raises(ValueError, match=r"^--shift: sinusoid has no pictures to shift$"):
        shift_suite.suite(options.Sinusoid(), None)


# What is said of it.


def row(shift, label, adapted, features, pixels, ci95=0.01, strength=0.0):
    means = {ADAPTED: adapted, FEATURES: features, PIXELS: pixels}
    ahead = {name: {"mean": adapted - means[name], "ci95": ci95} for name in (FEATURES, PIXELS)}
    return {
        "shift": shift,
        "label": label,
        "data": "own",
        "ways": 5,
        "shots": 1,
        "support": 5,
        "strengths": {shift: strength} if strength else {},
        "steepness": 0.0,
        "ahead": ahead,
        **{name: {"mean": mean, "ci95": ci95} for name, mean in means.items()},
        "num_tasks": 9,
        "lost": None,
    }


ROWS = [
    row("noise", "none", 0.9, 0.8, 0.4),
    row("noise", "std 1", 0.5, 0.505, 0.4, strength=1.0),
    row("noise", "std 2", 0.3, 0.33, 0.4, strength=2.0),
    row("blur", "none", 0.9, 0.8, 0.4),  # the same tasks as without noise
]


def test_it_is_said_where_adaptation_stops_helping():
    assert shift_pictures.conclusions(ROWS) == [
        "Of 3 conditions, adaptation is ahead of the nearest class mean of features under 1 (noise "
        "none), behind under 1 (noise std 2), and by its interval neither under 1 (noise std 1).",
        "Of 3 conditions, adaptation is ahead of the nearest class mean of pixels under 2, behind "
        "under 1 (noise std 2), and by its interval neither under none.",
        shift_pictures.BY_CHANCE,
    ]


def test_what_diverged_is_behind():
    assert robustness.verdict({"mean": np.nan, "ci95": np.nan}) == "hurts"
    assert robustness.verdict({"mean": 0.5, "ci95": np.nan}) == "not shown"  # one task


def test_the_picture_has_a_panel_a_shift_with_all_accuracies():
    panels = [axes for axes in shift_pictures.draw(ROWS).axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["noise", "blur"]
    lines = [line.get_ydata() for line in panels[0].lines if len(line.get_ydata()) == 3]
    for name in (ADAPTED, FEATURES, PIXELS):
        means = [one[name]["mean"] for one in ROWS[:3]]
        assert any(np.array_equal(line, means) for line in lines)
    filled = [line for line in panels[0].lines if len(line.get_ydata()) == 1 and line.get_ms() == 5]
    assert [line.get_mfc() for line in filled] == [
        shift_pictures.MARKS[name] for name in ("helps", "not shown", "hurts")
    ]


# The command.


@pytest.mark.slow
def test_evaluate_with_shift(glyphs, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "omniglot", lambda download: OMNIGLOT)
    for name, few in {"WAYS": (3,), "SHOTS": (1,), "SEVERAL": 3, "KINDS": {}}.items():
        monkeypatch.setattr(shift_suite, name, few)
    words = ("--eval-tasks", "4", "--statistics", "transductive")
    plain = call("evaluate", glyphs.folder, *words)
    run = call("evaluate", glyphs.folder, "--shift", "--out", tmp_path / "out", *words)
    assert run.code == 0, run.err
    assert "4 unseen tasks a condition, query batches normalised together (transductive)" in run.out
    result = json.loads((tmp_path / "out" / "shift.json").read_text())
    clean = {one["shift"]: one for one in result["rows"][::-1]}["noise"]
    (_, mean, ci95), *_ = (found for found in rows_of(plain.out) if found[0] == "after 1 step")
    assert 100 * clean[ADAPTED]["mean"] == pytest.approx(mean, abs=0.005)
    assert 100 * clean[ADAPTED]["ci95"] == pytest.approx(ci95, abs=0.005)
    pixels = glyphs.result["baselines"]["nearest class mean on pixels"]
    assert clean[PIXELS] == pytest.approx(pixels, abs=1e-6)
    assert result["statistics"] == "transductive"
    assert result["conclusions"][0] in run.out
    assert "± is a 95 % interval over tasks, too narrow for so few as 4," in run.out
    with Image.open(tmp_path / "out" / "shift.png") as image:
        assert image.size > (500, 200)
    again = call("evaluate", glyphs.folder, "--shift", "--out", tmp_path / "out", *words)
    assert again.code == 2
    assert "out holds a report; pass --out with another folder" in again.err
    onto = call("evaluate", glyphs.folder, "--shift", "--out", tmp_path / "out/shift.json", *words)
    assert onto.err.endswith("shift.json is a file; pass --out with a folder\n")


def test_words_that_do_not_go_together(glyphs, sinusoid, tmp_path):
    refused = {
        "--out is the folder of --shift: give both, or neither": ("--out", tmp_path / "out"),
        "--against and --shift are two reports: give one of them": (
            *("--shift", "--against", sinusoid.folder),
        ),
    }
    for message, words in refused.items():
        run = call("evaluate", glyphs.folder, *words)
        assert (run.code, run.err) == (2, f"fomaml-jax: {message}\n")
    run = call("evaluate", sinusoid.folder, "--shift", "--out", tmp_path / "out")
    assert (run.code, run.err) == (2, "fomaml-jax: --shift: sinusoid has no pictures to shift\n")
    run = call("evaluate", sinusoid.folder, "--statistics", "transductive")
    assert (run.code, run.err) == (2, "fomaml-jax: --statistics: sinusoid has no classes\n")
    assert not (tmp_path / "out").exists()
