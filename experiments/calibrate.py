"""Fits the cost model's efficiencies to measured kernels, and says how far off they are.

    python -m experiments.calibrate --device=a100-80gb --rows=FORMAT:WHICH:FILE --out=FILE.json

A row is a kernel that was measured: what it had to compute and to move, and its seconds. FORMAT is
`measured` (WHICH is the device's name in the file; `experiments.measure_device` writes such files),
or one of Vidur's: `vidur-linear` (WHICH: a100, h100, a40), `vidur-attention` (WHICH: model and
degree of parallelism, as in llama-2-70b/2), `vidur-collectives` (WHICH: a100_dgx, h100_dgx). A
fifth of the rows is held out by lot and never fitted; errors are of those, beside the errors of
non-negative least squares on the same rows. Rows of `--check` are not fitted at all: with
`--check_device` they show how far the efficiencies of one device are those of another. The file
holds the efficiencies, for `--efficiencies`. With --host, an engine's host that Vidur profiled, it
says what that adds to a step and a row, for `--overhead_s` and `--overhead_per_row_s`. Seconds on a
laptop. Expected on Vidur's profiles: medians of at most 10 % on held-out rows of an A100, at most
20 % on an H100's. Refuted if not.
"""

import json
import re
from pathlib import Path

import numpy as np
from absl import flags

from experiments import common
from jaxpage.config import require
from jaxpage.sim import calibrate, profiles
from jaxpage.sim.calibrate import Errors
from jaxpage.sim.device import DEVICES, DeviceSpec, find_device
from jaxpage.sim.kernels import KINDS, Efficiency
from jaxpage.sim.profiles import Rows
from jaxpage.sim.shapes import SHAPES

FLAGS = flags.FLAGS

FORMATS = ("measured", "vidur-linear", "vidur-attention", "vidur-collectives")


def define_flags() -> None:
    known = f"A JSON file, or one of {', '.join(sorted(DEVICES))}."
    flags.DEFINE_string("device", None, f"The device of --rows. {known}", required=True)
    flags.DEFINE_list("rows", None, "Rows to fit, as FORMAT:WHICH:FILE.", required=True)
    flags.DEFINE_list("check", [], "Rows that are only compared with, in the same form.")
    flags.DEFINE_string("check_device", None, f"The device of --check. {known}")
    flags.DEFINE_string(
        "host", None, "What a host took, as MODEL/DEGREE:FILE with the model by its full name."
    )
    flags.DEFINE_string("report", "", "Report errors of groups that match this pattern as well.")
    flags.DEFINE_integer("seed", 0, "The seed of the lot that holds rows out.")
    flags.DEFINE_string("out", None, "The JSON file for the efficiencies.", required=True)


def main(_: list[str]) -> None:
    device = find_device(FLAGS.device)
    rows = read_all(FLAGS.rows)
    with common.open_for_writing(FLAGS.out) as out:
        fits = calibrate.calibrate(rows, device, FLAGS.seed)
        efficiencies = {
            kind: {name: float(value) for name, value in fit.efficiency._asdict().items()}
            for kind, fit in fits.items()
        }
        json.dump({"device": device.name, "kinds": efficiencies}, out, indent=2)
    for kind, fit in fits.items():
        print(f"{kind}: {sentence(fit.held_out)}; least squares: {sentence(fit.held_out_nnls)}")
    by_kind = {kind: fit.efficiency for kind, fit in fits.items()}
    result = {
        "kinds": {
            kind: {
                "rows": int((rows.kinds == KINDS.index(kind)).sum()),
                **efficiencies[kind],
                "held_out": fit.held_out._asdict(),
                "held_out_nnls": fit.held_out_nnls._asdict(),
            }
            for kind, fit in fits.items()
        },
        **compared("held_out", held_out(rows), by_kind, device),
    }
    if FLAGS.check:
        require(FLAGS.check_device is not None, "--check: name its device in --check_device")
        other = find_device(FLAGS.check_device)
        result |= compared("check", read_all(FLAGS.check), by_kind, other)
    if FLAGS.host is not None:
        result["host"] = host_of(FLAGS.host)
    common.print_last_line(result | common.provenance())


