"""Does a step take longer when the pool is ten times larger?

    python -m experiments.bench_pool

Two engines on the same parameters, one with a pool of ten times the pages, run the same requests
and take turns, so that a busy machine slows both. About a minute and 12 GB of memory.
Expected: a ratio of 1, within a few percent. It would be refuted by a step that copies its pool.
"""

import time
from dataclasses import replace

import jax
import numpy as np
from absl import flags

from experiments import common
from jaxpage.model.placement import serving_params

FLAGS = flags.FLAGS

FACTORS = (1, 10)
NEW_TOKENS = 128
STEPS_BEFORE = 48  # the prompts are computed in fewer
STEPS_A_TURN = 4


def define_flags() -> None:
    common.define_model_flags()
    common.define_engine_flags(prefix_cache=False)
    flags.adopt_module_key_flags(common)
    flags.DEFINE_integer("turns", 8, "How often each engine is timed.", lower_bound=1)


def main(_: list[str]) -> None:
    model = common.load_flagged_model()
    requests = common.bench_requests(model, FLAGS.num_slots, NEW_TOKENS)
    config = common.config_for(model, requests)
    params = serving_params(model.params, FLAGS.dtype)
    engines = []
    for factor in FACTORS:
        larger = replace(config, num_pages=config.num_pages * factor)
        engine = common.engine_for(model, params, larger, "paged")
        engine.compile()
        for row, request in enumerate(requests):
            engine.submit(request, (row,))
        engine.advance(STEPS_BEFORE)
        jax.block_until_ready(engine.state)
        engines.append(engine)

    times_ms: list[list[float]] = [[] for _ in FACTORS]
    for _turn in range(FLAGS.turns):
        for engine, times in zip(engines, times_ms, strict=True):
            start_s = time.perf_counter()
            engine.advance(STEPS_A_TURN)
            jax.block_until_ready(engine.state)
            times.append((time.perf_counter() - start_s) / STEPS_A_TURN * 1e3)
    ratios = [large / small for small, large in zip(*times_ms, strict=True)]
    common.print_last_line(
        {
            "num_pages": config.num_pages,
            "step_ms": float(np.median(times_ms[0])),
            "step_ms_with_ten_times_the_pages": float(np.median(times_ms[1])),
            "ratio_median": float(np.median(ratios)),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            **common.provenance(),
        }
    )


if __name__ == "__main__":
    define_flags()
    common.run(main)
