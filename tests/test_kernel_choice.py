"""Which implementation is taken unasked, on machines with and without a GPU that a kernel is for.

The GPU is a fake, and its kernel the Hopper one under the interpreter, or something worse.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from attention_oracle import make_problem
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import (
    gpu,
    kernel_sm80,
    kernel_sm90,
    paged_attention,
    reference,
    resolve_implementation,
)
from pallas_kernels.paged_attention.config import Tile

TILE = Tile(block_tokens=64, stages=2, split_tokens=64)


@pytest.fixture(autouse=True)
def fresh_check():
    gpu.fault_here.cache_clear()
    yield
    gpu.fault_here.cache_clear()


def put_gpu(monkeypatch, attend, capability="9.0"):
    """Makes JAX say that it runs on a GPU whose kernel is `attend`."""
    card = SimpleNamespace(device_kind="a card", compute_capability=capability)
    monkeypatch.setattr(gpu, "card", lambda: card)
    module = SimpleNamespace(
        attend=attend, check=kernel_sm90.check, tile_of=lambda q, k_pages: TILE
    )
    monkeypatch.setattr(gpu, "importlib", SimpleNamespace(import_module=lambda name: module))


def half_precision():
    return make_problem((5, 40), dtype=jnp.bfloat16)


def test_a_kernel_that_gives_the_reference_here_is_taken_even_while_tracing(monkeypatch):
    interpreted = functools.partial(
        kernel_sm90.attend,
        tile=TILE,
        interpret=plgpu.InterpretGPUParams(),
    )
    calls = []

    def attend(*args, **kwargs):
        calls.append(kwargs["q"].shape if "q" in kwargs else args[0].shape)
        return interpreted(*args, **kwargs)

    put_gpu(monkeypatch, attend)
    problem = half_precision()
    jax.eval_shape(jax.jit(functools.partial(problem.call, paged_attention)))
    assert calls == [(5, 4, 64), problem.q.shape]  # the check, and the call
    chosen = resolve_implementation(None, problem.q, problem.k_pages)
    assert chosen == "mosaic_gpu" and len(calls) == 2  # checked once


@pytest.mark.in_ci("{'quantised'*float8*")
@pytest.mark.parametrize(
    "shape",
    [
        {"q_lens": (2, 7), "group": 3, "page_size": 8},
        {"quantised": jnp.int8, "page_size": 128, "head_dim": 128},
        {"quantised": jnp.float8_e4m3fn, "dtype": jnp.float16, "q_lens": (5, 1)},
    ],
    ids=str,
)
def test_the_check_is_of_the_kind_of_call_that_is_asked_for(monkeypatch, shape):
    checked = []

    def attend(*args, **kwargs):
        checked.append(kwargs)
        return kernel_sm90.attend(
            *args, **kwargs, tile=TILE, interpret=plgpu.InterpretGPUParams(detect_races=True)
        )

    put_gpu(monkeypatch, attend)
    problem = make_problem((5, 40), **{"dtype": jnp.bfloat16} | shape)
    against = gpu.reason_against(
        problem.q, problem.k_pages, problem.page_indices, is_ragged="q_lens" in shape
    )
    assert against is None
    (found,) = checked
    table_tokens = found["page_indices"].shape[1] * found["k_pages"].shape[2]
    assert table_tokens > TILE.split_tokens  # several splits are folded
    assert found["k_pages"].shape[2:] == problem.k_pages.shape[2:]
    assert found["k_pages"].dtype == problem.k_pages.dtype and found["q"].dtype == problem.q.dtype
    assert (found["cu_q_lens"] is not None) == ("q_lens" in shape)


def right(q, *, cu_q_lens, **kwargs):
    if cu_q_lens is None:
        cu_q_lens = jnp.arange(q.shape[0] + 1, dtype=jnp.int32)
    return reference.attend(q, cu_q_lens=cu_q_lens, **kwargs)


def wrong(**kwargs):
    out, top, total = right(**kwargs)
    return out.at[3, 2, 5].add(0.1), top, total


def not_a_number(**kwargs):
    out, top, total = right(**kwargs)
    return out.at[3, 2, 5].set(jnp.nan), top, total


def broken(*args, **kwargs):
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (wrong, "its largest error on this card is 0.1"),
        (not_a_number, "its largest error on this card is nan"),
        (broken, "RuntimeError: no such instruction"),
    ],
)
def test_a_kernel_that_fails_here_is_not_taken_unasked_and_says_why(monkeypatch, attend, reason):
    put_gpu(monkeypatch, attend)
    problem = half_precision()
    assert resolve_implementation(None, problem.q, problem.k_pages) == "xla"
    against = gpu.reason_against(problem.q, problem.k_pages, problem.page_indices, is_ragged=False)
    assert against is not None and reason in against
    assert resolve_implementation("mosaic_gpu") == "mosaic_gpu"  # whoever asks gets it


def test_what_the_kernel_does_not_take_goes_to_xla(monkeypatch):
    put_gpu(monkeypatch, broken)
    problem = make_problem((5, 40))  # float32
    assert resolve_implementation(None, problem.q, problem.k_pages) == "xla"
    against = gpu.reason_against(problem.q, problem.k_pages, problem.page_indices, is_ragged=False)
    assert against is not None and "float32" in against
    problem.call(paged_attention)


def test_a_card_without_a_kernel_is_named(monkeypatch):
    put_gpu(monkeypatch, broken, capability="7.5")
    assert resolve_implementation() == "xla"
    with pytest.raises(NotImplementedError, match=r'a card \(7\.5\): use implementation="xla"'):
        resolve_implementation("mosaic_gpu")


@pytest.mark.parametrize(
    ("capability", "name"), [("8.0", "kernel_sm80"), ("8.9", "kernel_sm80"), ("9.0", "kernel_sm90")]
)
def test_each_card_has_its_kernel(monkeypatch, capability, name):
    put_gpu(monkeypatch, broken, capability)
    monkeypatch.setattr(gpu, "importlib", SimpleNamespace(import_module=lambda name: name))
    assert gpu.kernel_of_card() == f"pallas_kernels.paged_attention.{name}"


def test_a_version_of_jax_that_the_ampere_kernel_cannot_use_is_named(monkeypatch):
    monkeypatch.delattr(plgpu, "store", raising=False)
    problem = half_precision()
    with pytest.raises(NotImplementedError, match=r'jax \S+ lacks .* use implementation="xla"'):
        kernel_sm80.check(problem.q, problem.k_pages, problem.page_indices, is_ragged=False)
