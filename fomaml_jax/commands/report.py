"""`fomaml-jax report`: runs, side by side, into one page."""

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from fomaml_jax import reports
from fomaml_jax.commands.endings import plain_warnings, refusing
from fomaml_jax.commands.words import check_folder, parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Draws runs side by side, finished or not."""

    runs: Positional[tuple[Path, ...]]
    """Folders that training wrote."""
    out: Path = Path("report")
    """Folder for report.html and the pictures in it."""


def main(words: list[str]) -> None:
    """Reports, as the words after `report` say."""
    asked = parse(Report, "fomaml-jax report", words)
    with refusing(), plain_warnings():
        if not asked.runs:
            raise ValueError("report needs at least one run")
        check_folder(asked.out)
        page = reports.write(asked.runs, asked.out)
    print(f"The report is in {page}, its pictures beside it.")
