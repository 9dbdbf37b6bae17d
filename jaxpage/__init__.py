"""Paged KV for large language models, as one pure function over JAX arrays."""
