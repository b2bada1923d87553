"""The fastest way to run a meta-gradient over tasks, measured on the user's shapes and device."""

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from fomaml_jax import host_memory, refusals
from fomaml_jax.convolutions import native_convolutions_in
from fomaml_jax.parallel import over_tasks, resolve
from fomaml_jax.types import MetaGradient, Params
from fomaml_jax.variants import as_measured, variants_of

_REPEATS = 5

# A form that takes this many times as long as the best so far on two tasks is not tried on all:
# native convolutions in a loop on CPU can take minutes. Unless all take less than a second: of
# small tasks, most of the time that two take is the call's own.
_HOPELESS = 3.0
_SHORT = 1.0


class Trial(NamedTuple):
    """One way to run, and what came of it.

    Attributes:
        variant: the form of the per-task function.
        tasks_at_once: how many tasks ran together.
        seconds: the median of several runs, compilation apart; `None` where it did not run.
        compile_seconds: tracing and compilation.
        temp_bytes: the compiled program's temporary memory on each device, as XLA plans it.
        note: why it did not run, or is not a candidate.
    """

    variant: str
    tasks_at_once: int
    seconds: float | None
    compile_seconds: float
    temp_bytes: int
    note: str = ""


class Plan(NamedTuple):
    """The fastest way found; `str` of it is a table of all that was tried.

    Attributes:
        meta_gradient: the per-task function, in its fastest form.
        tasks_at_once: what to pass to `over_tasks` with it.
        variant: the form's name.
        trials: everything that was tried, in that order.
    """

    meta_gradient: MetaGradient
    tasks_at_once: int
    variant: str
    trials: tuple[Trial, ...]

    def __str__(self) -> str:
        """A line for every trial, the chosen one marked."""
        width = max(len(trial.variant) for trial in self.trials)
        lines = [f"  {'form':<{width}}  tasks at once      time    memory  compile"]
        for trial in self.trials:
            chosen = (trial.variant, trial.tasks_at_once) == (self.variant, self.tasks_at_once)
            took = "-" if trial.seconds is None else f"{1e3 * trial.seconds:.1f} ms"
            lines.append(
                f"{'>' if chosen else ' '} {trial.variant:<{width}}  {trial.tasks_at_once:13d}"
                f"{took:>10}{trial.temp_bytes / 2**20:6.0f} MiB {trial.compile_seconds:6.1f} s"
                f"  {trial.note}".rstrip()
            )
        return "\n".join(lines)


def tune(
    meta_gradient: MetaGradient | Mapping[str, MetaGradient],
    params: Params,
    tasks: Any,
    *,
    mesh: jax.sharding.Mesh | None = None,
    max_seconds: float = 120.0,
) -> Plan:
    """Measures how to run a meta-batch, and returns the fastest plan that fits in memory.

    First the forms of the per-task function (convolutions native or as matrix products, the inner
    loop rolled or unrolled) with the tasks at once that `over_tasks` would choose; then, for the
    best form, tasks at once in 1, 2, 4, ..., all; the closest are measured again in turn. Every
    plan computes the same numbers up to the order of summation.

    Args:
        meta_gradient: what `fomaml`, `maml` or `reptile` returned; or any per-task function, of
            which there is only the form given; or several by name, to choose among.
        params: the shared parameters.
        tasks: a meta-batch of the size that training will use; keys, where a sampler is composed
            into the per-task function.
        mesh: as in `over_tasks`; tasks at once are then those of one device.
        max_seconds: no new trial begins after this; those begun are finished.

    Returns:
        A `Plan`, to be used as
        `over_tasks(plan.meta_gradient, tasks_at_once=plan.tasks_at_once, mesh=mesh)`.

    Raises:
        ValueError: as `over_tasks` does; or if nothing fits in memory, with what was tried.

    Example:
        >>> import jax.numpy as jnp, optax, fomaml_jax as fj
        >>> loss = lambda theta, centre: 0.5 * jnp.sum((theta - centre) ** 2)
        >>> tasks = fj.Task(jnp.ones((4, 3)), jnp.ones((4, 3)))
        >>> plan = fj.tune(fj.fomaml(loss, optax.sgd(0.5), num_steps=1), jnp.zeros(3), tasks)
        >>> meta_gradient = fj.over_tasks(plan.meta_gradient, tasks_at_once=plan.tasks_at_once)
        >>> meta_gradient(jnp.zeros(3), tasks)[0]
        Array([-0.5, -0.5, -0.5], dtype=float32)
    """
    num_tasks = refusals.check_task_axis(tasks)
    refusals.check_params(params)
    if mesh is not None:
        refusals.check_divides(num_tasks, mesh)
    search = _Search(_forms(meta_gradient, params, tasks), params, tasks, mesh, max_seconds)
    most = num_tasks if mesh is None else num_tasks // mesh.size
    automatic = resolve("auto", most)
    for form in search.forms:
        search.try_out(form, automatic)
    best = search.best()
    for size in _sizes(most):
        search.try_out(best.variant, size)
    chosen = search.best_of_rerun()
    fastest = as_measured(search.forms[chosen.variant])
    return Plan(fastest, chosen.tasks_at_once, chosen.variant, tuple(search.trials))


