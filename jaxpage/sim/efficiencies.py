"""Efficiencies of A100s, measured: the cost model's default for every device.

Fitted by `experiments.calibrate --device=a100-80gb` to the profiles that Vidur publishes
(github.com/microsoft/vidur, MIT): linear and elementwise operations of seven models, attention of
Llama-2-70B on two devices, sums over two to eight devices of a DGX. Where the rows say nothing of
a parameter (operations of kernels that only move, items of kernels that have none) it is as the fit
began, and has no effect. Nobody measured copies to the host there: theirs are an assumption.
"""

import json
from pathlib import Path

from jaxpage.config import ConfigError
from jaxpage.sim.kernels import Efficiency

A100_MEASURED: dict[str, Efficiency] = {
    "linear": Efficiency(0.7357, 0.9991, 5.663e-06, 1e-07, 0.4999),
    "norm": Efficiency(0.7, 0.3711, 2.366e-06, 1e-07, 1.0),
    "rope": Efficiency(0.7, 0.4491, 2.333e-06, 1e-07, 1.0),
    "activation": Efficiency(0.7, 0.4939, 2.034e-06, 1e-07, 1.0),
    "add": Efficiency(0.7, 0.9331, 1.19e-06, 1e-07, 1.0),
    "decode": Efficiency(0.1425, 0.8811, 1.583e-05, 4.518e-09, 0.4558),
    "prefill": Efficiency(0.4084, 1.16, 1.204e-06, 1.663e-05, 0.7752),
    "all_reduce": Efficiency(0.7, 0.5615, 4.238e-05, 1.768e-06, 1.0),
    # Assumed: four fifths of the bus, and 10 us to start each copy.
    "host_copy": Efficiency(0.7, 0.8, 0.0, 1e-05, 1.0),
}  # fmt: skip


def read_efficiencies(path: Path) -> dict[str, Efficiency]:
    """Those that `experiments.calibrate` wrote to a file; the kinds that it had rows of.

    Raises:
      ConfigError: the file does not hold them.
    """
    try:
        kinds = json.loads(path.read_text())["kinds"]
        return {kind: Efficiency(**kinds[kind]) for kind in kinds}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not a file of efficiencies ({error!r}); experiments.calibrate writes one"
        ) from error
