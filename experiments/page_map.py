"""Draws the page map of one recorded run: which request owns which page over time.

    python -m experiments.page_map --run=results/demo/paged --out=page_map.png

The run is a folder that `experiments.serve` or `experiments.demo` wrote. A few seconds.
"""

from pathlib import Path

from absl import flags

from experiments import common, plots
from jaxpage.config import require

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("run", None, "The folder of the recorded run.", required=True)
    flags.DEFINE_string("out", None, "The PNG file to write.", required=True)


def main(_: list[str]) -> None:
    run = plots.read_run(Path(FLAGS.run))
    require(run.is_measured, f"{FLAGS.run}: this run failed ({run.summary.get('status')})")
    plots.page_map([run], Path(FLAGS.out))
    print(FLAGS.out)


if __name__ == "__main__":
    define_flags()
    common.run(main)
