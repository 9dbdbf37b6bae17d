"""What the host adds to a step: it is not in the cost model, and of 2023's engines not known."""

from absl import flags

from jaxpage.sim.cost_model import Overhead

FLAGS = flags.FLAGS

# With this both of Fig 13's batches of pages come out as printed: `fig13_batched_requests`, with
# ShareGPT's and Alpaca's recorded lengths, finds it. It is no default of any other figure; there
# it stands as one of the ablations.
OF_FIG_13 = Overhead(step_s=0.0079, row_s=0.00018)


def define_flags() -> None:
    flags.DEFINE_float("overhead_s", 0.0, "Seconds that the host adds to a step.", lower_bound=0.0)
    flags.DEFINE_float(
        "overhead_per_row_s", 0.0, "And for each token that a step samples.", lower_bound=0.0
    )


def by_flags() -> Overhead:
    return Overhead(FLAGS.overhead_s, FLAGS.overhead_per_row_s)


def longer(overhead: Overhead, step_s: float, row_s: float = 0.0) -> Overhead:
    """With so many seconds more a step, and a row."""
    return Overhead(overhead.step_s + step_s, overhead.row_s + row_s)
