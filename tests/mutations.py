"""Small wrongs done to the core, one at a time: does the suite catch every one?

Run it: python tests/mutations.py
Each is done in a copy of the repository, where the tests that should notice are run and must fail.
`test_mutations.py` keeps the list from going stale.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """What is wrong in which file, and the tests that see it."""

    file: str
    right: str
    wrong: str
    tests: str


MUTATIONS = [
    Mutation(
        "adaptation.py",
        "theta = stop(inner.adapted)",
        "theta = inner.adapted",
        "test_adaptation.py test_order.py test_meta_gradients.py",
    ),
    Mutation(
        "adaptation.py",
        "stop = jax.lax.stop_gradient if first_order else lambda x: x",
        "stop = lambda x: x",
        "test_adaptation.py test_meta_gradients.py",
    ),
    Mutation("adaptation.py", "inner.step + 1)", "inner.step)", "test_adaptation.py test_state.py"),
    Mutation(
        "adaptation.py",
        "2 * inner.step + int(query)",
        "inner.step + int(query)",
        "test_state.py",
    ),
    Mutation(
        "adaptation.py",
        "grads = stop(grads)",
        "grads = grads",
        "test_adaptation.py",
    ),
    Mutation(
        "meta_gradients.py",
        "return value, tangents[0] + jnp.asarray(along, value.dtype)",
        "return value, jnp.asarray(along, value.dtype)",
        "test_meta_gradients.py",
    ),
    Mutation(
        "adaptation.py",
        "lambda x: jnp.asarray(x)[step], support",
        "lambda x: jnp.asarray(x)[0], support",
        "test_serial.py test_adaptation.py test_meta_gradients.py",
    ),
    Mutation(
        "meta_gradients.py",
        "jax.tree.map(jnp.subtract, params, adapted)",
        "jax.tree.map(jnp.subtract, adapted, params)",
        "test_algorithms.py",
    ),
    Mutation(
        "meta_gradients.py",
        "first_order=False,",
        "first_order=True,",
        "test_algorithms.py",
    ),
    Mutation(
        "meta_gradients.py",
        "weight = weights[inner.step]",
        "weight = weights[0]",
        "test_algorithms.py",
    ),
    Mutation(
        "rates.py",
        "return (-rate.astype(wide)",
        "return (rate.astype(wide)",
        "test_algorithms.py",
    ),
    Mutation(
        "rates.py",
        "both = accumulator(rate.dtype), accumulator(update.dtype)",
        "both = update.dtype, update.dtype",
        "test_learned_rates.py",
    ),
    Mutation(
        "convolution_primitives.py",
        "like = varying(jnp.zeros(shape, patches.dtype), patches)",
        "like = jnp.zeros(shape, patches.dtype)",
        "test_convolution_primitives.py",
    ),
    Mutation(
        "rates.py",
        "jnp.minimum(state.count, rate.shape[0] - 1)",
        "0 * state.count",
        "test_algorithms.py",
    ),
    Mutation(
        "starts.py",
        "features = jax.lax.stop_gradient(jnp.asarray(features))",
        "features = jnp.asarray(features)",
        "test_starts.py",
    ),
    Mutation(
        "starts.py",
        "grads = back(jax.tree.map(lambda g, x: g.astype(x.dtype), grads, start))[0]",
        "pass",
        "test_starts.py test_algorithms.py",
    ),
    Mutation(
        "starts.py",
        "return grads, finite_with(info, grads)",
        "return grads, info",
        "test_starts.py",
    ),
    Mutation("regressors.py", "believed * above", "above", "test_predicted_rows.py"),
    Mutation(
        "learner.py",
        "if not isinstance(meta_gradient, OverTasks) or meta_gradient.skips:",
        "if False:",
        "test_learner.py",
    ),
    Mutation(
        "uneven.py", "jnp.where(weights > 0, each, jnp.zeros_like(each))", "each", "test_uneven.py"
    ),
    Mutation("schedules.py", "jnp.maximum(remaining, 0.03)", "remaining", "test_schedules.py"),
    Mutation(
        "batch_statistics.py",
        "jnp.concatenate([support, query[None]])",
        "jnp.concatenate([query[None], support])",
        "test_batch_statistics.py",
    ),
    Mutation("evaluation.py", "ddof=1", "ddof=0", "test_evaluation.py"),
    Mutation("learner.py", "state.step + 1", "state.step", "test_learner.py test_training.py"),
    Mutation(
        "tasks.py",
        "jax.random.fold_in(key, step)",
        "jax.random.fold_in(key, 0)",
        "test_tasks.py test_training.py",
    ),
    Mutation(
        "outer_steps.py",
        "jnp.where(reported, jnp.zeros_like(x), x)",
        "x",
        "test_training.py",
    ),
    Mutation(
        "history.py",
        "if not math.isnan(score) and (",
        "if (",
        "test_training.py",
    ),
    Mutation("checkpoints.py", "if found != digest:", "if False:", "test_checkpoints.py"),
    Mutation(
        "shifts.py",
        "angle = jnp.deg2rad(jnp.asarray(degrees, accumulator(x.dtype)))",
        "angle = jnp.deg2rad(jnp.asarray(degrees, x.dtype))",
        "test_shifts.py",
    ),
    Mutation(
        "experiment.py",
        "taken = dataclasses.replace(chosen, steps=max(1, int(trained.state.step)))",
        "taken = chosen",
        "test_cli_resume.py",
    ),
    Mutation(
        "experiment.py",
        "elif runs.is_handed_on(folder, problem.params):",
        "elif False:",
        "test_cli_resume.py",
    ),
    Mutation(
        "order.py", "firsts, seconds = widened(firsts), widened(seconds)", "pass", "test_order.py"
    ),
    Mutation(
        "order.py",
        "theta, frozen = split(trainable, params)",
        "theta, frozen = split(True, params)",
        "test_order.py",
    ),
    Mutation("streams.py", "* 2.0**-31", "* 2.0**-30", "test_streams.py"),
    Mutation("learner.py", "not _tells_apart(opt_state)", "True", "test_state.py"),
    Mutation(
        "keeper.py",
        '_check_identity(folder, notes["identity"], self.identity)',
        "pass",
        "test_training_resumed.py",
    ),
    Mutation("serial.py", "refusals.check_task(task)", "pass", "test_serial.py"),
    Mutation(
        "training.py",
        "            self.go_back()\n\n    def go_back",
        "            self.keeper.save(self.good)\n\n    def go_back",
        "test_training_resumed.py",
    ),
    Mutation(
        "shifts.py",
        "jnp.arange(1 - ways, ways, 2) / (ways - 1)",
        "jnp.linspace(-1.0, 1.0, ways)",
        "test_shifts.py",
    ),
    Mutation("experiment.py", "chosen.patience is None or", "True or", "test_cli_resume.py"),
    Mutation("learner.py", "bool(parted) and not takes_both", "bool(parted)", "test_state.py"),
    Mutation("parallel.py", "t + s.astype(t.dtype)", "t + s", "test_parallel.py"),
    Mutation("refusals.py", "(weight <= 1e20)", "(weight <= 1e39)", "test_parallel.py"),
    Mutation("starts.py", "excess - squares, ", "-squares, ", "test_starts.py"),
    Mutation("parallel.py", "not is_data or any", "any", "test_parallel.py"),
    Mutation("variants.py", '"_fomaml_jax_measured"', '"measured"', "test_parallel.py"),
    Mutation(
        "refusals.py",
        "return jax.tree.structure(tree), leaves",
        "return jax.tree.map(np.shape, tree), leaves",
        "test_parallel.py",
    ),
]


def caught(mutation: Mutation, folder: Path) -> bool:
    """Whether the tests fail in a copy with the wrong in it."""
    copy_to(folder)
    path = folder / "fomaml_jax" / mutation.file
    path.write_text(path.read_text().replace(mutation.right, mutation.wrong, 1))
    return fails(mutation.tests.split(), folder)


def copy_to(folder: Path) -> None:
    """The repository as it is."""
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs")
    shutil.copytree(ROOT, folder, ignore=ignored)


def fails(names: Iterable[str], folder: Path) -> bool:
    """Whether one of these test files does, in a copy."""
    tests = [str(folder / "tests" / name) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    return run.returncode == 1


def main() -> None:
    """Tries them all, and says which got away."""
    escaped = 0
    with tempfile.TemporaryDirectory() as home:
        copy_to(Path(home) / "copy")
        if fails(
            sorted({name for m in MUTATIONS for name in m.tests.split()}), Path(home) / "copy"
        ):
            sys.exit("tests fail without any wrong: they would catch everything")
        for mutation in MUTATIONS:
            verdict = "caught" if caught(mutation, Path(home) / "copy") else "GOT AWAY"
            escaped += verdict != "caught"
            change = f"{mutation.right}  ->  {mutation.wrong}"
            print(f"{verdict:8}  {mutation.file}: {change}", flush=True)  # noqa: T201
    sys.exit(escaped > 0)


if __name__ == "__main__":
    main()
