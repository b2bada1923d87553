"""`python -m fomaml_jax` is `fomaml-jax`."""

from fomaml_jax.cli import main

main()
