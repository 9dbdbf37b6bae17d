"""Flags by which a run is saved while it serves, and gone on with."""

from absl import flags

from jaxpage.config import require
from jaxpage.engine.snapshots import SnapshotConfig

FLAGS = flags.FLAGS

_OTHERS = ("save_every_s", "save_every_steps", "keep_saves", "resume")


def define_save_flags() -> None:
    """Where a run is saved, and how often."""
    flags.DEFINE_string(
        "save_dir",
        None,
        "A folder in which the whole run is saved while it serves, pages and all, so that --resume "
        "goes on with it; whoever can read it can read the prompts. By default it is not saved.",
    )
    flags.DEFINE_float(
        "save_every_s",
        None,
        "Save when this many seconds are over; 30 where neither interval is given.",
        lower_bound=0.0,
    )
    flags.DEFINE_integer(
        "save_every_steps", None, "Save when this many steps are over.", lower_bound=1
    )
    flags.DEFINE_integer("keep_saves", 2, "How many of the last saves stay.", lower_bound=1)
    flags.DEFINE_bool(
        "resume",
        False,
        "Go on with the run in --save_dir, if there is one; the same requests are to be given. "
        "With other capacities or on another mesh, what had begun is computed again.",
    )


def snapshots_flagged() -> SnapshotConfig | None:
    """What the flags say of saving; None without `--save_dir`."""
    if FLAGS.save_dir is None:
        given = [f"--{name}" for name in _OTHERS if FLAGS[name].present]
        require(not given, f"{', '.join(given)}: name the folder too, by --save_dir")
        return None
    every_s, every_steps = FLAGS.save_every_s, FLAGS.save_every_steps
    if every_s is None and every_steps is None:
        every_s = 30.0
    return SnapshotConfig(FLAGS.save_dir, every_s, every_steps, FLAGS.keep_saves, FLAGS.resume)
