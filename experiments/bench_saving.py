"""What does saving the whole serving state cost, and how soon does a saved run go on?

    python -m experiments.bench_saving

Two engines serve the demo's load (ShareGPT prompts in 566 MB of KV) and take turns of as many steps
as fill `--interval_s`; one of them is saved at the start of each of its turns, and the save has to
be on disk before the turn is over. Then another process goes on with the last save: from its start
to its first new token, imports, model, compiled programs and pages are loaded. About five minutes.
Expected: turns at most 5 % longer at one save in 30 s; less than 10 s to the first token.
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
from absl import flags

from experiments import common, demo_load, serve
from jaxpage.config import require
from jaxpage.engine.host import Engine
from jaxpage.engine.request import Request
from jaxpage.engine.run import Run
from jaxpage.engine.snapshots import SnapshotConfig, Snapshots
from jaxpage.model.placement import serving_params

FLAGS = flags.FLAGS

STEPS_A_LOOK = 8


def define_flags() -> None:
    common.define_model_flags()
    common.define_engine_flags(num_slots=demo_load.NUM_SLOTS)
    flags.DEFINE_integer("kv_bytes", demo_load.KV_BYTES, "How many bytes keys and values may take.")
    flags.DEFINE_integer("requests", 128, "How many prompts to serve.", lower_bound=1)
    flags.DEFINE_float("interval_s", 30.0, "Seconds between two saves.", lower_bound=0.1)
    flags.DEFINE_integer("turns", 3, "How often each engine is timed.", lower_bound=1)
    flags.DEFINE_string("resume_dir", None, "Only go on with the save in this folder.")
    flags.adopt_module_key_flags(common)
    FLAGS.set_default("page_size", demo_load.PAGE_SIZE)


def main(_: list[str]) -> None:
    if FLAGS.resume_dir is not None:
        common.print_last_line(go_on(FLAGS.resume_dir))
        return
    with tempfile.TemporaryDirectory() as folder:
        row = serve_in_turns(folder)
        gc.collect()  # as little is held beside the process that goes on as if this one had died
        row |= time_resume(folder)
    common.print_last_line(row | common.provenance())


def load(num_engines: int) -> tuple[list[Engine], list[Request], dict[str, float]]:
    """Engines on one model, ready to serve, and requests; seconds of what that took."""
    start_s = time.perf_counter()
    model = common.load_flagged_model()
    items = serve.read_workload(model).items
    requests = [Request(i.id, i.prompt_ids, i.max_new_tokens, ignore_eos=True) for i in items]
    config = serve.budgeted_config(model, len(requests))
    params = serving_params(model.params, FLAGS.dtype)
    model_s = time.perf_counter() - start_s
    engines = [common.engine_for(model, params, config, "paged") for _ in range(num_engines)]
    return engines, requests, {"model_s": model_s, "compile_s": engines[0].compile()}


def serve_in_turns(folder: str) -> dict:
    """What saves into `folder` cost the engine that makes them."""
    engines, requests, _ = load(2)
    return time_turns(engines, requests, folder)


def time_turns(engines: list[Engine], requests: list[Request], folder: str) -> dict:
    """Both engines in turns; what the saves of the second cost it."""
    run = Run.of(1, engines[0].setup.engine.num_requests)
    run.step_times_s = [defaultdict(float)]  # which nobody reads here
    for request in requests:
        run.receive(request, None)
    while run.waiting and (seats := run.seat(run.waiting[0])) is not None:
        request = run.waiting.popleft()
        for engine in engines:
            engine.submit(request, seats)
    plain, saving = engines
    ratios, pauses_s, writes_s = [], [], []
    with Snapshots(SnapshotConfig(folder, keep=1), saving.setup) as snapshots:
        for turn in range(FLAGS.turns):
            start_s, num_looks = time.perf_counter(), 0
            while time.perf_counter() - start_s < FLAGS.interval_s:
                advance(plain)
                num_looks += 1
            plain_s = time.perf_counter() - start_s
            start_s = time.perf_counter()
            run.journal.records.append({"turn": turn})  # a snapshot's number is how many there are
            run.journal.step_times_s.append(run.clock.now_s())
            snapshots.save(saving.state, run, saving.known())
            pauses_s.append(time.perf_counter() - start_s)
            for _ in range(num_looks):
                advance(saving)
                if len(writes_s) == turn and not snapshots.is_writing:
                    writes_s.append(time.perf_counter() - start_s)
            ratios.append((time.perf_counter() - start_s) / plain_s)
            require(
                len(writes_s) == turn + 1,
                f"--interval_s={FLAGS.interval_s}: a save takes longer: raise it",
            )
    running = np.array(saving.state.scheduler.running)
    require(bool(running.any()), f"--turns={FLAGS.turns}: the load ended before: give fewer")
    return {
        "interval_s": FLAGS.interval_s,
        "longer_by": [ratio - 1 for ratio in ratios],
        "longer_by_median": float(np.median(ratios)) - 1,
        "pauses_s": pauses_s,
        "written_after_s": writes_s,
        "saved_bytes": sum(path.stat().st_size for path in Path(folder).rglob("*")),
    }


def advance(engine: Engine) -> None:
    engine.advance(STEPS_A_LOOK)
    jax.block_until_ready(engine.state)


def time_resume(folder: str) -> dict:
    """A process of its own that goes on; what it says, and when it had its first token."""
    command = [sys.executable, "-m", "experiments.bench_saving", *sys.argv[1:]]
    start_s = time.time()
    process = subprocess.run(
        [*command, f"--resume_dir={folder}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    require(process.returncode == 0, f"the process that goes on failed: {process.stderr[-500:]}")
    phases = json.loads(process.stdout.splitlines()[-1])
    first_token_s = phases.pop("first_token_at_s") - start_s
    return {"resume_to_first_token_s": first_token_s, "resume_phases_s": phases}


class _Heard(Exception):
    pass


def go_on(folder: str) -> dict[str, float]:
    """Goes on with the save in `folder` until a token is there; when that was."""
    (engine,), requests, seconds = load(1)

    def listen(request_id: str, sample: int, tokens: list[int]) -> None:
        raise _Heard

    snapshots = SnapshotConfig(folder, resume=True)
    start_s = time.perf_counter()
    try:
        engine.serve(requests, steps_per_read=1, on_tokens=listen, snapshots=snapshots)
    except _Heard:
        return seconds | {
            "restore_and_first_step_s": time.perf_counter() - start_s,
            "first_token_at_s": time.time(),
        }
    raise AssertionError("a saved run has tokens to come")


if __name__ == "__main__":
    define_flags()
    common.run(main)
