"""Reading and then writing the same array, without a copy of it."""

from typing import Any

from jax import lax


def first_read(values: Any, *then: Any) -> Any:
    """`(values, *then)`, of which `then` is known only once `values` have been read.

    Where XLA sees no order between a read of a loop's array and a write to it, it copies the array
    in every turn. Indices or arrays of the write that went through here are the order.
    """
    return lax.optimization_barrier((values, *then))


def once(values: Any) -> Any:
    """`values`, computed once: XLA's CPU would do it again for each element that they make."""
    return lax.optimization_barrier(values)
