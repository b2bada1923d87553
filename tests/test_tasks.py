"""Task distributions: what is drawn, how often, and that nothing leaks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

import fomaml_jax as fj

CLASSES, EXAMPLES = 7, 6
# Every pixel of an example holds its number, so that an episode says what it was made of.
NUMBERED = np.arange(CLASSES * EXAMPLES, dtype=np.float32).reshape(CLASSES, EXAMPLES, 1, 1, 1)


def draw(seeds=400, **kwargs):
    options = {"ways": 3, "shots": 2, "queries": 3} | kwargs
    sample_task = fj.tasks.episodes(NUMBERED, **options)
    keys = jax.random.split(jax.random.key(0), seeds)
    return jax.device_get(jax.jit(jax.vmap(sample_task))(keys))


def test_every_class_gets_every_label_equally_often():
    task = draw(seeds=3000)
    counts = np.zeros((CLASSES, 3))
    np.add.at(
        counts, (task.support[0].reshape(-1).astype(int) // EXAMPLES, task.support[1].flat), 1
    )
    expected = counts.sum() / counts.size
    assert np.abs(counts / expected - 1).max() < 0.15


def test_every_example_serves_as_support_and_query_equally_often():
    task = draw(seeds=3000)
    for x, _ in task:
        counts = np.bincount(x.reshape(-1).astype(int), minlength=NUMBERED.size)
        assert np.abs(counts / counts.mean() - 1).max() < 0.2


def test_the_order_of_examples_says_nothing_of_their_labels():
    for _, y in draw(seeds=3000):
        assert np.abs(y.mean(0) - 1).max() < 0.1  # labels 0, 1, 2 in every place


def test_the_same_key_gives_the_same_task():
    sample_task = fj.tasks.episodes(NUMBERED, ways=3, shots=2, queries=3)
    first, again = sample_task(jax.random.key(5)), jax.jit(sample_task)(jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.reuses_keys
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_episodes_may_be_made_under_a_trace(kind):
    key = jax.random.key(0)
    sound, wrong = kind(NUMBERED), kind(np.where(NUMBERED == 5, np.nan, NUMBERED))
    sample = lambda images, key: fj.tasks.episodes(images, ways=3, shots=1, queries=1)(key)
    found = jax.jit(lambda key: sample(sound, key))(key)
    jax.tree.map(np.testing.assert_array_equal, found, sample(sound, key))
    with pytest.raises(ValueError, match=r"images\[0, 5\] has pixels that are not finite"):
        jax.jit(lambda key: sample(wrong, key))(key)
    jax.jit(sample)(wrong, key)  # what is not known yet is not looked at
    with pytest.raises(ValueError, match=r"images\[0, 0\] has pixels that are beyond int32, so"):
        sample(2**31 + np.asarray(NUMBERED, np.int64), key)


@pytest.mark.makes_nans
def test_padding_may_be_anything():
    images = np.ones((4, 5, 2))
    images[2, 3:] = np.nan
    counts = np.array([5, 5, 3, 5])
    sample_task = fj.tasks.episodes(images, ways=4, shots=1, queries=2, counts=counts)
    task = jax.jit(sample_task)(jax.random.key(0))
    assert np.isfinite(task.query[0]).all()


def test_padding_is_never_drawn():
    counts = np.array([5, 6, 5, 6, 5, 6, 5])
    task = draw(counts=counts)
    for x, _ in task:
        numbers = x.reshape(-1).astype(int)
        assert (numbers % EXAMPLES < counts[numbers // EXAMPLES]).all()


def test_the_classes_of_an_episode_come_from_one_group_each_as_often():
    groups = np.array([4, 0, 4, 9, 0, 9, 9])  # of two, two and three classes
    together = {0: {1, 4}, 4: {0, 2}, 9: {3, 5, 6}}
    x, _ = draw(groups=groups, ways=2).support
    drawn = [set(classes) for classes in x.reshape(len(x), -1).astype(int) // EXAMPLES]
    of_groups = [sum(classes <= group for classes in drawn) for group in together.values()]
    assert sum(of_groups) == len(drawn)
    expected = len(drawn) / 3
    assert all(abs(n - expected) < 4 * np.sqrt(expected) for n in of_groups), of_groups
    assert set().union(*drawn) == set(range(CLASSES))


def test_rotations_are_per_class_and_all_four_occur():
    corner = np.zeros((CLASSES, EXAMPLES, 2, 2, 1), np.uint8)
    corner[:, :, 0, 0] = 255
    sample_task = fj.tasks.episodes(corner, ways=3, shots=2, queries=3, rotations=True)
    seen = set()
    for seed in range(20):
        places = {}
        for x, y in jax.jit(sample_task)(jax.random.key(seed)):
            assert x.dtype == jnp.float32
            for image, label in zip(x, y, strict=True):
                place = int(image.reshape(-1).argmax())
                assert places.setdefault(int(label), place) == place
        seen |= set(places.values())
    assert seen == {0, 1, 2, 3}


def test_rotated_classes_are_turned_alike():
    images = np.arange(2 * 3 * 4).reshape(2, 3, 2, 2)
    turned = fj.tasks.rotated_classes(images)
    for turns in range(4):
        for c in range(2):
            for e in range(3):
                expected = np.rot90(images[c, e], turns)
                np.testing.assert_array_equal(turned[turns * 2 + c, e], expected)


def test_augmentation_is_drawn_for_every_example():
    noise = lambda key, image: jax.random.normal(key, image.shape)
    sample_task = fj.tasks.episodes(NUMBERED, ways=3, shots=2, queries=3, augment=noise)
    task = sample_task(jax.random.key(0))
    drawn = [float(v) for x, _ in task for v in x.reshape(-1)]
    assert len(set(drawn)) == 15


def test_random_shift_moves_and_never_wraps():
    image = jnp.zeros((5, 5, 1)).at[0, 0].set(1.0)
    shifted = jax.vmap(lambda k: fj.tasks.random_shift(1)(k, image))(
        jax.random.split(jax.random.key(0), 200)
    )[..., 0]
    places = {tuple(np.argwhere(s)[0]) for s in np.asarray(shifted) if s.any()}
    assert places == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert (np.asarray(shifted).sum((1, 2)) == 0).any()  # moved out, not round


@pytest.mark.reuses_keys
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_random_affine_is_what_scipy_makes_of_the_same_matrix(channels):
    """The matrix is read off pictures of their own coordinates."""
    size, key = (9, 12), jax.random.key(3)
    transform = jax.jit(lambda image: fj.tasks.random_affine(0.2)(key, image))
    middle = (np.array(size) - 1) / 2
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1).astype(np.float32)
    near = tuple(slice(3, n - 3) for n in size)
    moved = np.stack([np.asarray(transform(grid[..., axis])) for axis in range(2)], -1)[near]
    apart = (grid[near] - middle).reshape(-1, 2)
    matrix = np.linalg.lstsq(apart, (moved - middle).reshape(-1, 2))[0].T
    assert 0.01 < np.abs(matrix - np.eye(2)).max() <= 0.2 + 1e-4

    image = np.random.default_rng(0).random((*size, *channels), np.float32)
    planes = image.reshape(*size, -1)
    offset = middle - matrix @ middle
    expected = [
        scipy.ndimage.affine_transform(
            planes[..., c], matrix, offset, order=1, mode="grid-constant"
        )
        for c in range(planes.shape[-1])
    ]
    found = np.asarray(transform(image)).reshape(planes.shape)
    np.testing.assert_allclose(found, np.stack(expected, -1), atol=1e-4)


def test_random_affine_finds_its_places_in_more_than_16_bits():
    image = jnp.asarray(np.random.default_rng(0).random((84, 84)), jnp.bfloat16)
    transform = jax.jit(fj.tasks.random_affine(0.2))
    found = transform(jax.random.key(0), image)
    assert found.dtype == jnp.bfloat16
    expected = transform(jax.random.key(0), image.astype(jnp.float32))
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.004)  # half a last bit


@pytest.mark.parametrize("most", [0, -0.1, 0.5, float("nan")])
def test_random_affine_refuses_what_could_turn_a_picture_inside_out(most):
    with pytest.raises(ValueError, match=rf"^most must be above 0 and below 0\.5, got {most}$"):
        fj.tasks.random_affine(most)


DEFAULTS = {"amplitude": (0.1, 5.0), "phase": (0.0, np.pi), "x_range": (-5.0, 5.0)}
OTHERS = {"amplitude": (1.0, 1.5), "phase": (-0.5, 1.0), "x_range": (2.0, 6.0)}


@pytest.mark.parametrize(("given", "ranges"), [({}, DEFAULTS), (OTHERS, OTHERS)])
def test_sinusoid_draws_from_its_ranges(given, ranges):
    sample_task = fj.tasks.sinusoid(shots=5, queries=7, **given)
    tasks = jax.vmap(sample_task)(jax.random.split(jax.random.key(0), 500))
    (x, y), (qx, qy) = jax.device_get(tasks)
    assert x.shape == (500, 5, 1)
    assert qy.shape == (500, 7, 1)
    found = {"amplitude": [], "phase": [], "x_range": np.concatenate([x, qx], 1).ravel()}
    # a sin(x - b) = (a cos b) sin x - (a sin b) cos x: fit each task and read off a and b.
    for task in range(500):
        basis = np.concatenate([np.sin(qx[task]), -np.cos(qx[task])], 1)
        (c, s), *_ = np.linalg.lstsq(basis, qy[task, :, 0], rcond=None)
        np.testing.assert_allclose(c * np.sin(x[task]) - s * np.cos(x[task]), y[task], atol=1e-3)
        found["amplitude"].append(np.hypot(c, s))
        found["phase"].append(np.arctan2(s, c))
    for name, (low, high) in ranges.items():
        assert low - 1e-3 <= np.min(found[name])
        assert np.max(found[name]) <= high + 1e-3
        uniform = scipy.stats.uniform(low, high - low)
        assert scipy.stats.kstest(found[name], uniform.cdf).pvalue > 0.01


def test_task_keys_depend_on_seed_step_and_place_alone():
    keys = lambda step, n: jax.random.key_data(fj.tasks.task_keys(jax.random.key(0), step, n))
    np.testing.assert_array_equal(keys(3, 10)[:4], keys(3, 4))
    assert len(np.unique(np.concatenate([keys(s, 50) for s in range(20)]), axis=0)) == 1000


IMAGES = np.zeros((5, 4, 2, 3, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 6}, "ways=6 is more than the 5 classes there are"),
        ({"ways": 0}, "ways must be an integer of at least 1, got 0"),
        ({"shots": 2.5}, "shots must be an integer of at least 1, got 2.5"),
        ({"shots": 3, "queries": 2}, "shots=3 plus queries=2 is more than the 4 examples"),
        ({"counts": np.array([4, 4, 4, 4, 1])}, "more than the 1 examples of the smallest class"),
        ({"counts": np.array([4, 4])}, r"counts must be \[5\], got shape \(2,\)"),
        ({"counts": np.array([4, 4, 4, 4, 9])}, "counts says 9 examples, but images has 4 a class"),
        ({"rotations": True}, "rotations need square pictures"),
        ({"groups": [0, 1]}, r"groups must be \[5\], got shape \(2,\)"),
        (
            {"groups": [0, 1, 2, 1, 0], "ways": 3},
            "ways=3 is more than the 2 classes of the largest group",
        ),
    ],
)
def test_impossible_episodes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fj.tasks.episodes(IMAGES, **({"ways": 2, "shots": 1, "queries": 1} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 0}, "shots must be an integer of at least 1, got 0"),
        ({"amplitude": (5.0, 0.1)}, "amplitude must be a range"),
        ({"phase": (0.0, np.inf)}, "phase must be a range"),
    ],
)
def test_impossible_sinusoids_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fj.tasks.sinusoid(**options)


def test_counts_may_be_a_list():
    few = fj.tasks.episodes(IMAGES, ways=2, shots=1, queries=1, counts=[2, 3, 2, 4, 2])
    many = fj.tasks.episodes(IMAGES, ways=2, shots=1, queries=1, counts=np.array([2, 3, 2, 4, 2]))
    jax.tree.map(
        np.testing.assert_array_equal, *(jax.jit(f)(jax.random.key(0)) for f in (few, many))
    )


@pytest.mark.parametrize("count", [0, 2.5])
def test_a_count_of_keys_is_a_number_of_at_least_one(count):
    with pytest.raises(
        ValueError, match=f"num_tasks must be an integer of at least 1, got {count}"
    ):
        fj.tasks.task_keys(jax.random.key(0), 0, count)


@pytest.mark.parametrize("name", ["amplitude", "phase", "x_range"])
def test_a_number_in_the_place_of_a_range_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name} must be a range \(low, high\), got 3.0"):
        fj.tasks.sinusoid(**{name: 3.0})
