"""Page copies: the specification, XLA, and the Hopper kernel under the race detector."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import INTERPRET, needs_no_gpu
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.page_copy import api, conflicts, copy_pages, kernel_sm90

P = 9
kernel = functools.partial(kernel_sm90.copy, interpret=INTERPRET)
WAYS = {
    "reference": functools.partial(copy_pages, implementation="reference"),
    "xla": functools.partial(copy_pages, implementation="xla"),
    "kernel": kernel,
}


def pool(shape=(2, 16, 64), dtype=jnp.bfloat16):
    numbers = np.random.default_rng(0).integers(-100, 100, (P, *shape))
    return jnp.asarray(numbers, dtype)


def twin(pages, pairs):
    """The same in plain Python."""
    copied = np.array(pages)
    for source, target in pairs:
        if 0 <= source < P and 0 <= target < P:
            copied[target] = np.asarray(pages)[source]
    return copied


def arrays(pairs):
    index = np.array(pairs, np.int32).reshape(-1, 2)
    return jnp.asarray(index[:, 0]), jnp.asarray(index[:, 1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "pairs",
    [
        ((0, 1),),
        ((3, 8), (3, 0), (7, 1)),  # one source, two targets
        ((P, 1), (1, P), (-1, 2), (2, -1), (4, 5)),  # all but the last are nobody's
        ((P, P), (-9, -9)),
    ],
)
def test_sources_are_copied_to_targets_and_pairs_outside_the_pool_are_not(way, pairs):
    pages = pool()
    found = jax.jit(WAYS[way])(pages, *arrays(pairs))
    np.testing.assert_array_equal(np.asarray(found), twin(pages, pairs))


@pytest.mark.parametrize(
    ("shape", "dtype", "pieces"),
    [
        ((8, 16, 128), jnp.bfloat16, (2, 32, 256)),  # a page of Llama 3.1 8B: 32 KiB
        ((3, 16, 64), jnp.float32, (1, 12, 256)),
        ((1, 8, 80), jnp.bfloat16, (1, 4, 160)),
        ((40,), jnp.int8, None),
        ((48,), jnp.int8, (1, 1, 48)),
    ],
    ids=str,
)
def test_pages_of_any_shape_are_cut_into_pieces_that_the_card_can_copy(shape, dtype, pieces):
    pages = pool(shape, dtype)
    if pieces is None:
        with pytest.raises(NotImplementedError, match=r'40 bytes, .* implementation="xla"'):
            kernel(pages, *arrays([(0, 1)]))
        return
    assert kernel_sm90.pieces_of(pages) == pieces
    pairs = [(2, 5), (0, 8)]
    found = jax.jit(kernel)(pages, *arrays(pairs))
    np.testing.assert_array_equal(np.asarray(found), twin(pages, pairs))


pair = st.tuples(st.integers(-2, P + 1), st.integers(-2, P + 1))


@settings(deadline=None)  # the first example compiles
@given(st.lists(pair, min_size=6, max_size=6))
def test_plain_implementations_agree_wherever_pairs_do_not_conflict(pairs):
    live = [p for p in pairs if 0 <= p[0] < P and 0 <= p[1] < P]
    targets, origins = [t for _, t in live], {s for s, _ in live}
    clashes = {t for t in targets if targets.count(t) > 1 or t in origins}
    assert int(conflicts(*arrays(pairs), P)) == len(clashes)
    pages = pool((4,), jnp.float32)
    for way in ("reference", "xla"):
        found = np.asarray(WAYS[way](pages, *arrays(pairs)))
        sound = [page for page in range(P) if page not in clashes]
        np.testing.assert_array_equal(found[sound], twin(pages, pairs)[sound])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pages": jnp.zeros((3,))}, r"pages.shape=\(3,\)"),
        ({"targets": jnp.zeros((2,), jnp.int32)}, r"targets.shape=\(2,\)"),
        ({"sources": jnp.zeros((1,), jnp.float32)}, "sources.dtype=float32"),
        ({"implementation": "triton"}, "implementation='triton'"),
    ],
)
def test_wrong_arguments_are_refused_with_their_values(change, message):
    sources, targets = arrays([(0, 1)])
    with pytest.raises(ValueError, match=message):
        copy_pages(**({"pages": pool(), "sources": sources, "targets": targets} | change))


def test_on_a_hopper_card_the_kernel_is_taken_for_pages_that_it_can_copy(monkeypatch):
    taken = []
    monkeypatch.setattr(api, "_is_hopper", lambda: True)
    monkeypatch.setattr(kernel_sm90, "copy", lambda pages, *_: taken.append(pages.shape) or pages)
    for columns in (40, 48):
        jax.eval_shape(copy_pages, jnp.zeros((P, columns), jnp.int8), *arrays([(0, 1)]))
    assert taken == [(P, 48)]


@needs_no_gpu
def test_without_a_gpu_the_kernel_is_refused_by_name():
    with pytest.raises(NotImplementedError, match='use implementation="xla"'):
        copy_pages(pool(), *arrays([(0, 1)]), implementation="mosaic_gpu")
