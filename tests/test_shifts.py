"""Shifts of a task: each against numpy or scipy, and nothing at strength 0."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

import fomaml_jax as fj
from fomaml_jax import shifts

KEY = jax.random.key(0)
pytestmark = pytest.mark.reuses_keys  # one serves every test
SHOTS, WAYS, SIZE = 5, 5, 28


def task_of(seed=0, channels=1):
    """Pictures of noise, labels as in an episode."""
    rng = np.random.default_rng(seed)

    def batch():
        y = rng.permutation(np.repeat(np.arange(WAYS, dtype=np.int32), SHOTS))
        return rng.random((len(y), SIZE, SIZE, channels), np.float32), y

    return jax.tree.map(jnp.asarray, fj.Task(batch(), batch()))


TASK = task_of()
PICTURES = [fj.shifts.rotation, fj.shifts.noise, fj.shifts.blur]


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def differ(one, other):
    return not np.array_equal(one, other)


@pytest.mark.parametrize("name", shifts.NAMED)
def test_strength_zero_changes_nothing_and_others_do(name):
    shift = jax.jit(lambda strength, task: shifts.NAMED[name](strength)(KEY, task))
    equal(shift(0.0, TASK), TASK)
    changed = shift(0.5, TASK)
    assert any(itertools.starmap(differ, zip(*map(jax.tree.leaves, (changed, TASK)), strict=True)))


@pytest.mark.parametrize("make", PICTURES)
@pytest.mark.parametrize("of", ["support", "query"])
def test_a_shift_of_one_batch_leaves_the_other_and_all_labels(make, of):
    shift = make(0.7, of=of)
    changed = shift(KEY, TASK)
    other = {"support": "query", "query": "support"}[of]
    equal(getattr(changed, other), getattr(TASK, other))
    equal(getattr(changed, of)[1], getattr(TASK, of)[1])
    assert differ(getattr(changed, of)[0], getattr(TASK, of)[0])


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_turns_by_quarters_are_rot90(quarters):
    found = shifts.rotation(90 * quarters)(KEY, TASK)
    for batch, before in zip(found, TASK, strict=True):
        expected = np.rot90(before[0], quarters, axes=(1, 2))
        np.testing.assert_allclose(batch[0], expected, atol=1e-5)


def test_other_turns_are_scipys():
    task = task_of(channels=3)
    found = shifts.rotation(25.0, of="query")(KEY, task).query[0]
    expected = scipy.ndimage.rotate(
        task.query[0], 25.0, axes=(2, 1), reshape=False, order=1, mode="grid-constant"
    )
    # At the border the two read what is beyond it differently.
    inside = slice(4, -4)
    np.testing.assert_allclose(found[:, inside, inside], expected[:, inside, inside], atol=1e-4)


@pytest.mark.parametrize("std", [0.3, 1.0, 2.5])
def test_blur_is_scipys_and_keeps_the_sum_away_from_borders(std):
    found = shifts.blur(std)(KEY, TASK).query[0]
    expected = scipy.ndimage.gaussian_filter(
        TASK.query[0], (0, std, std, 0), mode="constant", truncate=12
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    dot = jnp.zeros((1, SIZE, SIZE, 1)).at[0, 14, 14].set(1.0)
    batch = dot, jnp.zeros(1, jnp.int32)
    assert shifts.blur(std)(KEY, fj.Task(batch, batch)).query[0].sum() == pytest.approx(1, abs=1e-5)


def test_noise_has_its_standard_deviation_and_is_drawn_anew_for_every_picture():
    noisy = shifts.noise(0.3)(KEY, TASK)
    added = np.stack([new[0] - old[0] for new, old in zip(noisy, TASK, strict=True)])
    assert added.std() == pytest.approx(0.3, rel=0.02)
    assert added.mean() == pytest.approx(0, abs=0.01)
    apart = np.corrcoef(added.reshape(2 * WAYS * SHOTS, -1)) - np.eye(2 * WAYS * SHOTS)
    assert np.abs(apart).max() < 6 / SIZE


@pytest.mark.parametrize("share", [0.12, 0.2, 0.28, 1.0])
def test_label_noise_changes_that_share_of_the_support_labels_and_no_others(share):
    keys = jax.random.split(KEY, 300)
    noisy = jax.jit(jax.vmap(lambda key: shifts.label_noise(share)(key, TASK)))(keys)
    before, after = np.asarray(TASK.support[1]), np.asarray(noisy.support[1])
    wrong = after != before
    np.testing.assert_array_equal(wrong.sum(1), round(share * before.size))
    np.testing.assert_allclose(wrong.mean(0), share, atol=0.1)  # each as often
    pairs = np.zeros((WAYS, WAYS))
    np.add.at(pairs, (np.broadcast_to(before, after.shape)[wrong], after[wrong]), 1)
    assert np.abs(pairs[~np.eye(WAYS, dtype=bool)] / pairs.sum() * 20 - 1).max() < 0.35
    equal(jax.tree.map(lambda x: x[0], noisy.query), TASK.query)
    equal(noisy.support[0][0], TASK.support[0])


@pytest.mark.parametrize("counts", [[1, 1, 3, 5, 5], [5, 5, 5, 5, 5], [1, 1, 1, 1, 1]])
def test_class_imbalance_leaves_the_counts_and_whole_examples(counts):
    keys = jax.random.split(KEY, 200)
    shift = shifts.class_imbalance(counts)
    x, y = jax.jit(jax.vmap(lambda key: shift(key, TASK).support))(keys)
    found = np.stack([np.bincount(labels, minlength=WAYS) for labels in np.asarray(y)])
    np.testing.assert_array_equal(np.sort(found), np.broadcast_to(counts, found.shape))
    # Every class is as often rich as poor, and every picture has the label it had.
    np.testing.assert_allclose(found.mean(0), np.mean(counts), atol=0.5)
    labels = {np.asarray(p).tobytes(): int(label) for p, label in zip(*TASK.support, strict=True)}
    for picture, label in zip(np.asarray(x[0]), y[0], strict=True):
        assert labels[picture.tobytes()] == label
    if counts == [SHOTS] * WAYS:
        equal(jax.tree.map(lambda x: x[0], (x, y)), TASK.support)
    equal(shift(KEY, TASK).query, TASK.query)


@pytest.mark.parametrize("ways", [2, 4, 5, 20, 25])
@pytest.mark.parametrize("most", [1, 5, 7])
def test_uneven_counts_have_one_sum(ways, most):
    for steepness in (0.0, 0.3, 1.0, 2.0, 1e3):
        counts = np.asarray(shifts.uneven_counts(ways, most, steepness))
        assert counts.sum() == ways * (most + 1) // 2
        assert 1 <= counts.min() <= counts.max() <= most
        assert (counts.min() == 1) == (steepness >= 1 or most == 1)


def test_one_program_serves_every_strength():
    traces = []

    @jax.jit
    def sample(key, strength, steepness):
        traces.append(strength)
        counts = shifts.uneven_counts(WAYS, SHOTS, steepness)
        named = (make(strength) for make in shifts.NAMED.values())
        thin = shifts.class_imbalance(counts, total=15)
        return shifts.shifted(lambda key: TASK, *named, thin)(key)

    for strength in (0.0, 0.2, 0.9):
        assert sample(KEY, strength, 3 * strength).support[0].shape == (15, SIZE, SIZE, 1)
    assert len(traces) == 1


def test_shifts_come_in_turn_with_keys_of_their_own_and_leave_the_tasks():
    images = np.random.default_rng(0).integers(0, 256, (9, 8, SIZE, SIZE, 1), np.uint8)
    episodes = jax.jit(fj.tasks.episodes(images, ways=WAYS, shots=1, queries=3))
    plain = episodes(KEY)
    equal(shifts.shifted(episodes)(KEY), plain)
    twice = shifts.shifted(episodes, shifts.noise(1.0), shifts.noise(1.0))(KEY)
    noise = np.asarray(twice.query[0] - plain.query[0])
    assert noise.std() == pytest.approx(np.sqrt(2), rel=0.03)  # of one key it would be 2
    in_turn = shifts.shifted(episodes, shifts.rotation(90), shifts.blur(2.0, of="query"))(KEY)
    expected = shifts.blur(2.0, of="query")(KEY, shifts.rotation(90)(KEY, plain))
    equal(in_turn, expected)
    with jax.debug_key_reuse(True):
        jax.jit(shifts.shifted(episodes, shifts.noise(1.0), shifts.label_noise(0.2)))(KEY)


def test_the_keys_of_shifts_are_not_those_that_a_sampler_draws_with():
    taken = []
    shift = lambda key, task: taken.append(key) or task
    shifts.shifted(lambda key: TASK, shift, shift)(KEY)
    used = {
        key.tobytes()
        for n in range(2, 30)
        for key in np.asarray(jax.random.key_data(jax.random.split(KEY, n)))
    }
    mine = {np.asarray(jax.random.key_data(key)).tobytes() for key in taken}
    assert len(mine) == 2
    assert not used & mine


REFUSED = {
    "noise": (lambda: shifts.noise(-1), "std must be a finite number of at least 0, got -1"),
    "blur": (
        lambda: shifts.blur(float("nan")),
        "std must be a finite number of at least 0, got nan",
    ),
    "rotation": (
        lambda: shifts.rotation(float("inf")),
        "degrees must be a finite number, got inf",
    ),
    "label noise": (
        lambda: shifts.label_noise(1.5),
        "share must be a finite number between 0 and 1, got 1.5",
    ),
    "of": (
        lambda: shifts.noise(1.0, of="label"),
        "of must be one of 'support', 'query', 'both', got 'label'",
    ),
    "counts": (
        lambda: shifts.class_imbalance([0, 1]),
        "counts must be integers [ways] of at least 1, got [0, 1]",
    ),
    "total": (
        lambda: shifts.class_imbalance([1, 2], total=4),
        "total must be the sum of counts, 3, got 4",
    ),
    "too many": (
        lambda: shifts.class_imbalance([20] * WAYS)(KEY, TASK),
        "counts add up to 100, more than the 25 support examples",
    ),
    "too few": (
        lambda: shifts.class_imbalance([1] * (WAYS - 2))(KEY, TASK),
        f"counts must be one a class, of {WAYS}, got {WAYS - 2}",
    ),
    "counts of classes that are not there": (
        lambda: shifts.class_imbalance([1] * (WAYS + 1))(KEY, TASK),
        f"counts must be one a class, of {WAYS}, got {WAYS + 1}",
    ),
    "an even number": (
        lambda: shifts.uneven_counts(5, 4, 1.0),
        "most must be odd, so that there is a middle, got 4",
    ),
    "one way": (
        lambda: shifts.uneven_counts(1, 5, 1.0),
        "ways must be an integer of at least 2, got 1",
    ),
    "no pictures": (
        lambda: shifts.blur(1.0)(KEY, fj.tasks.sinusoid()(KEY)),
        "the support batch must have pictures [n, height, width, ...], got shape (10, 1)",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_refusals_of_kinds():
    beside = fj.batch_statistics.beside_support(lambda key: TASK)
    with pytest.raises(TypeError) as refused:
        shifts.shifted(beside, shifts.noise(1.0))(KEY)
    assert str(refused.value) == (
        "the query batch must be a pair (pictures, labels); shift tasks before "
        "batch_statistics.beside_support, not after"
    )
    with pytest.raises(TypeError, match=r"^counts are traced: pass total, their sum"):
        jax.jit(lambda counts: shifts.class_imbalance(counts)(KEY, TASK))(jnp.ones(5, jnp.int32))


@pytest.mark.parametrize("size", [84, 300])  # 8 bits tell apart 256 places
def test_pictures_of_few_bits_are_shifted_as_others_are(size):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.random((1, size, size, 1)), jnp.bfloat16)
    few, many = (fj.Task(*[(y, jnp.zeros(1, jnp.int32))] * 2) for y in (x, x.astype(jnp.float32)))
    for shift in (fj.shifts.rotation(359.0), fj.shifts.blur(0.7)):
        found, expected = (shift(KEY, task).query[0] for task in (few, many))
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))
    equal(fj.shifts.blur(0.0)(KEY, few).query, few.query)


def test_pictures_of_other_integers_are_refused():
    batch = jnp.full((1, 9, 9, 1), 100), jnp.zeros(1, jnp.int32)
    for make in PICTURES:
        with pytest.raises(TypeError, match=r"uint8, or floats in \[0, 1\], got int32"):
            make(0.5)(KEY, fj.Task(batch, batch))
    with pytest.raises(TypeError, match="got uint8"):
        fj.tasks.random_affine(0.1)(KEY, jnp.ones((4, 4, 1), jnp.uint8))


def test_imbalance_of_arrays_of_numpy_under_jit():
    task = jax.tree.map(np.asarray, TASK)
    shift = fj.shifts.class_imbalance([1, 2, 3, 4, 5])
    equal(jax.jit(lambda key: shift(key, task))(KEY), shift(KEY, TASK))
    too_many = fj.shifts.class_imbalance([1] * (WAYS + 1))
    with pytest.raises(ValueError, match="counts must be one a class, of 5, got 6"):
        jax.jit(lambda key: too_many(key, task))(KEY)


def test_imbalance_of_a_class_with_too_few_is_refused():
    labels = jnp.array([0, 0, 0, 0, 0, 1])
    task = fj.Task((jnp.zeros((6, 1)), labels), (jnp.zeros((6, 1)), labels))
    with pytest.raises(
        ValueError, match="ask for 3 examples of a class, but class 1 has 1 support"
    ):
        fj.shifts.class_imbalance([3, 3])(KEY, task)


@pytest.mark.parametrize(("dtype", "ways"), [("int8", 100), ("uint8", 200), ("uint8", 256)])
def test_wrong_labels_of_few_bits_are_those_of_many(dtype, ways):
    labels = jnp.arange(ways)

    def relabelled(dtype):
        task = fj.Task((labels, labels.astype(dtype)), (labels, labels))
        return fj.shifts.label_noise(1.0)(jax.random.key(0), task).support[1]

    found = relabelled(dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, relabelled("int32"))
    assert (found != labels.astype(dtype)).all()
