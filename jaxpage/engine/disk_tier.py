"""The tier that outlives the process: what sequences leave in the prefix cache, kept in a folder.

Nothing here decides what runs, and the compiled step knows of no file. Between two calls of the
loop, pages of sequences that ended are copied out of the pool, a few a visit, and written when the
copies have arrived. When a request is submitted, pages of its prompt that the prefix cache lacks
are read and put back into the pool, cached, before admission looks for them.
"""

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxpage.config import require
from jaxpage.engine import loop
from jaxpage.engine.page_store import DIGEST_BYTES, DiskCounts, PageStore, digest
from jaxpage.engine.step import EngineState, Setup
from jaxpage.model.params import Params
from jaxpage.paging.kv_pool import KvPool, page_bytes

PAGES_A_COPY = 16  # of one chain, by one run of a compiled program
COPIES_A_VISIT = 4
MOST_WRITING = 256  # pages; past that, visits leave the rest where it is
FLUSH_S = 30.0  # that the end of serving waits for the disk at the most


@dataclass(frozen=True)
class DiskConfig:
    """The folder, the bytes that its pages may take, and whose pages they are.

    `identity` stands for the contents of the parameters, which are read and digested without it.
    """

    folder: str
    max_bytes: int | None = None
    identity: str | None = None


class Owner(NamedTuple):
    """Who may share a sequence's pages: by name, and by the engine's number for that name."""

    tenant: str
    salt: int


@dataclass
class _Chain:
    """Full pages of a sequence, to be written from `first` on."""

    owner: Owner
    tokens: np.ndarray  # i32[n * S]
    keys: list[str]  # n
    first: int = 0


