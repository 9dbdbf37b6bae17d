"""The whole serving state in a folder: saved beside serving, whole or not there, and gone on with.

A snapshot holds every array of `EngineState`, the pages of all tiers among them, and what the host
knows of the run. It appears by a rename, so that a process that is killed at any moment leaves the
last whole one.

An engine of the same capacities takes a snapshot's arrays as they are, divided among its devices
in its own way. Another one, of other capacities or with another number of replicas, takes the
requests alone (`moving`): what had begun is preempted to it, and computed again.
"""

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax

from jaxpage.checkpoint.snapshot_files import SnapshotFiles
from jaxpage.config import ConfigError, require
from jaxpage.engine import processes
from jaxpage.engine.run import Run
from jaxpage.engine.step import EngineState, Setup
from jaxpage.scheduling.state import Requests

_VERSION = 1  # raised when what a snapshot holds changes
_REQUESTS = ".scheduler.requests"


@dataclass(frozen=True)
class SnapshotConfig:
    """Where a run is saved, how often, and how many of the last snapshots stay.

    It is saved when either interval is over, seconds or steps, as soon as the host has a look and
    the snapshot before is written. With `resume` the run in the folder goes on, if there is one.
    """

    folder: str
    every_s: float | None = 30.0
    every_steps: int | None = None
    keep: int = 2
    resume: bool = False

    def __post_init__(self):
        require(
            self.every_s is not None or self.every_steps is not None,
            "snapshots without every_s and every_steps are never made: give one of them",
        )
        for name in ("every_s", "every_steps", "keep"):
            value = getattr(self, name)
            require(value is None or value > 0, f"snapshots: {name}={value} must be more than 0")


class Saved(NamedTuple):
    """What was in a snapshot: all that an engine held, or the requests in its queues alone.

    Requests alone are on the host, their rows counted over all replicas.
    """

    held: EngineState | Requests
    run: Run
    engine: dict[str, Any]  # what the engine knew


