"""Flags of a mesh, and by which processes on several hosts serve as one on all of their devices.

One command for each host, the same but for its number:

    python -m experiments.generate --mesh=data:2,model:8 --coordinator_address=HOST:PORT \
        --num_processes=2 --process_id=0 --prompts=IN.jsonl --out=OUT.jsonl

All read the same prompts; the first writes the results.
"""

import os
import socket
import sys
import tempfile
import time
from typing import NoReturn, TextIO

import jax
from absl import flags
from jax.sharding import Mesh

from jaxpage.config import ConfigError, require
from jaxpage.engine import processes
from jaxpage.model import sharding

FLAGS = flags.FLAGS

_NAMES = ("coordinator_address", "num_processes", "process_id")
_FOLDERS: list[tempfile.TemporaryDirectory] = []


def define_mesh_flags() -> None:
    """On which devices the engine runs, of which processes, and when one counts as dead."""
    flags.DEFINE_string(
        "mesh",
        None,
        "The devices to serve on, as data:2,model:4: two replicas that share the requests, each "
        "divided among four devices. Capacities are those of a replica. By default one device.",
    )
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT of the first process, on which it listens and where all others find it.",
    )
    flags.DEFINE_integer(
        "num_processes", None, "How many processes serve together on --mesh.", lower_bound=2
    )
    flags.DEFINE_integer(
        "process_id", None, "Which of them this is, from 0; the first writes.", lower_bound=0
    )
    flags.DEFINE_bool(
        "cluster",
        False,
        "Find the other processes as JAX does under Slurm, Open MPI and Kubernetes, in place of "
        "the three flags that name them.",
    )
    flags.DEFINE_integer(
        "dead_after_s",
        60,
        "After how many seconds of silence another process counts as dead, and this one ends.",
        lower_bound=5,
    )


def mesh_flagged() -> Mesh | None:
    """The mesh of `--mesh`; None without, or in a script that has no such flag."""
    text = FLAGS.mesh if "mesh" in FLAGS else None
    return None if text is None else sharding.make_mesh(text)


def join_flagged() -> None:
    """Joins the processes that the flags name, before JAX looks for devices; none without."""
    if "cluster" not in FLAGS:
        return
    given = [name for name in _NAMES if FLAGS[name].value is not None]
    if not given and not FLAGS.cluster:
        return
    missing = [f"--{name}" for name in _NAMES if name not in given]
    require(
        FLAGS.cluster or not missing,
        f"--{given[0] if given else ''} names one of several processes: give {', '.join(missing)} "
        "too",
    )
    require(
        FLAGS.process_id is None or FLAGS.cluster or FLAGS.process_id < FLAGS.num_processes,
        f"--process_id={FLAGS.process_id} must be less than --num_processes={FLAGS.num_processes}",
    )
    require(FLAGS.mesh is not None, "several processes serve on one mesh: give --mesh too")
    if not FLAGS.cluster and FLAGS.process_id != 0:
        _await_first(FLAGS.coordinator_address)
    try:
        jax.distributed.initialize(
            *(FLAGS[name].value for name in _NAMES),
            initialization_timeout=FLAGS.dead_after_s,
            heartbeat_timeout_seconds=FLAGS.dead_after_s,
            shutdown_timeout_seconds=FLAGS.dead_after_s,
        )
    except (RuntimeError, ValueError) as error:
        where = FLAGS.coordinator_address or "the cluster"
        raise ConfigError(
            f"the other processes are not found by {where}: {error}: start all of them within "
            f"--dead_after_s={FLAGS.dead_after_s} seconds"
        ) from error
    printed = os.dup(1)
    os.dup2(2, 1)  # where libraries print on their way
    sys.stdout = nowhere() if not processes.is_first() else os.fdopen(printed, "w")


def _await_first(address: str) -> None:
    """Waits until the first process listens; JAX would abort if it never did."""
    host, _, port = address.rpartition(":")
    require(
        bool(host) and port.isdecimal(),
        f"--coordinator_address={address} must be HOST:PORT, as in node1:9876",
    )
    until_s = time.monotonic() + FLAGS.dead_after_s
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError as error:
            require(
                time.monotonic() < until_s,
                f"nobody listens at --coordinator_address={address} ({error}): start the first "
                f"process within --dead_after_s={FLAGS.dead_after_s} seconds",
            )
            time.sleep(0.2)


def nowhere() -> TextIO:
    """A file for what only the first process writes."""
    return open(os.devnull, "w", encoding="utf-8")


def folder_of_none() -> str:
    """A folder, gone with the process, for what only the first process writes."""
    folder = tempfile.TemporaryDirectory(prefix="jaxpage-")
    _FOLDERS.append(folder)
    return folder.name


def part() -> None:
    """Ends together with the other processes, where there are some."""
    if processes.are_several():
        jax.distributed.shutdown()


def leave(sentence: str) -> NoReturn:
    """Ends this process with an error, whatever the others do."""
    if processes.are_several():
        print(sentence, file=sys.stderr, flush=True)
        os._exit(1)  # at an ordinary end JAX would wait for the others
    sys.exit(sentence)


def explained(error: Exception) -> str:
    """What a runtime error means in a run of several processes."""
    saved = "with --resume" if "save_dir" in FLAGS and FLAGS.save_dir else "again"
    first_line = str(error).splitlines()[0]
    return (
        f"error: another process is gone or cannot be reached ({first_line:.200}): start all of "
        f"them {saved}"
    )