class DiskTier:
    """A folder of pages beside an engine of `setup`."""

    def __init__(self, config: DiskConfig, setup: Setup, params: Params, kv_dtype: DTypeLike):
        require(
            setup.allocator.chains is not None,
            f"disk_dir={config.folder}: pages are kept on disk for a prefix cache, and "
            f"allocator={setup.allocator.name} has none here: take paged with a prefix cache",
        )
        self._setup, self._dtype = setup, np.dtype(kv_dtype)
        self._page_size = setup.engine.page_size
        self._store = PageStore(
            config.folder,
            config.max_bytes,
            fingerprint(setup, params, kv_dtype, config.identity),
            self._page_size,
            page_bytes(setup.model, self._page_size, kv_dtype),
        )
        self._chains: deque[_Chain] = deque()
        self._copies: list[tuple[_Chain, jax.Array, KvPool]] = []  # on their way to the host
        self._room: int | None = None  # pages that may still be put back before the next step

    def compile(self, state: EngineState) -> EngineState:
        """Compiles what this needs while serving."""
        nobody, nothing = Owner("", 0), np.zeros(0, np.int32)
        loop.find_chain(state, *self._operands(nothing, nobody), setup=self._setup)
        self._begin_copy(state, _Chain(nobody, nothing, []))
        self._copies.clear()
        return self._put_back(state, nothing, nobody, 0, [])[0]

    def restore(self, state: EngineState, prompt: np.ndarray, owner: Owner) -> EngineState:
        """Puts full pages of `prompt: i32[n]` back that the index lacks and the disk has.

        The last token stays to compute. Before the next step no more comes back than there was
        room for at first, so that no prompt costs another one the pages just read for it.
        """
        most = (len(prompt) - 1) // self._page_size * self._page_size
        keys = self._store.keys(owner.tenant, prompt[:most])
        last = self._store.num_readable(keys)
        if last == 0:
            return state
        tokens = prompt[: last * self._page_size]
        found = loop.find_chain(state, *self._operands(tokens, owner), setup=self._setup)
        first, room = map(int, found)
        self._room = room if self._room is None else min(room, self._room)
        last = min(last, first + self._room)
        chosen = slice(first * self._page_size, last * self._page_size)
        pages = self._store.read(keys[first:last], tokens[chosen])
        self._store.touch(keys)
        for start in range(0, len(pages), PAGES_A_COPY):
            some = pages[start : start + PAGES_A_COPY]
            state, num_put = self._put_back(state, tokens, owner, first + start, some)
            self._room -= num_put
            self._store.counts.hit_tokens += num_put * self._page_size
            if num_put < len(some):
                break
        return state

    def remember(self, tokens: np.ndarray, owner: Owner) -> None:
        """Marks the full pages of a sequence that ended, `tokens: i32[n]`, as to be written."""
        keys = self._store.keys(owner.tenant, tokens)
        self._store.touch(keys)
        if not all(map(self._store.has, keys)):
            tokens = np.array(tokens[: len(keys) * self._page_size], np.int32)
            self._chains.append(_Chain(owner, tokens, keys))

    def visit(self, state: EngineState) -> None:
        """Hands arrived copies to the threads that write, and begins the next ones."""
        self._room = None
        copies, self._copies = self._copies, []
        for copy in copies:
            self._write(*copy)
        self._store.poll()
        while self._chains and len(self._copies) < COPIES_A_VISIT:
            if self._store.num_writing > MOST_WRITING:
                break
            chain = self._chains.popleft()
            missing = (i for i in range(chain.first, len(chain.keys)) if not self._has(chain, i))
            chain.first = next(missing, len(chain.keys))
            if chain.first < len(chain.keys):
                self._begin_copy(state, chain)

    def flush(self, state: EngineState) -> None:
        """Writes all that is to be written, within `FLUSH_S`; what is left stays to be written."""
        start_s = time.monotonic()
        until_s = start_s + FLUSH_S
        while (self._chains or self._copies) and time.monotonic() < until_s:
            self.visit(state)
            if not self._copies:
                time.sleep(0.001)  # the disk is behind
        self._store.wait(until_s)
        self._store.counts.flush_s += time.monotonic() - start_s

    def take_counts(self) -> dict[str, float]:
        """What happened since the last time, by name."""
        counts, self._store.counts = self._store.counts, DiskCounts()
        return asdict(counts)

    def _has(self, chain: _Chain, index: int) -> bool:
        return self._store.has(chain.keys[index])

    def _begin_copy(self, state: EngineState, chain: _Chain) -> None:
        num_found, pages = loop.read_chain(
            state,
            *self._operands(chain.tokens, chain.owner),
            jnp.int32(chain.first),
            most=PAGES_A_COPY,
            setup=self._setup,
        )
        for array in (num_found, pages.keys, pages.values):
            array.copy_to_host_async()
        self._copies.append((chain, num_found, pages))

    def _write(self, chain: _Chain, num_found: jax.Array, pages: KvPool) -> None:
        """Begins to write the pages of a copy; the chain goes on with what comes after it."""
        last = min(int(num_found), chain.first + PAGES_A_COPY)
        keys, values = np.asarray(pages.keys), np.asarray(pages.values)
        for index in range(chain.first, last):
            number, start = index - chain.first, index * self._page_size
            payload = keys[:, number].tobytes() + values[:, number].tobytes()
            tokens = chain.tokens[start : start + self._page_size]
            self._store.write(chain.keys[index], tokens, payload)
        self._store.touch(chain.keys)
        if last < chain.first + PAGES_A_COPY:  # the index has no more of it
            lost = (not self._has(chain, i) for i in range(last, len(chain.keys)))
            self._store.counts.pages_lost += sum(lost)
        elif last < len(chain.keys):
            chain.first = last
            self._chains.appendleft(chain)

    def _put_back(
        self, state: EngineState, tokens: np.ndarray, owner: Owner, first: int, pages: list[bytes]
    ) -> tuple[EngineState, int]:
        """Puts the payloads `pages` back as the chain's from `first` on; how many it could."""
        shape = (2, *state.pool.keys.shape[:1], *state.pool.keys.shape[2:])
        staged = np.zeros((*shape[:2], PAGES_A_COPY, *shape[2:]), self._dtype)
        for number, page in enumerate(pages):
            staged[:, :, number] = np.frombuffer(page, self._dtype).reshape(shape)
        padded, _, salt = self._operands(tokens, owner)
        counts = jnp.int32(first), jnp.int32(len(pages))
        state, num_put = loop.put_back(
            state, padded, *counts, salt, KvPool(staged[0], staged[1]), setup=self._setup
        )
        return state, int(num_put)

    def _operands(
        self, tokens: np.ndarray, owner: Owner
    ) -> tuple[np.ndarray, jax.Array, jax.Array]:
        """A sequence as the compiled programs take it: `i32[N]`, its length, and the salt."""
        padded = np.zeros(self._setup.engine.max_seq_len, np.int32)
        padded[: len(tokens)] = tokens
        return padded, jnp.int32(len(tokens)), jnp.int32(owner.salt)


def fingerprint(
    setup: Setup, params: Params, kv_dtype: DTypeLike, identity: str | None = None
) -> bytes:
    """A digest of all that a page's bytes depend on but its tokens: model, precision, page size.

    Batches round differently, and nobody minds; where outputs are promised to the bit, only pages
    of the same machine, versions and buckets will do.
    """
    model, config = setup.model, setup.engine
    facts: list[object] = [model, np.dtype(kv_dtype).name, config.page_size, identity]
    if config.batch_invariant:
        device = next(iter(jax.tree.leaves(params)[0].devices()))
        version = device.client.platform_version
        implementation = getattr(setup.attention, "keywords", None)
        facts += [config.token_buckets, jax.__version__, device.device_kind, version]
        facts.append(implementation)
    known = digest(repr(facts).encode())
    if identity is not None:
        return known
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        form = digest(repr((jax.tree_util.keystr(path), array.dtype.name, array.shape)).encode())
        known = digest(known, form, array.reshape(-1).view(np.uint8).data)
    assert len(known) == DIGEST_BYTES
    return known
