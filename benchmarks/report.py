"""Writes README.md from the results: no number in it is typed by hand."""

import argparse
import json
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import common
import frameworks
import memory
import meta_step
import peers
import time_shares
import time_to_accuracy

README = Path(__file__).with_name("README.md")
BENCHMARKS = {
    "meta_step": meta_step,
    "time_shares": time_shares,
    "peers": peers,
    "frameworks": frameworks,
    "memory": memory,
    "time_to_accuracy": time_to_accuracy,
}

HEAD = """# Benchmarks

Each is one script with `--help`, a table on the screen and JSON in `results/`. This page is
written from that JSON by `python benchmarks/report.py`. Install with

```bash
pip install -e ".[test,cli]"
```

and, for the comparisons with PyTorch, PyTorch itself (into another environment, named by
`--torch-python`, if you like). Times are medians of interleaved rounds with the extremes in
brackets, in float32 unless said otherwise; compilation is apart. On CPU there is one JAX device a
core, and PyTorch has as many threads. A ratio above 1 means that ours is faster.
"""


def main() -> None:
    """Runs from the command line."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    README.write_text(render())
    print(f"written to {README}")


def render() -> str:
    """The page."""
    sections = [section(name, module) for name, module in BENCHMARKS.items()]
    return "\n".join([HEAD, *sections])


def section(name: str, module: ModuleType) -> str:
    """What a script measures, its command, and a table for every result that there is."""
    said = textwrap.dedent(module.__doc__ or "").strip()
    parts = [f"## {name}.py\n", said, f"\n```bash\npython benchmarks/{name}.py\n```\n"]
    for path in sorted(common.RESULTS.glob(f"{name}-*.json")):
        result = json.loads(path.read_text())
        parts.append(f"{about(result)}\n\n{common.table(module.COLUMNS, result['rows'])}\n")
    return "\n".join(parts)


def about(result: dict[str, Any]) -> str:
    """Where the numbers come from."""
    there = result["environment"]
    versions = there["versions"]
    torch = next((row["torch"] for row in result["rows"] if row.get("torch")), None)
    with_torch = f", PyTorch {torch['torch']} with {torch['threads']} threads" if torch else ""
    return (
        f"{there['device']}, {there['devices']} JAX devices, jax {versions['jax']}{with_torch}, "
        f"Python {versions['python']}, matrix precision {there['matmul_precision']}, "
        f"commit {there['commit']}, {there['date']}:"
    )


if __name__ == "__main__":
    main()
