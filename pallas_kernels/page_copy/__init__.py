"""Copies of whole pages within a pool: for copy-on-write, and to pack what is live."""

from pallas_kernels.page_copy.api import conflicts, copy_pages

__all__ = ["conflicts", "copy_pages"]