def read_all(specs: list[str]) -> Rows:
    """The rows of all specifications."""
    return profiles.joined([read(spec) for spec in specs], ",".join(specs))


def read(spec: str) -> Rows:
    """The rows of `FORMAT:WHICH:FILE`."""
    parts = spec.split(":", 2)
    require(
        len(parts) == 3 and parts[0] in FORMATS,
        f"rows {spec!r}: expected FORMAT:WHICH:FILE with FORMAT one of {', '.join(FORMATS)}",
    )
    form, which, path = parts[0], parts[1], Path(parts[2])
    require(path.is_file(), f"rows {spec!r}: there is no file {path}")
    if form == "measured":
        return profiles.read_measured(path, which)
    if form == "vidur-linear":
        return profiles.read_vidur_linear(path, which)
    if form == "vidur-collectives":
        return profiles.read_vidur_collectives(path, which)
    model, _, degree = which.partition("/")
    require(
        model in SHAPES and degree.isdigit() and int(degree) > 0,
        f"rows {spec!r}: expected MODEL/DEGREE with MODEL one of {', '.join(SHAPES)}",
    )
    return profiles.read_vidur_attention(path, SHAPES[model], int(degree))


def host_of(spec: str) -> dict[str, float]:
    """What the host of `MODEL/DEGREE:FILE` adds to a step and a row."""
    which, _, path = spec.partition(":")
    model, _, degree = which.rpartition("/")
    require(
        bool(model) and degree.isdigit() and int(degree) > 0 and Path(path).is_file(),
        f"--host={spec}: expected MODEL/DEGREE:FILE, and the file to be there",
    )
    host, errors = calibrate.fit_host(*profiles.read_vidur_host(Path(path), model, int(degree)))
    print(
        f"host: {1e3 * host.step_s:.2f} ms a step and {1e3 * host.row_s:.3f} ms a row; "
        f"each by the others: {sentence(errors)}"
    )
    return {**host._asdict(), **errors._asdict()}


def held_out(rows: Rows) -> Rows:
    """All rows that no fit has seen."""
    parts = [rows.take(rows.kinds == kind) for kind in np.unique(rows.kinds)]
    return profiles.joined([calibrate.split(part, FLAGS.seed)[1] for part in parts], "held out")


def compared(
    name: str, rows: Rows, fits: dict[str, Efficiency], device: DeviceSpec
) -> dict[str, dict]:
    """Errors on rows of the kinds that were fitted: in all, by region, and of `--report`."""
    rows = rows.take(np.isin(rows.kinds, [KINDS.index(kind) for kind in fits]))
    predicted = np.zeros_like(rows.seconds)
    for kind, efficiency in fits.items():
        chosen = rows.kinds == KINDS.index(kind)
        predicted[chosen] = calibrate.predict(efficiency, rows.take(chosen), device)
    found = {"all": calibrate.errors(predicted, rows.seconds)}
    found |= calibrate.errors_by_region(predicted, rows)
    if FLAGS.report:
        places = [i for i, group in enumerate(rows.groups) if re.search(FLAGS.report, group)]
        require(len(places) > 0, f"--report={FLAGS.report!r} matches no group of {name}")
        some, predicted_some = rows.take(np.asarray(places)), predicted.take(places)
        found[FLAGS.report] = calibrate.errors(predicted_some, some.seconds)
        regions = calibrate.errors_by_region(predicted_some, some)
        found |= {f"{FLAGS.report}, {region}": errors for region, errors in regions.items()}
    for region, errors in found.items():
        print(f"{name}, {region}: {sentence(errors)}")
    return {name: {region: errors._asdict() for region, errors in found.items()}}


def sentence(errors: Errors) -> str:
    """Errors for people."""
    return f"{errors.num_rows} rows, median {errors.median:.1%} off, 90 % within {errors.p90:.1%}"


if __name__ == "__main__":
    define_flags()
    common.run(main)
