"""Meta-learning from a stream: each task is judged when met, remembered, and learned from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fomaml_jax import refusals
from fomaml_jax.change_detection import Change, ChangeDetector, cusum
from fomaml_jax.learner import MetaState, StepInfo, meta_learner
from fomaml_jax.types import MetaGradient, Params, TaskInfo


class Memory(NamedTuple):
    """The last tasks of a stream.

    Attributes:
        tasks: leaves `[capacity, ...]`; arrival `i` is in place `i % capacity`.
        arrivals: `[]` int32, tasks put in so far.
        remembered: `[]` int32, how many of the last ones count.
    """

    tasks: Any
    arrivals: jax.Array
    remembered: jax.Array


class OnlineState(NamedTuple):
    """All that goes from arrival to arrival: arrays whose shapes never change.

    Attributes:
        learner: the shared parameters, the outer optimizer's state and the outer steps taken.
        memory: the tasks to learn from.
        detector: the change detector's state.
        key: the PRNG key behind the draws from memory; only folded.
    """

    learner: MetaState
    memory: Memory
    detector: Any
    key: jax.Array


class Arrival(NamedTuple):
    """What one arrival saw.

    Attributes:
        loss: `[]`, the query loss after adaptation to the support set, from parameters that had
            never seen this task: the prequential loss, whose sum over arrivals is to be low.
        task: the `TaskInfo` behind it.
        change: what the detector says of the support loss before adaptation.
        steps: a `StepInfo` with a leading `[steps_per_arrival]` axis, of what was learned then.
    """

    loss: jax.Array
    task: TaskInfo
    change: Change
    steps: StepInfo


class OnlineLearner(NamedTuple):
    """Meta-learning from a stream as two pure functions.

    Attributes:
        init: `(params, task, key) -> OnlineState`; of the task only structure, shapes and dtypes
            count.
        step: `(state, task) -> (OnlineState, Arrival)`; wrap it in `jax.jit`, `jax.lax.scan` over a
            stream, or `jax.vmap` over streams.
    """

    init: Callable[[Params, Any, jax.Array], OnlineState]
    step: Callable[[OnlineState, Any], tuple[OnlineState, Arrival]]


def online(
    meta_gradient: MetaGradient,
    optimizer: optax.GradientTransformation,
    *,
    capacity: int = 100,
    steps_per_arrival: int = 1,
    tasks_per_step: int = 10,
    detector: ChangeDetector | None = None,
) -> OnlineLearner:
    r"""Follow the meta-leader in a changing world, at the same cost for every arrival.

    A task that arrives is first adapted to and judged, from the parameters as they are; then it is
    remembered, and `steps_per_arrival` outer steps follow, each on `tasks_per_step` tasks drawn
    uniformly, with replacement, from the last `capacity` ones. This is FTML,

    .. math:: \theta_{t+1} \approx \arg\min_\theta \sum_{i \le t} L_i(\mathrm{adapt}_i(\theta)),

    but for the sum, which is over what is remembered, and the minimum, which is approached by a
    bounded number of steps: the published algorithm keeps all tasks.

    The detector is shown each support loss before adaptation. Where it sees that a new kind of task
    has begun to arrive, the tasks before the change are forgotten: the meta-steps of this very
    arrival already draw from the new kind alone. Forgetting can pay where `capacity` is large
    against the time from jump to jump; in `examples/stream.py`, which remembers 50 tasks and has
    jumps 150 arrivals apart, it made no clear difference, as old tasks soon leave by age. A rise
    that the losses hide, because tasks differ much among themselves or the distribution drifts
    meanwhile, is found late or not at all; one task whose loss is far off is taken for a jump.

    Args:
        meta_gradient: `(params, tasks) -> (mean grads, TaskInfo)`: the result of `over_tasks`
            around any algorithm with at least one inner step. It also does the adapting and
            judging. Tasks that are not finite are left out of each mean as it says.
        optimizer: the outer one, any optax transformation.
        capacity: tasks that are remembered; the memory of a state grows with it. A `KeyedTask` is
            remembered with its key: whenever it is drawn, its loss draws the same random numbers.
        steps_per_arrival: outer steps after each arrival.
        tasks_per_step: tasks in each of them.
        detector: a change detector: `cusum()` unless given.

    Returns:
        An `OnlineLearner`. A state that was saved, with `fomaml_jax.checkpoints`, Orbax or
        `numpy.savez` (with `jax.random.key_data` of its key), goes on bit for bit.

    Raises:
        TypeError: for an optimizer that is not one, a detector that is none, a task that holds
            what is not an array.
        ValueError: for counts below 1, a meta-gradient for a single task or without inner steps, a
            task that is not like the one that `init` was given.

    Example:
        >>> import jax, jax.numpy as jnp, optax, fomaml_jax as fj
        >>> loss = lambda theta, centres: 0.5 * jnp.mean((theta - centres) ** 2)
        >>> def family(key, level):
        ...     x = level + 0.1 * jax.random.normal(key, (6,))
        ...     return fj.Task(support=x[:2], query=x[2:])
        >>> path = lambda key, index: jnp.where(index < 60, 0.0, 5.0)
        >>> stream = fj.tasks.drifting(family, path)
        >>> learner = fj.online(
        ...     fj.over_tasks(fj.fomaml(loss, optax.sgd(0.5), num_steps=1)), optax.sgd(0.3)
        ... )
        >>> def arrive(state, index):
        ...     return learner.step(state, stream(jax.random.key(0), index))
        >>> state = learner.init(jnp.zeros(()), stream(jax.random.key(0), 0), jax.random.key(1))
        >>> state, arrivals = jax.lax.scan(arrive, state, jnp.arange(100))
        >>> jnp.flatnonzero(arrivals.change.jump), int(state.memory.remembered)
        (Array([60], dtype=int32), 40)

    References:
        Finn, Rajeswaran, Kakade, Levine, `Online Meta-Learning <https://arxiv.org/abs/1902.08438>`_,
        2019; Dawid, `The prequential approach <https://doi.org/10.2307/2981683>`_, 1984.
    """
    for name, count in {
        "capacity": capacity,
        "steps_per_arrival": steps_per_arrival,
        "tasks_per_step": tasks_per_step,
    }.items():
        refusals.check_at_least(name, count, 1)
    detector = cusum() if detector is None else detector
    if not isinstance(detector, ChangeDetector):
        raise TypeError(f"detector must be a ChangeDetector, such as cusum(), got {detector!r}")
    learner = meta_learner(meta_gradient, optimizer)

    def init(params: Params, task: Any, key: jax.Array) -> OnlineState:
        refusals.check_key(key)
        return OnlineState(learner.init(params), empty_memory(task, capacity), detector.init(), key)

    def step(state: OnlineState, task: Any) -> tuple[OnlineState, Arrival]:
        if not all(hasattr(state, name) for name in OnlineState._fields):
            raise TypeError(f"state must be what init or step gave, got a {type(state).__name__}")
        refusals.check_arrays("task", task)
        state, task = jax.tree.map(jnp.asarray, (state, task))  # they may come from a file
        refusals.check_same_task(task, jax.tree.map(lambda x: x[0], state.memory.tasks))
        judged = _judged(meta_gradient, state.learner.params, task)
        # What cannot be learned from is no reason to forget what can.
        first_loss = jnp.where(judged.finite, judged.support_losses[0], jnp.nan)
        watched, change = detector.step(state.detector, first_loss)
        memory = remember(state.memory, task)
        kept = jnp.where(change.jump, change.since, capacity)
        memory = memory._replace(remembered=jnp.minimum(memory.remembered, kept))
        arrival_key = jax.random.fold_in(state.key, state.memory.arrivals)

        def meta_step(learned: MetaState, i: jax.Array) -> tuple[MetaState, StepInfo]:
            tasks = draw(memory, jax.random.fold_in(arrival_key, i), tasks_per_step)
            return learner.step(learned, tasks)

        learned, steps = jax.lax.scan(meta_step, state.learner, jnp.arange(steps_per_arrival))
        after = OnlineState(learned, memory, watched, state.key)
        return after, Arrival(judged.query_loss, judged, change, steps)

    return OnlineLearner(init, step)


def empty_memory(task: Any, capacity: int) -> Memory:
    """Room for so many tasks like this one."""
    refusals.check_arrays("task", task)
    rooms = jax.tree.map(lambda x: jnp.repeat(jnp.zeros_like(x)[None], capacity, 0), task)
    return Memory(rooms, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def remember(memory: Memory, task: Any) -> Memory:
    """The memory with one task more, in the place of the oldest where it is full."""
    capacity = jax.tree.leaves(memory.tasks)[0].shape[0]
    place = memory.arrivals % capacity
    tasks = jax.tree.map(lambda old, new: old.at[place].set(new), memory.tasks, task)
    return Memory(tasks, memory.arrivals + 1, jnp.minimum(memory.remembered + 1, capacity))


def draw(memory: Memory, key: jax.Array, num_tasks: int) -> Any:
    """A meta-batch of remembered tasks, uniform and with replacement."""
    capacity = jax.tree.leaves(memory.tasks)[0].shape[0]
    ages = jax.random.randint(key, (num_tasks,), 1, memory.remembered + 1, jnp.int32)
    return jax.tree.map(lambda x: x[(memory.arrivals - ages) % capacity], memory.tasks)


def _judged(meta_gradient: MetaGradient, params: Params, task: Any) -> TaskInfo:
    """What the algorithm sees of one task."""
    copies = getattr(meta_gradient, "devices", 1)  # a mesh has a task for every device
    _, info = meta_gradient(params, jax.tree.map(lambda x: jnp.repeat(x[None], copies, 0), task))
    refusals.check_over_tasks(info)
    if not info.support_losses.shape[1]:
        raise ValueError(
            "meta_gradient has no inner steps, so no support loss; pass num_steps >= 1"
        )
    return jax.tree.map(lambda x: x[0], info)
