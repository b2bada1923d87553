"""Results as lines for people."""

import math
from pathlib import Path
from typing import Any

from fomaml_jax import options, runs
from fomaml_jax.batch_statistics import ONE_AT_A_TIME, TRANSDUCTIVE
from fomaml_jax.wording import caveat, counted, decimals

STATISTICS = {
    TRANSDUCTIVE: "query batches normalised together (transductive)",
    ONE_AT_A_TIME: "each query normalised beside the support set alone",
}


def table(result: dict[str, Any]) -> str:
    """The result as lines for people: each step of adaptation, then the baselines."""
    percent = result["metric"] == options.ACCURACY
    of_groups = result.get("dataset") == "table"  # whose start is not the same for every task
    start = "at the level of the rows given" if of_groups else "before adaptation"
    rows = {_after(row["inner_steps"], start): row for row in result["per_step"]}
    rows |= {f"the same, {name}": row for name, row in result["otherwise"].items()}
    rows |= result.get("baselines", {}) | result.get("against", {})
    places = decimals(abs(row["mean"]) for row in rows.values() if row["mean"] is not None)

    def line(name: str, row: dict[str, float | None]) -> str:
        scale, digits, unit = (100, 2, " %") if percent else (1, places, "")
        mean, ci95 = _mean_and_ci95(row)
        return f"  {name:<34}{scale * mean:7.{digits}f}{unit} ± {scale * ci95:.{digits}f}"

    normalised = f", {STATISTICS[result['statistics']]}" if result["statistics"] else ""
    head = f"{result['metric']} on {result['num_tasks']} unseen tasks{normalised}"
    foot = "± is a 95 % interval over tasks" + caveat(result["num_tasks"])
    lines = [head, "", *(line(*item) for item in rows.items()), "", foot, *_against_it(result)]
    return "\n".join(["", *lines])


def _against_it(result: dict[str, Any]) -> list[str]:
    """What a reader should see first, if it is so: that something simpler is better."""
    lower_is_better = result["metric"] != options.ACCURACY

    def is_better(row: dict[str, float | None]) -> bool:
        (theirs, their_ci95), (ours, our_ci95) = _mean_and_ci95(row), _mean_and_ci95(result)
        return (ours - theirs if lower_is_better else theirs - ours) > their_ci95 + our_ci95

    lines = []
    if is_better(result["per_step"][0]):
        lines.append("adaptation makes it worse here: lower --inner-rate, or train for longer")
    better = [name for name, row in result.get("baselines", {}).items() if is_better(row)]
    return lines + [f"better than this here: {', '.join(better)}"] * bool(better)


def read_table(run: Path, result: dict[str, Any]) -> str:
    """The table of a result that was written before, and may have been damaged since."""
    try:
        return table(result)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{run / runs.RESULT} is not what was written") from None


def _mean_and_ci95(row: dict[str, float | None]) -> tuple[float, float]:
    """NaN where there is none."""
    mean, ci95 = (row[name] for name in ("mean", "ci95"))
    return math.nan if mean is None else mean, math.nan if ci95 is None else ci95


def _after(steps: int, start: str) -> str:
    return f"after {counted(steps, 'step')}" if steps else start
