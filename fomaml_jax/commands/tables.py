"""Results as lines for people."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fomaml_jax import runs
from fomaml_jax.batch_statistics import ONE_AT_A_TIME, TRANSDUCTIVE

STATISTICS = {
    TRANSDUCTIVE: "query batches normalised together (transductive)",
    ONE_AT_A_TIME: "each query normalised beside the support set alone",
}

FEW = 15
"""With fewer tasks the normal distribution's interval is too narrow by a tenth and more."""


def table(result: dict[str, Any]) -> str:
    """The result as lines for people: each step of adaptation, then the baselines."""
    percent = result["metric"] == "accuracy"
    rows = {_after(row["inner_steps"]): row for row in result["per_step"]}
    rows |= {f"the same, {name}": row for name, row in result["otherwise"].items()}
    rows |= result.get("baselines", {})
    decimals = _decimals(abs(row["mean"]) for row in rows.values() if row["mean"] is not None)

    def line(name: str, row: dict[str, float | None]) -> str:
        scale, digits, unit = (100, 2, " %") if percent else (1, decimals, "")
        found = (row["mean"], row["ci95"])
        mean, ci95 = (math.nan if x is None else scale * x for x in found)
        return f"  {name:<34}{mean:7.{digits}f}{unit} ± {ci95:.{digits}f}"

    normalised = f", {STATISTICS[result['statistics']]}" if result["statistics"] else ""
    head = f"{result['metric']} on {result['num_tasks']} unseen tasks{normalised}"
    foot = "± is a 95 % interval over tasks"
    if result["num_tasks"] < FEW:
        foot += f", too narrow for so few as {result['num_tasks']}, of which little can be said"
    return "\n".join(["", head, "", *(line(*item) for item in rows.items()), "", foot])


def read_table(run: Path, result: dict[str, Any]) -> str:
    """The table of a result that was written before, and may have been damaged since."""
    try:
        return table(result)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{run / runs.RESULT} is not what was written") from None


def _decimals(sizes: Iterable[float]) -> int:
    """Three, or as many as show three digits of the largest, which may be of any unit."""
    largest = max(sizes, default=0.0)
    if largest == 0 or not math.isfinite(largest):
        return 3
    return max(3, 2 - math.floor(math.log10(largest)))


def _after(steps: int) -> str:
    return f"after {steps} step{'s' * (steps > 1)}" if steps else "before adaptation"
