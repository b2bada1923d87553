"""Writes README.md from the results, and tables into the project's own and the model card.

No number in these tables is typed by hand.
"""

import argparse
import json
import re
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import ablations
import accuracy
import algorithm_costs
import algorithms
import arrivals
import common
import defaults
import frameworks
import kills
import memory
import meta_step
import peers
import protocols
import rare_objects
import scaling
import shift
import sinusoid
import time_shares
import time_to_accuracy

import fomaml_jax

README = Path(__file__).with_name("README.md")
PROJECT = Path(__file__).parents[1] / "README.md"
EXAMPLES = PROJECT.parent / "examples" / "README.md"
MODEL = Path(fomaml_jax.__file__).parent / "pretrained" / "omniglot" / "MODEL.md"
BENCHMARKS = {
    "meta_step": meta_step,
    "time_shares": time_shares,
    "peers": peers,
    "frameworks": frameworks,
    "memory": memory,
    "scaling": scaling,
    "time_to_accuracy": time_to_accuracy,
    "algorithm_costs": algorithm_costs,
    "kills": kills,
    "defaults": defaults,
    "algorithms": algorithms,
    "accuracy": accuracy,
    "ablations": ablations,
    "protocols": protocols,
    "sinusoid": sinusoid,
    "arrivals": arrivals,
    "shift": shift,
    "rare_objects": rare_objects,
}
MARKED = {
    "defaults": defaults,
    "algorithms": algorithms,
    "accuracy": accuracy,
    "shift": shift,
    "rare_objects": rare_objects,
}

HEAD = """# Benchmarks

Each is one script with `--help`, a table on the screen and JSON in `results/`. This page is
written from that JSON by `python benchmarks/report.py`. Install with

```bash
pip install -e ".[test,patients]"
```

and, for the comparisons with PyTorch, PyTorch itself (into another environment, named by
`--torch-python`, if you like). Where a section does not say otherwise, times are medians of
interleaved rounds with the extremes in brackets, in float32, and compilation is apart. On CPU there
is one JAX device a core unless the line above a table says otherwise, and PyTorch has a thread a
core. Where rows were measured in several runs, that line is of the last.

Scripts write over the results here: give `--out` to keep them.
"""


def main() -> None:
    """Runs from the command line."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    README.write_text(render())
    for path in (PROJECT, EXAMPLES, MODEL):
        path.write_text(with_tables(path))
    print(f"written to {README}, {PROJECT}, {EXAMPLES} and {MODEL}")


def render() -> str:
    """The page."""
    sections = [section(name, module) for name, module in BENCHMARKS.items()]
    return "\n".join([HEAD, *sections])


def with_tables(path: Path) -> str:
    """A page with its marked tables as they were last measured on a CPU."""
    page = path.read_text()
    for name, module in MARKED.items():
        if f"<!-- {name} -->" not in page:
            continue
        marked = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)
        rows = json.loads((common.RESULTS / f"{name}-cpu.json").read_text())["rows"]
        if path == MODEL:  # which is one network
            rows = [row for row in rows if (row.get("recipe"), row.get("seed")) == ("best", 0)]
        shown = module.compact(rows) if hasattr(module, "compact") else tables(module, rows)
        page = marked.sub(f"\n{shown}\n\n", page, count=1)
    return page


def section(name: str, module: ModuleType) -> str:
    """What a script measures, its command, and a table for every result that there is."""
    said = textwrap.dedent(module.__doc__ or "").strip()
    parts = [f"## {name}.py\n", said, f"\n```bash\npython benchmarks/{name}.py\n```\n"]
    for path in sorted(common.RESULTS.glob(f"{name}-*.json")):
        result = json.loads(path.read_text())
        parts.append(f"{about(result)}\n\n{tables(module, result['rows'])}\n")
    return "\n".join(parts)


def tables(module: ModuleType, rows: list[dict[str, Any]]) -> str:
    """As the script shows them, or one of all rows."""
    if hasattr(module, "page"):
        return "\n\n".join(module.page(rows))
    return common.table(module.COLUMNS, rows)


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
