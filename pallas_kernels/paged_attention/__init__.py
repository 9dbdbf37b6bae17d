"""Attention over a paged KV cache: one call for decode, prefill and any mix of the two.

`reference` is the specification, `xla` runs anywhere, `api` checks the arguments and picks one.
"""

from pallas_kernels.paged_attention.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from pallas_kernels.paged_attention.api import paged_attention as paged_attention
from pallas_kernels.paged_attention.api import resolve_implementation as resolve_implementation
