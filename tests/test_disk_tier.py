"""The disk tier: prefixes that outlive the engine, and files that lie."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import CONFIG, TINY, outputs, params_of, setup_of

from jaxpage.config import ConfigError
from jaxpage.engine import loop
from jaxpage.engine.disk_tier import DiskConfig, fingerprint
from jaxpage.engine.host import Engine
from jaxpage.engine.page_store import PageStore
from jaxpage.engine.request import Request
from jaxpage.model.params import init_params
from jaxpage.model.placement import serving_params

PROMPT = tuple(range(5, 26))  # five full pages of four tokens, and one token
REQUEST = Request("a", PROMPT, 6, ignore_eos=True)
PARAMS = params_of()
SMALL = replace(CONFIG, num_pages=12)
CACHED = setup_of(SMALL, allocator="lru")


def engine_on(folder: Path, setup=CACHED, params=PARAMS, dtype=jnp.float32, **disk) -> Engine:
    return Engine(params, setup, dtype, DiskConfig(str(folder), **disk))


def serve(engine: Engine, *requests: Request):
    results, journal = engine.serve(requests or [REQUEST])
    return results, journal.disk


@pytest.fixture(scope="module")
def cold() -> list[list[int]]:
    return outputs(Engine(PARAMS, CACHED, jnp.float32).serve([REQUEST])[0])


@pytest.fixture
def folder(tmp_path, cold) -> Path:
    """A folder with the pages of one request."""
    results, counts = serve(engine_on(tmp_path))
    assert outputs(results) == cold
    # All but the last of 27 tokens have KV: six full pages.
    assert counts["pages_written"] == 6 == len(list(tmp_path.iterdir()))
    return tmp_path


def page_bytes_of(engine: Engine) -> np.ndarray:
    """KV of the five pages of the prompt, as its row in the index finds them."""
    padded = np.zeros(engine.setup.engine.max_seq_len, np.int32)
    padded[: len(PROMPT)] = PROMPT
    one = jnp.int32(len(PROMPT)), jnp.int32(0), jnp.int32(0)
    num, pages = loop.read_chain(engine.state, padded, *one, most=5, setup=engine.setup)
    assert int(num) == 5
    return np.stack([pages.keys, pages.values])


def test_another_engine_finds_the_prefix_with_its_very_bytes(folder, cold):
    first = engine_on(folder)
    engine = engine_on(folder)
    engine.compile()
    results, counts = serve(engine)
    assert outputs(results) == cold
    assert counts["hit_tokens"] == results[0].num_cached_tokens == 20
    assert counts["pages_read"] == 5 and counts["bad_pages"] == counts["missing_pages"] == 0
    held = engine.state.scheduler.table
    assert int(jnp.sum(engine.setup.allocator.violations(held))) == 0
    serve(first)
    np.testing.assert_array_equal(page_bytes_of(engine), page_bytes_of(first))
    _, counts = serve(engine, replace(REQUEST, id="b"))
    assert counts["pages_read"] == 0  # the prefix cache has them


def test_nothing_compiles_while_serving(folder):
    engine = engine_on(folder)
    engine.compile()
    compiled = loop_cache_sizes()
    serve(engine)
    assert loop_cache_sizes() == compiled


def loop_cache_sizes() -> list[int]:
    names = ("serve_steps", "submit", "forget", "find_chain", "read_chain", "put_back")
    return [getattr(loop, name)._cache_size() for name in names]


@pytest.mark.parametrize("position", [0, 3, 9, 40, 41, 73, 80, 90, 200, -1])
def test_a_flipped_bit_anywhere_is_a_miss_and_never_other_text(folder, cold, position):
    for file in folder.iterdir():
        value = bytearray(file.read_bytes())
        value[position] ^= 4
        file.write_bytes(bytes(value))
    results, counts = serve(engine_on(folder))
    assert outputs(results) == cold
    assert counts["bad_pages"] == 1  # the first: of those after it nobody asks
    assert counts["hit_tokens"] == results[0].num_cached_tokens == 0


@pytest.mark.parametrize("harm", ["truncate", "empty", "swap", "delete"])
def test_files_that_are_short_gone_or_another_pages_are_misses(folder, cold, harm):
    engine = engine_on(folder)
    files = sorted(folder.iterdir())
    values = [file.read_bytes() for file in files]
    for number, file in enumerate(files):
        if harm == "delete":
            file.unlink()
        else:
            other = {"truncate": values[number][:-1], "empty": b"", "swap": values[number - 1]}
            file.write_bytes(other[harm])
    results, counts = serve(engine)
    assert outputs(results) == cold
    assert counts["missing_pages" if harm == "delete" else "bad_pages"] == 1
    assert results[0].num_cached_tokens == 0


def test_pages_of_others_are_not_found(folder, cold):
    """Of another model, precision, page size or tenant."""
    other = serving_params(init_params(TINY, jax.random.key(4), jnp.float32), jnp.float32)
    for engine in (engine_on(folder, params=other), engine_on(folder, identity="the same model")):
        _, counts = serve(engine)
        assert counts["hit_tokens"] == counts["pages_read"] == counts["bad_pages"] == 0
    wider = setup_of(replace(SMALL, page_size=8, pages_per_slot=6), allocator="lru")
    known = {
        fingerprint(CACHED, PARAMS, jnp.float32),
        fingerprint(CACHED, other, jnp.float32),
        fingerprint(CACHED, PARAMS, jnp.bfloat16),
        fingerprint(wider, PARAMS, jnp.float32),
        fingerprint(CACHED, PARAMS, jnp.float32, "the same model"),
        fingerprint(CACHED, PARAMS, jnp.float32, "another model"),
    }
    assert len(known) == 6
    results, counts = serve(engine_on(folder), replace(REQUEST, tenant="somebody"))
    assert outputs(results) == cold
    assert counts["hit_tokens"] == counts["pages_read"] == 0


def test_a_limit_in_bytes_removes_the_longest_unused(tmp_path, cold):
    size = PageStore(str(tmp_path / "x"), None, b"", 4, page_bytes()).file_bytes
    folder = tmp_path / "pages"
    engine = engine_on(folder, max_bytes=6 * size)
    serve(engine)
    again = replace(REQUEST, id="b", prompt_ids=PROMPT[::-1])
    _, counts = serve(engine, again)
    assert counts["pages_removed"] == counts["pages_written"] == 6
    assert len(list(folder.iterdir())) == 6
    results, counts = serve(engine_on(folder, max_bytes=6 * size))
    assert outputs(results) == cold and counts["hit_tokens"] == 0
    with pytest.raises(ConfigError, match=f"disk_bytes={size - 1} is less than one page of 4"):
        engine_on(folder, max_bytes=size - 1)


def page_bytes() -> int:
    return TINY.kv_bytes_per_token(jnp.float32) * CONFIG.page_size


def test_a_pool_with_no_room_takes_what_fits_and_evicts_nobody_in_use(folder, cold):
    others = [Request(str(i), tuple(range(30 + i, 44 + i)), 8, ignore_eos=True) for i in range(4)]
    results, _ = serve(engine_on(folder), *others, REQUEST)
    alone = [outputs(Engine(PARAMS, CACHED, jnp.float32).serve([r])[0])[0] for r in others]
    assert outputs(results) == [*alone, *cold]


@pytest.mark.slow
def test_the_host_tier_and_the_disk_tier_work_together(tmp_path, cold):
    config = replace(SMALL, host_pages=12, preemption="fine")
    setup = setup_of(config, allocator="lru")
    others = [Request(str(i), tuple(range(30 + i, 50 + i)), 8, ignore_eos=True) for i in range(4)]
    before, counts = serve(engine_on(tmp_path, setup=setup), REQUEST, *others)
    assert counts["pages_written"] > 6
    after, counts = serve(engine_on(tmp_path, setup=setup), REQUEST, *others)
    assert outputs(after) == outputs(before)
    assert outputs(after)[0] == cold[0] and counts["hit_tokens"] > 0


def test_a_folder_that_cannot_be_and_a_table_without_a_cache_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another"):
        engine_on(tmp_path / "file")
    with pytest.raises(ConfigError, match="take paged with a prefix cache"):
        engine_on(tmp_path, setup=setup_of())
