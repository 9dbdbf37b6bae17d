"""Pages as files: each named by what it holds, written by threads, and proved when it is read.

A file is `MAGIC`, a digest of all that follows, the key, the page's tokens, and the bytes of its
keys and values. The key is a digest of whose page it is (model, precision, page size, tenant) and
of all tokens up to its end. Whatever is wrong with a file, its page is not there: nothing raises.
"""

import hashlib
import os
import re
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorstore as ts

from jaxpage.config import ConfigError, require

MAGIC = b"jaxpage1"  # raised when the layout of a file or of a page changes
DIGEST_BYTES = 32
KEY = re.compile(f"[0-9a-f]{{{2 * DIGEST_BYTES}}}")
# What a crash of the machine leaves half written is a miss: nobody has to wait for the platter.
CONTEXT = {"file_io_sync": False}


@dataclass
class DiskCounts:
    """What became of pages, since the counts were last taken."""

    pages_written: int = 0
    pages_lost: int = 0  # they left pool and host before they were written
    pages_refused: int = 0  # the folder could not take them
    pages_removed: int = 0  # the longest unused, for others to have room
    pages_read: int = 0
    bad_pages: int = 0  # read, and not what was written
    missing_pages: int = 0  # looked for, and gone
    hit_tokens: int = 0  # of pages that were put back into the pool
    flush_s: float = 0.0  # that the end of serving waited for writes


def digest(*parts: bytes | memoryview) -> bytes:
    """A digest of `parts`, of which all but the last are of fixed lengths."""
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        hasher.update(part)
    return hasher.digest()


