"""A changing world: tasks come one at a time, from a distribution that drifts and jumps.

Sine waves about a centre that wanders slowly and, every 150 tasks or so, is somewhere else at a
stroke. Six ways to meet them start from the same meta-learned parameters (or from none), with each
rate the best of its grid on other streams. Run it: python examples/stream.py
(what is published was written with --out examples/results/stream.json).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import fomaml_jax as fj

INNER_STEPS = 5
DRIFT = 0.001  # of its range, each number of the centre, from arrival to arrival
EVERY, WINDOW = 5, 6  # what is kept of a curve: every fifth arrival; what is drawn: the last thirty
COLORS = ("#c2410c", "#f59e0b", "#1d4ed8", "#15803d", "#222222", "#999999")
CENTRES = fj.tasks.Waves(
    amplitude=(1.0, 4.0), phase=(0.0, 6.0), frequency=(0.5, 1.5), level=(-2.0, 2.0)
)
SPREAD = fj.tasks.Waves(amplitude=1.0, phase=np.pi / 2, frequency=0.0, level=0.5)
LOW, HIGH = (fj.tasks.Waves(*ends) for ends in zip(*CENTRES, strict=True))

family = fj.tasks.sine_waves(SPREAD, shots=5, queries=10)
path = fj.tasks.drift_and_jumps(LOW, HIGH, drift=DRIFT, jump_every=150)
stream = fj.tasks.drifting(family, path)
net = fj.models.mlp(hidden=(40, 40), outputs=1)


def loss_fn(params, batch):
    """Mean squared error."""
    x, y = batch
    return jnp.mean((net.apply(params, x) - y) ** 2)


def clipped(rate, make=optax.sgd):
    """An inner optimizer that five points near the ends of a steep wave do not make diverge."""
    return optax.chain(optax.clip_by_global_norm(10.0), make(rate))


def meta_trained(key, steps=3000):
    """A start for all that may come: meta-trained on waves about centres from the whole box."""
    anywhere = fj.tasks.drifting(family, fj.tasks.drift_and_jumps(LOW, HIGH, jump_every=1))
    meta_gradient = fj.over_tasks(
        fj.fomaml(loss_fn, clipped(0.02), INNER_STEPS), tasks_at_once=None
    )
    learner = fj.meta_learner(meta_gradient, optax.adam(optax.cosine_decay_schedule(2e-3, steps)))
    init_key, task_key = jax.random.split(key)

    def step(state, _):
        tasks = jax.vmap(anywhere, (None, 0))(task_key, 25 * state.step + jnp.arange(25))
        return learner.step(state, tasks)[0], None

    state = learner.init(net.init(init_key, jnp.zeros((1, 1))))
    return jax.lax.scan(step, state, length=steps)[0].params


# Each way to meet a stream is `(start, rate) -> (state, step)`, where `step(state, task)` gives the
# next state, and the query loss after adaptation to the support set, before the query was seen.


def online(start, rate, make_meta_gradient=fj.fomaml, detector=None):
    """Meta-learning goes on: `fj.online` with an outer Adam at this rate."""
    meta_gradient = make_meta_gradient(loss_fn, clipped(0.02), INNER_STEPS)
    learner = fj.online(
        fj.over_tasks(meta_gradient, tasks_at_once=None),
        optax.adam(rate),
        capacity=50,
        steps_per_arrival=4,
        tasks_per_step=10,
        detector=detector,
    )

    def step(state, task):
        state, arrival = learner.step(state, task)
        return state, (arrival.loss, arrival.change.jump)

    example = stream(jax.random.key(0), 0)
    return learner.init(start, example, jax.random.key(0)), step


def never_forgetting(start, rate):
    """The same with a detector that sees no jump: old tasks leave the memory by age alone."""
    return online(start, rate, detector=fj.cusum(false_alarm_every=1e30))


def joint(loss_fn, inner, num_steps):
    """Plain training on support and query together, in the form of an algorithm."""
    judge = fj.fomaml(loss_fn, inner, num_steps)

    def meta_gradient(params, task):
        everything = jax.tree.map(lambda *x: jnp.concatenate(x), *task)
        return jax.grad(loss_fn)(params, everything), judge(params, task)[1]

    return meta_gradient


def joint_training(start, rate):
    """The same memory, detector and number of steps, without the meta-gradient."""
    return online(start, rate, joint)


def static(start, rate):
    """The meta-learned start as it is, with this inner rate."""

    def step(params, task):
        adapted, _ = fj.adapt(loss_fn, params, task.support, clipped(rate), INNER_STEPS)
        return params, (loss_fn(adapted, task.query), False)

    return start, step


def fine_tuning(start, rate):
    """One set of parameters, tuned on every task in turn: before it is judged and after."""
    inner, again = clipped(rate), 10 * INNER_STEPS

    def step(params, task):
        adapted, _ = fj.adapt(loss_fn, params, task.support, inner, INNER_STEPS)
        everything = jax.tree.map(lambda *x: jnp.concatenate(x), *task)
        tuned, _ = fj.adapt(loss_fn, adapted, everything, inner, again)
        return tuned, (loss_fn(adapted, task.query), False)

    return start, step


def from_scratch(start, rate):
    """For each task a network from random parameters: 100 steps of Adam on its support set."""
    fresh = net.init(jax.random.key(0), jnp.zeros((1, 1)))

    def step(state, task):
        adapted, _ = fj.adapt(loss_fn, fresh, task.support, optax.adam(rate), 100)
        return state, (loss_fn(adapted, task.query), False)

    return jnp.zeros(()), step


WAYS = {
    "online FOMAML": (online, [1e-3, 3e-3, 1e-2, 3e-2]),
    "the same, never forgetting": (never_forgetting, [1e-3, 3e-3, 1e-2]),
    "joint training on the memory": (joint_training, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
    "continued fine-tuning": (fine_tuning, [3e-3, 0.01, 0.02, 0.05, 0.1]),
    "static meta-learned start": (static, [0.01, 0.02, 0.03, 0.05]),
    "training from scratch": (from_scratch, [1e-5, 3e-5, 1e-4, 3e-4, 1e-3]),
}


def losses_on(make, start, rate, key, arrivals):
    """The losses `[arrivals]` of one way on one stream, and where it saw jumps."""
    state, step = make(start, rate)
    _, seen = jax.lax.scan(lambda s, i: step(s, stream(key, i)), state, jnp.arange(arrivals))
    return seen


def compared(start, name, seeds, tuning_seeds, arrivals, tuning_arrivals):
    """One way on all streams, at the rate that was best on the tuning streams."""
    make, grid = WAYS[name]
    on_streams = jax.vmap(losses_on, (None, None, None, 0, None))
    tune = jax.vmap(
        lambda rate, keys: on_streams(make, start, rate, keys, tuning_arrivals), (0, None)
    )
    tuning, _ = jax.jit(tune)(jnp.array(grid), jax.vmap(jax.random.key)(jnp.array(tuning_seeds)))
    means = np.asarray(tuning).mean((1, 2))
    rate = grid[int(np.nanargmin(means))]
    run = jax.jit(lambda keys: on_streams(make, start, rate, keys, arrivals))
    losses, alarms = map(np.asarray, run(jax.vmap(jax.random.key)(jnp.array(seeds))))
    return {
        "rate": rate,
        "tuning": dict(zip(map(str, grid), rounded(means, 3), strict=True)),
        "mean_loss": rounded(losses.mean(1), 4),
        "cumulative": rounded(losses.cumsum(1)[:, EVERY - 1 :: EVERY], 1),
        "alarms": [np.flatnonzero(of_seed).tolist() for of_seed in alarms],
    }


def rounded(numbers, digits):
    """As JSON has them."""
    return np.asarray(numbers, float).round(digits).tolist()


def jumps_of(seed, arrivals):
    """The arrivals at which the centre of a stream is elsewhere at a stroke."""
    centres: Any = fj.tasks.drifting(lambda key, centre: centre, path)
    found = jax.vmap(centres, (None, 0))(jax.random.key(seed), jnp.arange(arrivals))
    far = [
        np.abs(np.diff(np.asarray(x))) > 1.5 * DRIFT * (high - low)
        for x, low, high in zip(found, LOW, HIGH, strict=True)
    ]
    return (np.flatnonzero(np.any(far, axis=0)) + 1).tolist()


def draw(result, path):
    """The cumulative losses, and one stream from near."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, (name, way) in zip(COLORS, result["ways"].items(), strict=False):
        curves = np.array(way["cumulative"])
        places = EVERY * (1 + np.arange(curves.shape[1]))
        left.plot(places, curves.T, color=color, lw=0.5, alpha=0.4)
        label = f"{name}, {np.mean(way['mean_loss']):.2f} an arrival"
        left.plot(places, curves.mean(0), color=color, lw=1.8, label=label)
        recent = (curves[0, WINDOW:] - curves[0, :-WINDOW]) / (WINDOW * EVERY)
        right.plot(places[WINDOW:], recent, color=color, lw=1.2)
    for place in result["jumps"][0]:
        right.axvline(place, color="#999999", lw=0.8, ls=":")
    alarms = result["ways"]["online FOMAML"]["alarms"][0]
    right.plot(alarms, [1.02] * len(alarms), "v", color=COLORS[0], ms=5, clip_on=False,
               transform=right.get_xaxis_transform())  # fmt: skip
    ends = [np.max(way["cumulative"]) for way in result["ways"].values()]
    shown = 1.05 * sorted(ends)[-2]  # training from scratch leaves the frame
    left.set(xlabel="arrivals", ylabel="cumulative query loss", ylim=(0, shown))
    right.set(xlabel="arrivals", ylabel=f"mean of the last {WINDOW * EVERY}", yscale="log")
    right.set_title("one stream; dotted: it jumps, triangles: seen online", fontsize=9, pad=10)
    labelled = left.get_legend_handles_labels()
    figure.legend(*labelled, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=80)


def main():
    """Compares the six ways, and writes a JSON file and a picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arrivals", type=int, default=800, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="streams")
    parser.add_argument("--tuning-seeds", type=int, nargs="+", default=[100, 101])
    parser.add_argument("--tuning-arrivals", type=int, default=400, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default="stream.json", help="JSON, a picture beside it")
    asked = parser.parse_args()
    start = jax.jit(meta_trained)(jax.random.key(7))
    result: dict[str, Any] = {
        "seeds": asked.seeds,
        "tuning_seeds": asked.tuning_seeds,
        "arrivals": asked.arrivals,
        "tuning_arrivals": asked.tuning_arrivals,
        "every": EVERY,
        "jumps": [jumps_of(seed, asked.arrivals) for seed in asked.seeds],
        "ways": {},
    }
    sizes = asked.seeds, asked.tuning_seeds, asked.arrivals, asked.tuning_arrivals
    for name in WAYS:
        result["ways"][name] = way = compared(start, name, *sizes)
        losses = ", ".join(f"{loss:.2f}" for loss in way["mean_loss"])
        print(f"{name:28}  mean loss {losses} on streams {asked.seeds}, at rate {way['rate']}")
    asked.out.write_text(json.dumps(result) + "\n")
    draw(result, asked.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
