"""`fomaml-jax predict`: an adapted classifier on more pictures, or a table's run on new groups."""

import contextlib
import dataclasses
from pathlib import Path

from tyro.conf import Positional

from fomaml_jax import runs
from fomaml_jax.adapted_files import load_adapted
from fomaml_jax.commands import predicted_rows
from fomaml_jax.commands.endings import REFUSED, plain_warnings, refusing, stop
from fomaml_jax.commands.recognising import Recognise, check_out, read, recognise
from fomaml_jax.commands.words import parse
from fomaml_jax.devices import keep_compiled_programs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict(Recognise):
    """Recognises pictures by a classifier that fomaml-jax adapt --save has kept.

    Of a table: see below.
    """

    adapted: Positional[Path]
    """The file that it wrote."""
    query: Path
    """Folder of the pictures to be recognised, or of class folders, for the accuracy to be told."""


def main(words: list[str]) -> None:
    """Predicts, as the words after `predict` say."""
    if {"-h", "--help"} & {*words}:  # the two forms, one below the other
        with contextlib.suppress(SystemExit):
            parse(Predict, "fomaml-jax predict", ["--help"])
        print()
        predicted_rows.main(["--help"])
    if any(word.split("=")[0] == "--file" for word in words):
        predicted_rows.main(words)
        return
    for run in map(Path, words[:1]):
        if (run / runs.CONFIG).is_file():
            stop(
                f"{run} is a run: to fill in a table's rows by it pass --file FILE, to recognise "
                "pictures adapt it first (fomaml-jax adapt --save)",
                REFUSED,
            )
    asked = parse(Predict, "fomaml-jax predict", words)
    with refusing(), plain_warnings():
        folder = asked.folder
        check_out(folder, overwrite=asked.overwrite, apart=[asked.query])
        keep_compiled_programs(asked.compilation_cache)
        adapted = load_adapted(asked.adapted)
        query = read(asked.query, adapted.chosen, adapted.background, asked.unreadable)
        recognise(adapted, query, asked.query, asked, folder)
