"""`tune`: what it tries, what it chooses, and what it does when a way does not work."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from problems import quadratic

import fomaml_jax as fj
from fomaml_jax import host_memory, tuning
from fomaml_jax.variants import in_every_form, preferring, variants_of


def image_loss(params, batch):
    images, kernel = batch["x"], params["kernel"]
    out = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.mean((out - batch["y"]) ** 2)


def image_tasks(count):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(count, 2, 4, 4, 2)), jnp.float32)
    batch = {"x": images, "y": images}
    kernel = jnp.asarray(rng.normal(size=(3, 3, 2, 2)), jnp.float32)
    return {"kernel": kernel}, fj.Task(batch, batch)


def vector_tasks(count):
    centres = jnp.arange(3.0 * count, dtype=jnp.float32).reshape(count, 3)
    return jnp.zeros(3), fj.Task(centres, centres)


def test_tries_every_form_and_size_and_computes_the_same():
    params, tasks = image_tasks(4)
    meta_gradient = fj.fomaml(image_loss, optax.sgd(0.1), num_steps=2)
    plan = fj.tune(meta_gradient, params, tasks)
    tried = [(trial.variant, trial.tasks_at_once) for trial in plan.trials]
    assert len(set(tried)) == len(tried)
    assert {variant for variant, _ in tried} == {
        "matmul_convolutions",
        "matmul_convolutions, unrolled",
        "as given",
        "unrolled",
    }
    assert {1, 2, 4} == {size for _, size in tried}
    assert (plan.variant, plan.tasks_at_once) in tried
    tuned = fj.over_tasks(plan.meta_gradient, tasks_at_once=plan.tasks_at_once)
    expected, _ = fj.over_tasks(fj.fomaml(fj.matmul_convolutions(image_loss), optax.sgd(0.1), 2))(
        params, tasks
    )
    np.testing.assert_allclose(tuned(params, tasks)[0]["kernel"], expected["kernel"], rtol=1e-4)
    lines = str(plan).splitlines()
    assert len(lines) == 1 + len(plan.trials)
    assert sum(line.startswith(">") for line in lines) == 1


def test_small_tasks_are_not_judged_by_what_a_call_takes(monkeypatch):
    """Two of 256 take nearly as long as all of them."""
    params, tasks = vector_tasks(256)
    forms = {name: fj.fomaml(quadratic, optax.sgd(0.1), 1) for name in ("first", "second")}

    def measure(self, variant, size, tasks, repeats=1):
        self._programs[variant, size] = lambda: (variant, size)
        seconds = 1e-4 + 1e-6 * len(tasks.query) / (1 if variant == "first" else 2)
        return tuning.Trial(variant, size, seconds, 0.0, 0)

    monkeypatch.setattr(tuning._Search, "_measure", measure)
    monkeypatch.setattr(tuning, "_seconds", lambda program: 1.0 + (program()[0] == "first"))
    assert fj.tune(forms, params, tasks).variant == "second"


def test_the_fastest_is_chosen(monkeypatch):
    seconds = {"slow": 3.0, "fast": 1.0, "middling": 2.0}
    params, tasks = vector_tasks(4)
    forms = {name: fj.fomaml(quadratic, optax.sgd(0.1), 1) for name in seconds}

    def measure(self, variant, size, tasks, repeats=1):
        self._programs[variant, size] = lambda: (variant, size)
        return tuning.Trial(variant, size, seconds[variant] + 0.1 * abs(size - 2), 0.0, 0)

    def again(program):
        variant, size = program()
        return seconds[variant] + 0.1 * abs(size - 2)

    monkeypatch.setattr(tuning._Search, "_measure", measure)
    monkeypatch.setattr(tuning, "_seconds", again)
    plan = fj.tune(forms, params, tasks)
    assert (plan.variant, plan.tasks_at_once) == ("fast", 2)
    assert plan.meta_gradient is forms["fast"]


def test_what_needs_too_much_memory_is_left_out(monkeypatch):
    params, tasks = image_tasks(4)
    meta_gradient = fj.fomaml(fj.matmul_convolutions(image_loss), optax.sgd(0.1), 1)
    needed = {
        trial.tasks_at_once: trial.temp_bytes
        for trial in fj.tune(meta_gradient, params, tasks).trials
    }
    assert needed[1] < needed[4]
    monkeypatch.setattr(tuning, "_memory_bytes", lambda: needed[4] - 1)
    plan = fj.tune(meta_gradient, params, tasks)
    assert plan.tasks_at_once < 4
    (left_out,) = (trial for trial in plan.trials if trial.tasks_at_once == 4)
    assert left_out.seconds is None
    assert "needs more than" in left_out.note
    monkeypatch.undo()
    monkeypatch.setattr(host_memory, "most", lambda: 0)  # as in a container with none
    with pytest.raises(ValueError, match="no way to run these tasks worked"):
        fj.tune(meta_gradient, params, tasks)


def test_time_is_bounded():
    params, tasks = vector_tasks(8)
    plan = fj.tune(fj.fomaml(quadratic, optax.sgd(0.1), 3), params, tasks, max_seconds=0)
    assert len(plan.trials) == 1


def test_a_sampler_can_be_composed_in():
    def sampled(params, key):
        centre = jax.random.normal(key, (3,))
        return fj.fomaml(quadratic, optax.sgd(0.1), 1)(params, fj.Task(centre, centre))

    plan = fj.tune(sampled, jnp.zeros(3), jax.random.split(jax.random.key(0), 4))
    assert {trial.variant for trial in plan.trials} == {"as given"}
    assert plan.meta_gradient is sampled


def test_sharded_tasks_are_those_of_one_device():
    params, tasks = vector_tasks(8)
    mesh = jax.make_mesh((2,), ("tasks",), axis_types=(AxisType.Auto,))
    plan = fj.tune(fj.fomaml(quadratic, optax.sgd(0.1), 1), params, tasks, mesh=mesh)
    assert {trial.tasks_at_once for trial in plan.trials} == {1, 2, 4}


def test_a_meta_gradient_that_asks_where_it_is_on_the_mesh():
    """Whether it holds convolutions is not to be seen outside: all forms are tried."""
    params, tasks = vector_tasks(2)
    mesh = jax.make_mesh((2,), ("tasks",), axis_types=(AxisType.Auto,))
    make = functools.partial(fj.fomaml, optimizer=optax.sgd(0.1), num_steps=1)

    def placed(params, batch):
        return quadratic(params, batch) + jax.lax.axis_index("tasks").astype(jnp.float32)

    plan = fj.tune(make(placed), params, tasks, mesh=mesh)
    assert any("matmul" in trial.variant for trial in plan.trials)


def test_refuses_what_cannot_run():
    params, tasks = vector_tasks(3)
    mesh = jax.make_mesh((2,), ("tasks",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="3"):
        fj.tune(fj.fomaml(quadratic, optax.sgd(0.1), 1), params, tasks, mesh=mesh)
    with pytest.raises(TypeError, match=r"^meta_gradient must be a function .*, got None"):
        fj.tune(None, params, tasks)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="at least one form"):
        fj.tune({}, params, tasks)


def test_wrapped_forms_keep_their_names():
    params, tasks = vector_tasks(4)
    doubled = in_every_form(
        fj.fomaml(quadratic, optax.sgd(0.1), 2),
        lambda meta_gradient: lambda params, task: meta_gradient(params * 2, task),
    )
    plan = fj.tune(doubled, params + 1, tasks)
    assert {trial.variant for trial in plan.trials} == {"as given", "unrolled"}
    task = jax.tree.map(lambda x: x[0], tasks)
    expected = fj.fomaml(quadratic, optax.sgd(0.1), 2)(2 * params + 2, task)[0]
    np.testing.assert_allclose(plan.meta_gradient(params + 1, task)[0], expected, rtol=1e-6)


def test_what_was_measured_is_not_warned_of():
    params, tasks = image_tasks(4)
    native = fj.fomaml(image_loss, optax.sgd(0.1), num_steps=1)
    plan = fj.tune({"the only one": native}, params, tasks)
    fj.over_tasks(plan.meta_gradient)(params, tasks)

    @functools.wraps(native)
    def around(params, task):
        return native(params, task)

    with pytest.warns(UserWarning, match="holds native convolutions"):
        fj.over_tasks(around)(params, tasks)


def test_a_preferred_form_leaves_the_function_alone():
    params, tasks = vector_tasks(2)
    task = jax.tree.map(lambda x: x[0], tasks)
    plain = lambda params, task: (params, None)
    assert preferring("as given", plain)(params, task) == (params, None)
    assert variants_of(plain) == {"as given": plain}
    given = fj.fomaml(quadratic, optax.sgd(0.1), 2)
    unrolled = preferring("unrolled", given)
    assert list(variants_of(unrolled)) == list(variants_of(given))
    np.testing.assert_allclose(unrolled(params, task)[0], given(params, task)[0], rtol=1e-6)


def test_what_a_decorator_copies_is_not_taken_for_its_forms():
    params, tasks = vector_tasks(2)
    per_task = fj.fomaml(quadratic, optax.sgd(0.5), 1)

    @functools.wraps(per_task)
    def doubled(params, task):
        grads, info = per_task(params, task)
        return jax.tree.map(lambda g: 2 * g, grads), info

    plan = fj.tune(doubled, params, tasks)
    found, expected = (fj.over_tasks(f)(params, tasks)[0] for f in (plan.meta_gradient, doubled))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(("limit", "is_less"), [("1000000\n", True), ("max\n", False)])
def test_the_memory_of_a_container_is_known(monkeypatch, limit, is_less):
    monkeypatch.setattr(Path, "read_text", lambda path: limit)
    assert (host_memory.most() == 1e6) == is_less