def _forms(
    meta_gradient: MetaGradient | Mapping[str, MetaGradient], params: Params, tasks: Any
) -> dict[str, MetaGradient]:
    if isinstance(meta_gradient, Mapping):
        if not meta_gradient:
            raise ValueError("meta_gradient must name at least one form to choose, got none")
        return dict(meta_gradient)
    refusals.check_function("meta_gradient", meta_gradient, "(params, task) -> (grads, TaskInfo)")
    forms = variants_of(meta_gradient)
    one_task = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tasks)
    first = next(iter(forms.values()))
    if native_convolutions_in(first, params, one_task) != 0:
        # The products first: they set the time that native ones must not be hopeless against.
        return dict(sorted(forms.items(), key=lambda item: "matmul" not in item[0]))
    return {name: form for name, form in forms.items() if "matmul" not in name}


def _sizes(most: int) -> Iterator[int]:
    """1, 2, 4, ... and all."""
    powers = itertools.takewhile(lambda n: n < most, (2**k for k in itertools.count()))
    yield from (*powers, most)


class _Search:
    """What has been tried so far, and the compiled programs of what ran."""

    def __init__(self, forms, params, tasks, mesh, max_seconds):
        self.forms: dict[str, MetaGradient] = forms
        self.trials: list[Trial] = []
        self._programs: dict[tuple[str, int], Callable[[], Any]] = {}
        self._params, self._tasks, self._mesh = params, tasks, mesh
        self._deadline = time.monotonic() + max_seconds

    def try_out(self, variant: str, size: int) -> None:
        """Adds a trial, unless it is there already or time is up."""
        done = any((t.variant, t.tasks_at_once) == (variant, size) for t in self.trials)
        if done or (self.trials and time.monotonic() > self._deadline):
            return
        hopeless = self._hopeless(variant)
        self.trials.append(hopeless if hopeless else self._measure(variant, size, self._tasks))

    def best(self) -> Trial:
        """The fastest so far."""
        ran = [trial for trial in self.trials if trial.seconds is not None]
        if not ran:
            plan = Plan(next(iter(self.forms.values())), 0, "", tuple(self.trials))
            raise ValueError(f"no way to run these tasks worked:\n{plan}")
        return min(ran, key=lambda trial: trial.seconds or 0)

    def best_of_rerun(self) -> Trial:
        """The fastest when the closest run again in turn, so that a passing load misleads less."""
        limit = 1.2 * (self.best().seconds or 0)
        close = [t for t in self.trials if t.seconds is not None and t.seconds <= limit]
        if len(close) == 1:
            return close[0]
        times: dict[Trial, list[float]] = {trial: [] for trial in close}
        for _ in range(_REPEATS):
            for trial in close:
                times[trial].append(_seconds(self._programs[trial.variant, trial.tasks_at_once]))
        again = [t._replace(seconds=statistics.median(taken)) for t, taken in times.items()]
        for trial, rerun in zip(close, again, strict=True):
            self.trials[self.trials.index(trial)] = rerun
        return min(again, key=lambda trial: trial.seconds or 0)

    def _hopeless(self, variant: str) -> Trial | None:
        """Two tasks in turn, before all of them, for a form that may be very slow on CPU."""
        ran = [trial for trial in self.trials if trial.seconds is not None]
        tried = any(trial.variant == variant for trial in self.trials)
        if not ran or tried or jax.default_backend() != "cpu":
            return None
        count = 2 * (1 if self._mesh is None else self._mesh.size)
        if count >= refusals.check_task_axis(self._tasks):
            return None
        few = jax.tree.map(lambda x: x[:count], self._tasks)
        trial = self._measure(variant, 1, few, repeats=1)
        share = count / refusals.check_task_axis(self._tasks)
        best = self.best().seconds or 0
        if trial.seconds is None or trial.seconds > max(_HOPELESS * best, _SHORT) * share:
            return trial._replace(seconds=None, note=trial.note or "much slower on a few tasks")
        return None

    def _measure(self, variant, size, tasks, repeats=_REPEATS) -> Trial:
        run = over_tasks(self.forms[variant], tasks_at_once=size, mesh=self._mesh)
        trial = Trial(variant, size, None, 0.0, 0)
        try:
            start = time.perf_counter()
            with warnings.catch_warnings():  # that native convolutions are slow is being measured
                warnings.filterwarnings("ignore", "this loss holds native convolutions")
                compiled = jax.jit(run).lower(self._params, tasks).compile()
            planned = compiled.memory_analysis()
            trial = trial._replace(
                compile_seconds=time.perf_counter() - start,
                temp_bytes=planned.temp_size_in_bytes if planned else 0,
            )
            memory = _memory_bytes()
            if trial.temp_bytes > memory:
                return trial._replace(
                    note=f"needs more than the {memory / 2**20:.0f} MiB there are"
                )

            def program():
                return compiled(self._params, tasks)

            _seconds(program)
            seconds = statistics.median(_seconds(program) for _ in range(repeats))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return trial._replace(note="out of memory")
        self._programs[variant, size] = program
        return trial._replace(seconds=seconds)


def _seconds(program: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program())
    return time.perf_counter() - start


def _memory_bytes() -> float:
    """Free memory of the device; where it has none of its own, what this process may use."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return host_memory.most()
