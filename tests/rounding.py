"""How far two float32 computations of one model may be apart that add in different orders.

An addition rounds by at most `U` of what it gives. Taken as independent and uniform (the model of
Higham and Mary, A new approach to probabilistic rounding error analysis, SIAM J. Sci. Comput.,
2019), the errors of a sum have the variance `U**2 / 3` times the sum of its squared partial sums.
Of `n` terms of mean `m` and variance `v`, added in an order drawn at random, that is expected to be
`n (n + 1) / 6 * (v + (2 n + 1) m**2)`. `deviations` carries the errors of all sums of a model, and
of what is computed by elements between them, to the log probabilities by their derivatives: to
first order, which is all that matters at this size.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxpage.config import ModelConfig
from jaxpage.model.llama import rope_angles
from jaxpage.model.params import Params

U = 2.0**-24  # unit roundoff of float32
Errors = dict[str, jax.Array]


class Sites:
    """The values of a computation: each can be given an error, and says how large one may be."""

    def __init__(self, errors: Errors):
        self.errors = errors
        self.sizes: Errors = {}

    def __call__(self, name: str, value: jax.Array, deviation: jax.Array) -> jax.Array:
        self.sizes[name] = deviation
        return value + self.errors.get(name, jnp.zeros_like(value))

    def rounded(self, name: str, value: jax.Array, n: int = 1) -> jax.Array:
        """A value that `n` operations made, element by element, each rounded once."""
        return self(name, value, U * jnp.sqrt(n / 3) * jnp.abs(value))

    def total(self, name: str, equation: str, x: jax.Array, y: jax.Array, n: int) -> jax.Array:
        """A sum of `n` products, which are rounded too."""
        value = jnp.einsum(equation, x, y)
        squares = jnp.einsum(equation, x * x, y * y)
        mean = value / n
        variance = squares / n - mean * mean
        partial_sums = n * (n + 1) / 6 * (variance + (2 * n + 1) * mean * mean)
        return self(name, value, U * jnp.sqrt((partial_sums + squares) / 3))


@partial(jax.jit, static_argnames=("model",))
def deviations(params: Params, tokens: jax.Array, *, model: ModelConfig) -> jax.Array:
    """Standard deviation of each token's log probability after those before it, `f32[T - 1]`.

    `params` are those of `init_params`, and tied; `tokens` are `i32[T]`.
    """
    sites = Sites({})
    _logprobs(params, model, tokens, sites)

    def logprobs(errors: Errors) -> jax.Array:
        return _logprobs(params, model, tokens, Sites(errors))

    _, slopes_of = jax.vjp(logprobs, jax.tree.map(jnp.zeros_like, sites.sizes))

    def deviation(of: jax.Array) -> jax.Array:
        (slopes,) = slopes_of(of)
        return jnp.sqrt(sum(jnp.sum((slopes[k] * size) ** 2) for k, size in sites.sizes.items()))

    return lax.map(deviation, jnp.eye(tokens.shape[0] - 1))


def _logprobs(params: Params, model: ModelConfig, ids: jax.Array, sites: Sites) -> jax.Array:
    E, D, G = model.embed_dim, model.head_dim, model.group_size
    T = ids.shape[0]
    is_seen = jnp.arange(T)[:, None] >= jnp.arange(T)[None]
    cos, sin = (table[:, None, None] for table in rope_angles(jnp.arange(T), model))

    def norm(name: str, x: jax.Array, weight: jax.Array) -> jax.Array:
        mean = sites.total(f"{name} mean", "te,te->t", x, x, E)[:, None] / E
        return sites.rounded(name, x * lax.rsqrt(mean + model.norm_eps) * weight[None], 4)

    def rope(name: str, x: jax.Array) -> jax.Array:
        low, high = jnp.split(x, 2, axis=-1)
        turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
        length = jnp.sqrt(low * low + high * high)  # neither product is longer, nor their sum
        return sites(name, turned, U * jnp.concatenate([length, length], axis=-1))

    def attend(name: str, h: jax.Array, weight: jax.Array) -> jax.Array:
        qkv = sites.total(f"{name} qkv", "te,kgde->tkgd", h, weight, E)
        q = rope(f"{name} q", qkv[:, :, :G])
        k = rope(f"{name} k", qkv[:, :, G : G + 1])[:, :, 0]
        scores = sites.total(f"{name} scores", "tkgd,skd->kgts", q, k, D) / jnp.sqrt(float(D))
        scores = jnp.where(is_seen[None, None], scores, -jnp.inf)
        weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        weights = sites.rounded(f"{name} exp", weights, 4)
        whole = sites.total(f"{name} whole", "kgts,s->kgt", weights, jnp.ones(T), T)
        sums = sites.total(f"{name} sums", "kgts,skd->kgtd", weights, qkv[:, :, G + 1], T)
        return sites.rounded(f"{name} attended", sums / whole[..., None])

    x = params["embed"][ids]
    for index in range(model.num_layers):
        layer = {name: leaf[index] for name, leaf in params["layers"].items()}
        attended = attend(f"{index}", norm(f"{index} norm", x, layer["attn_norm"]), layer["qkv"])
        terms = model.num_heads * D
        x = x + sites.total(f"{index} out", "kgtd,ekgd->te", attended, layer["out"], terms)
        x = sites.rounded(f"{index} attention", x)
        h = norm(f"{index} mlp norm", x, layer["mlp_norm"])
        gate_up = sites.total(f"{index} gate_up", "te,pfe->tpf", h, layer["gate_up"], E)
        h = jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1]
        h = sites.rounded(f"{index} silu", h, 6)
        x = x + sites.total(f"{index} down", "tf,ef->te", h, layer["down"], model.mlp_dim)
        x = sites.rounded(f"{index} mlp", x)
    h = norm("final norm", x, params["final_norm"])[:-1]
    logits = sites.total("logits", "te,ve->tv", h, params["embed"], E)
    shifted = sites.rounded("shifted", logits - lax.stop_gradient(logits.max(-1, keepdims=True)))
    weights = sites.rounded("exp", jnp.exp(shifted), 4)
    vocab = model.vocab_size
    whole = sites.total("whole", "tv,v->t", weights, jnp.ones(vocab), vocab)
    logs = sites.rounded("log", jnp.log(whole), 4)
    chosen = jnp.take_along_axis(shifted, ids[1:, None], axis=-1)[:, 0]
    return sites.rounded("logprob", chosen - logs)
