"""Who goes first: a policy is a function from requests to a rank, lower first, ties by arrival.

The order decides who gets the step's tokens, who is admitted, and, from its end, who is preempted.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpage.scheduling.state import Requests

AHEAD = 64  # requests that a level of priority is worth

# (requests, tokens of each that are computed, i32[R]) -> rank, i32[R]
PolicyFn = Callable[[Requests, jax.Array], jax.Array]


def fcfs(requests: Requests, computed: jax.Array) -> jax.Array:
    """First come, first served."""
    del computed
    return jnp.zeros_like(requests.arrivals)


def shortest_first(requests: Requests, computed: jax.Array) -> jax.Array:
    """The request that can end soonest goes first: fewest tokens left to compute."""
    return requests.final_lens - computed


def decode_first(requests: Requests, computed: jax.Array) -> jax.Array:
    """Sequences that generate go before prompts: a long prompt delays no one's next token."""
    return (requests.num_tokens - computed > 1).astype(jnp.int32)


def priority(requests: Requests, computed: jax.Array) -> jax.Array:
    """Each level of priority goes before the `AHEAD` requests that came just before it.

    So nobody waits for ever: who is overtaken is so by requests that came less than `AHEAD` times
    the difference in levels after it.
    """
    del computed
    return requests.arrivals - AHEAD * requests.priorities


POLICIES: dict[str, PolicyFn] = {
    policy.__name__: policy for policy in (fcfs, shortest_first, decode_first, priority)
}