class PageStore:
    """The pages of one fingerprint in a folder that others may share; bytes of at most `max_bytes`.

    What other processes write meanwhile is found when the folder is next opened.
    """

    def __init__(
        self,
        folder: str,
        max_bytes: int | None,
        fingerprint: bytes,
        page_size: int,
        payload_bytes: int,
    ):
        self.counts = DiskCounts()
        self.file_bytes = len(MAGIC) + 2 * DIGEST_BYTES + 4 * page_size + payload_bytes
        require(
            max_bytes is None or max_bytes >= self.file_bytes,
            f"disk_bytes={max_bytes} is less than one page of {page_size} tokens "
            f"({self.file_bytes} bytes): raise it",
        )
        self._max_bytes, self._fingerprint, self._page_size = max_bytes, fingerprint, page_size
        self._folder = Path(folder).expanduser().resolve()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sizes = _scan(self._folder)  # of files, by key, the longest unused first
        except OSError as error:
            raise ConfigError(f"disk_dir={folder}: {error.strerror}: choose another") from error
        self._num_bytes = sum(self._sizes.values())
        spec = {"driver": "file", "path": f"{self._folder}/"}
        self._files = ts.KvStore.open(spec, context=ts.Context(CONTEXT)).result()
        self._writing: OrderedDict[str, ts.Future] = OrderedDict()
        self._removing: list[ts.Future] = []
        self._used: OrderedDict[str, None] = OrderedDict()  # since the last `wait`

    def keys(self, tenant: str, tokens: np.ndarray) -> list[str]:
        """The keys of the full pages of a sequence that begins with `tokens: i32[n]`."""
        parent, keys = digest(self._fingerprint, tenant.encode()), []
        for page in self._by_page(tokens):
            parent = digest(parent, page.tobytes())
            keys.append(parent.hex())
        return keys

    def has(self, key: str) -> bool:
        """Whether the page is there, or will be."""
        return key in self._sizes

    def num_readable(self, keys: Sequence[str]) -> int:
        """How many of `keys`, from the first on, are there and no longer being written."""
        for number, key in enumerate(keys):
            if key not in self._sizes or key in self._writing:
                return number
        return len(keys)

    @property
    def num_writing(self) -> int:
        """Pages that are being written."""
        return len(self._writing)

    def touch(self, keys: Sequence[str]) -> None:
        """Makes `keys`, a chain, the last to be removed; of them the first page last."""
        for key in reversed(keys):
            if key in self._sizes:
                self._sizes.move_to_end(key)
                self._used[key] = None
                self._used.move_to_end(key)

    def read(self, keys: Sequence[str], tokens: np.ndarray) -> list[bytes]:
        """The bytes of a chain's pages with `tokens: i32[n]`, up to the first that is not sound."""
        whole = [key for key in keys if self._sizes.get(key) == self.file_bytes]
        reads = {key: self._files.read(key) for key in whole}
        pages = []
        for key, page in zip(keys, self._by_page(tokens), strict=True):
            payload = self._proved(key, page, reads.get(key))
            if payload is None:
                break
            pages.append(payload)
        self.counts.pages_read += len(pages)
        return pages

    def write(self, key: str, tokens: np.ndarray, payload: bytes) -> None:
        """Begins to write the page with `tokens: i32[S]`, unless it is there; removes others."""
        if key in self._sizes:
            return
        proof = bytes.fromhex(key), tokens.astype("<i4").tobytes(), payload
        value = b"".join((MAGIC, digest(*proof), *proof))
        assert len(value) == self.file_bytes
        while self._max_bytes is not None and self._num_bytes + len(value) > self._max_bytes:
            oldest = next((key for key in self._sizes if key not in self._writing), None)
            if oldest is None:
                self.counts.pages_refused += 1
                return
            self.counts.pages_removed += 1
            self._remove(oldest)
        self._sizes[key] = len(value)
        self._num_bytes += len(value)
        self._writing[key] = self._files.write(key, value)

    def poll(self) -> None:
        """Takes note of the writes that are over."""
        for key, write in list(self._writing.items()):
            if write.done():
                self._finish(key, write)
        self._removing = [removal for removal in self._removing if not removal.done()]

    def wait(self, until_s: float) -> None:
        """Waits for what is being written, until `time.monotonic()` is `until_s` at the most.

        What was used since the last time gets a new time of use on disk, in the order of use.
        """
        while (self._writing or self._removing) and time.monotonic() < until_s:
            time.sleep(0.001)
            self.poll()
        now_ns = time.time_ns()
        for number, key in enumerate(self._used):
            stamp = now_ns + number
            try:
                os.utime(self._folder / key, ns=(stamp, stamp))
            except OSError:
                continue  # it is gone, which is found when it is read
        self._used.clear()

    def _by_page(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        size = self._page_size
        tokens = np.asarray(tokens).astype("<i4")
        return (tokens[end - size : end] for end in range(size, len(tokens) + 1, size))

    def _proved(self, key: str, tokens: np.ndarray, read: ts.Future | None) -> bytes | None:
        """The payload of a file that is what was written for these tokens; else it is forgotten."""
        failure = None if read is None else read.exception()
        if read is not None and failure is None and read.result().state == "missing":
            self.counts.missing_pages += 1
            self._forget(key)
            return None
        value = b"" if read is None or failure is not None else read.result().value
        proof = bytes.fromhex(key) + tokens.tobytes()
        start = len(MAGIC) + DIGEST_BYTES
        is_sound = (
            len(value) == self.file_bytes
            and value.startswith(MAGIC + digest(value[start:]))
            and value.startswith(proof, start)
        )
        if is_sound:
            return value[start + len(proof) :]
        self.counts.bad_pages += 1
        self._remove(key)
        return None

    def _finish(self, key: str, write: ts.Future) -> None:
        del self._writing[key]
        if write.exception() is None:
            self.counts.pages_written += 1
        else:
            self.counts.pages_refused += 1
            self._forget(key)

    def _remove(self, key: str) -> None:
        self._forget(key)
        self._removing.append(self._files.write(key, None))

    def _forget(self, key: str) -> None:
        self._num_bytes -= self._sizes.pop(key)
        self._used.pop(key, None)


def _scan(folder: Path) -> OrderedDict[str, int]:
    """Sizes of the files that can be pages, the longest unused first."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if KEY.fullmatch(entry.name) and entry.is_file():
                status = entry.stat()
                found.append((status.st_mtime_ns, entry.name, status.st_size))
    return OrderedDict((name, size) for _, name, size in sorted(found))
