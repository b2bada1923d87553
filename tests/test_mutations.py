"""The list of mutations is about the code as it is."""

import pytest
from mutations import MUTATIONS, ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.file}: {m.right[:30]}")
def test_what_is_mutated_is_there(mutation):
    assert mutation.right in (ROOT / "fomaml_jax" / mutation.file).read_text()
    assert mutation.wrong != mutation.right
    for name in mutation.tests.split():
        assert (ROOT / "tests" / name).is_file()
