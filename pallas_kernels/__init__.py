"""Attention kernels for paged KV caches, usable alone by any JAX project."""
