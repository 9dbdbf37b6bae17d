"""The choice of the next token, for rows that never look at each other.

A draw's key comes from the request's seed and the token's position and nothing else, so a request
prints the same tokens whoever shares the batch and however it was scheduled.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxpage.scheduling.state import Sampling


def sample(
    logits: jax.Array, sampling: Sampling, positions: jax.Array, seen: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chooses a token a row from `logits: f32[n, V]`.

    `positions: i32[n]` is where the token will stand. `seen: i32[n, N]` are the tokens that
    the repetition penalty counts, `V` where there is none. Returns tokens `i32[n]`, their log
    probability under the model's own distribution `f32[n]`, and rows that failed, whose logits
    are not finite, `bool[n]`.

    What no row asks for is not computed: a greedy batch pays for three passes over the logits.
    """
    peak = jnp.max(logits, axis=-1)
    log_sum = peak + jnp.log(jnp.sum(jnp.exp(logits - peak[:, None]), axis=-1))
    is_plain = (sampling.temperature <= 0.0) & (sampling.repetition_penalty == 1.0)
    # The branches return tokens, since one that returned logits would copy them.
    tokens = lax.cond(
        jnp.all(is_plain),
        lambda: first_index_of(logits, peak),
        lambda: _choose(logits, sampling, positions, seen),
    )
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - log_sum, ~jnp.isfinite(log_sum)


def _choose(
    logits: jax.Array, sampling: Sampling, positions: jax.Array, seen: jax.Array
) -> jax.Array:
    """The tokens of rows of which some draw or are penalised, `i32[n]`."""
    penalised = lax.cond(
        jnp.any(sampling.repetition_penalty != 1.0),
        lambda: penalise_repetition(logits, sampling.repetition_penalty, seen),
        lambda: logits,
    )
    greedy = first_argmax(penalised)
    drawn = lax.cond(
        jnp.any(sampling.temperature > 0.0),
        lambda: _draw(penalised, sampling, positions),
        lambda: greedy,
    )
    return jnp.where(sampling.temperature > 0.0, drawn, greedy)


def first_argmax(values: jax.Array) -> jax.Array:
    """The first index of each row's maximum, `i32[n]`."""
    return first_index_of(values, jnp.max(values, axis=-1))


def likeliest(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` likeliest tokens of each row of `f32[n, V]`, best first, and their logprobs."""
    top, tokens = lax.top_k(logits, count)
    return tokens, top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def first_index_of(values: jax.Array, wanted: jax.Array) -> jax.Array:
    """The first index in each row of `values` that holds `wanted: f32[n]`, the last if none does.

    With the maximum this is an argmax of plain reductions, which vectorise.
    """
    last = values.shape[-1] - 1
    index = jnp.arange(values.shape[-1], dtype=jnp.int32)[None]
    return jnp.min(jnp.where(values == wanted[:, None], index, last), axis=-1)


def penalise_repetition(logits: jax.Array, penalty: jax.Array, seen: jax.Array) -> jax.Array:
    """Divides positive logits of tokens in `seen` by the penalty, and multiplies negative ones.

    Keskar et al. 2019 (CTRL), with the sign rule that is usual since.
    """
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    is_seen = jnp.zeros(logits.shape, jnp.bool_).at[rows, seen].set(True, mode="drop")
    factor = penalty[:, None]
    return jnp.where(is_seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)


def keep_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """Sets all but the `top_k: i32[n]` largest of each row to -inf; 0 keeps all, ties stay."""
    wanted = jnp.where(top_k > 0, top_k, logits.shape[-1])

    def enough(threshold: jax.Array) -> jax.Array:
        return jnp.sum(_sortable(logits) >= threshold[:, None], axis=-1) >= wanted

    kept = _sortable(logits) >= _largest_threshold(enough, logits.shape[0])[:, None]
    return jnp.where(kept, logits, -jnp.inf)


def keep_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Keeps the fewest largest of each row whose probability reaches `top_p: f32[n]`; ties stay."""
    weights = jax.nn.softmax(logits, axis=-1)

    def enough(threshold: jax.Array) -> jax.Array:
        above = _sortable(logits) >= threshold[:, None]
        return jnp.sum(jnp.where(above, weights, 0.0), axis=-1) >= top_p

    kept = _sortable(logits) >= _largest_threshold(enough, logits.shape[0])[:, None]
    return jnp.where(kept | (top_p >= 1.0)[:, None], logits, -jnp.inf)


def _draw(logits: jax.Array, sampling: Sampling, positions: jax.Array) -> jax.Array:
    """A draw a row from the cut and tempered distribution, by the Gumbel trick."""
    # At least 1e-30, which is greedy already: less would take the quotients to infinity.
    warm = jnp.where(sampling.temperature > 0.0, jnp.maximum(sampling.temperature, 1e-30), 1.0)
    tempered = logits / warm[:, None]
    cut = lax.cond(
        jnp.any(sampling.top_k > 0), lambda: keep_top_k(tempered, sampling.top_k), lambda: tempered
    )
    cut = lax.cond(
        jnp.any(sampling.top_p < 1.0), lambda: keep_top_p(cut, sampling.top_p), lambda: cut
    )

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, (logits.shape[-1],), jnp.float32)

    return first_argmax(cut + jax.vmap(noise)(sampling.seed, positions))


def _sortable(x: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floats `x`; zeros of both signs are equal."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0.0, 0.0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest_threshold(enough, num_rows: int) -> jax.Array:
    """The largest `u32` a row for which `enough(threshold)` holds, found bit by bit.

    `enough` must hold for 0 and only ever turn false as the threshold grows. This replaces a sort
    of the vocabulary: 32 passes of compare and sum, exact, and the same for a row in any batch.
    """

    def set_bit(i, threshold):
        higher = threshold | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
        return jnp.where(enough(higher), higher, threshold)

    return lax.fori_loop(0, 32, set_bit, jnp.zeros((num_rows,), jnp.uint32))