class Snapshots:
    """The snapshots of one run, in a folder that is this process's until it is closed.

    Raises:
      ConfigError: the folder cannot be written, is in use, or holds a run that is not to go on.
    """

    def __init__(self, config: SnapshotConfig, setup: Setup):
        self._config, self._setup = config, setup
        self._folder = Path(config.folder).expanduser().resolve()
        self._due_s, self._due_step = 0.0, 0
        with ExitStack() as opened:
            _in_first(lambda: opened.enter_context(_lock(self._folder)))
            self._files = SnapshotFiles(self._folder, config.keep)
            opened.callback(self._files.close)  # waits for what is being written
            self._last = self._files.last
            require(
                self._last is None or config.resume,
                f"save_dir={config.folder} holds a saved run: go on with it by --resume, or choose "
                "another folder",
            )
            self._opened = opened.pop_all()

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(self, *_: object) -> None:
        with self._told("written"):
            self._opened.close()

    def begin(self, run: Run) -> None:
        """Counts the intervals from here on."""
        every_s, every_steps = self._config.every_s, self._config.every_steps
        self._due_s = float("inf") if every_s is None else run.clock.now_s() + every_s
        self._due_step = 2**62 if every_steps is None else run.journal.num_steps + every_steps

    @property
    def is_writing(self) -> bool:
        """Whether the last save is still being written."""
        return self._files.is_writing

    def is_due(self, run: Run) -> bool:
        """Whether to save now: an interval is over, and nothing is being written."""
        is_over = run.clock.now_s() >= self._due_s or run.journal.num_steps >= self._due_step
        return is_over and not processes.any_of(self.is_writing)

    def save(self, state: EngineState, run: Run, engine: dict[str, Any]) -> None:
        """Begins to save; when it returns, `state` may be donated."""
        first_steps = processes.on_host(state.scheduler.requests.first_steps, self._setup.mesh)
        host = {
            "version": _VERSION,
            "model": _model_facts(state, self._setup),
            "layout": _layout(state, self._setup),
            "engine": engine,
            "run": run.to_json(first_steps.reshape(-1)),
        }
        with self._told("written"):
            steps = run.journal.to_arrays()
            self._files.save(run.journal.num_steps, _by_name(state), steps, host)
        self.begin(run)

    def restore(self, state: EngineState) -> Saved | None:
        """The last snapshot, None if there is none; `state` is given up if it can be replaced."""
        if self._last is None:
            return None
        with self._told("read"):
            host, steps = self._files.read_host(self._last)
            self._check(host, state)
            run = Run.from_json(host["run"], steps)
            is_alike = host["layout"] == _layout(state, self._setup)
            read = self._read_state if is_alike else self._read_requests
            return Saved(read(self._last, state), run, host["engine"])

    def _check(self, host: dict[str, Any], state: EngineState) -> None:
        require(
            host["version"] == _VERSION,
            f"save_dir={self._config.folder} was written by another version of jaxpage: begin "
            "anew in another folder",
        )
        here, there = _model_facts(state, self._setup), host["model"]
        changed = [name for name in here if there[name] != here[name]]
        others = [f"{name} {there[name]} (here {here[name]})" for name in changed]
        require(
            not others,
            f"save_dir={self._config.folder} holds a run of another model, with "
            f"{', '.join(others)}: give the same --model and --dtype, or choose another folder",
        )

    def _read_state(self, number: int, state: EngineState) -> EngineState:
        leaves, structure = jax.tree.flatten(state)
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in _by_name(state).items()
        }
        for pages in jax.tree.leaves((state.pool, state.host_pool)):
            if pages.size > 0:
                pages.delete()  # there need not be room for both
        found = self._files.read_arrays(number, abstract)
        names = zip(abstract, leaves, strict=True)
        return structure.unflatten(found.get(name, empty) for name, empty in names)

    def _read_requests(self, number: int, state: EngineState) -> Requests:
        held = state.scheduler.requests
        names = [_REQUESTS + name for name in _by_name(held)]
        found = self._files.read_on_host(number, names)
        num_axes = found[_REQUESTS + ".phases"].ndim  # of rows, and replicas if it was on a mesh
        arrays = (found[name] for name in names)
        rows = (array.reshape(-1, *array.shape[num_axes:]) for array in arrays)
        return jax.tree.structure(held).unflatten(rows)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """What orbax and the disk raise, as an error with its remedy."""
        try:
            yield
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            if processes.are_several() and isinstance(error, TimeoutError):
                remedy = "another process is gone or cannot be reached: start all with --resume"
            elif what == "read":
                remedy = f"delete {self._folder / str(self._last)} to go on from the one before"
            else:
                remedy = "free the disk, or choose another folder"
            raise ConfigError(
                f"save_dir={self._config.folder} cannot be {what}: {error}: {remedy}"
            ) from error


def _in_first(act: Callable[[], object]) -> None:
    """Lets the first process act; if it cannot, no process goes on."""
    failure = None
    if processes.is_first():
        try:
            act()
        except ConfigError as error:
            failure = error
    if processes.any_of(failure is not None):
        raise failure or ConfigError("the first process says why nothing can be saved")


def _lock(folder: Path) -> IO[str]:
    """The file that says that `folder`, which it makes, is in use; it is free with its process."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"save_dir={folder}: {error.strerror}: choose another") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise ConfigError(
            f"save_dir={folder} is in use by another process: wait for it, or choose another folder"
        ) from error
    return lock


def _by_name(tree: Any) -> dict[str, jax.Array]:
    """The leaves of a tree by their paths, in its order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _model_facts(state: EngineState, setup: Setup) -> dict[str, Any]:
    """What must be the same for a run to print the same tokens, as JSON holds it.

    KV heads are as many as a mesh needs. That weights are the same is for the user to see to.
    """
    facts = asdict(setup.model) | {"kv_dtype": state.pool.keys.dtype.name}
    del facts["num_kv_heads"]
    return json.loads(json.dumps(facts))


def _layout(state: EngineState, setup: Setup) -> dict[str, Any]:
    """What must be the same for arrays to mean the same, as JSON holds it."""
    shapes = {name: [leaf.dtype.name, leaf.shape] for name, leaf in _by_name(state).items()}
    facts = {
        "allocator": setup.allocator.name,
        "engine": asdict(setup.engine),
        "shapes": shapes,
    }
    return json.loads(json.dumps(facts))
