"""First-order meta-learning in JAX."""
