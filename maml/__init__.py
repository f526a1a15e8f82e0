"""MAML and its relatives in JAX: inner loops, and the ways to differentiate through them."""
