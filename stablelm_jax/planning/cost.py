"""Time, energy and emissions of a run, from its FLOPs and an assumed utilisation."""

from __future__ import annotations

import dataclasses

# The report's own assumptions for Stable LM 2 1.6B (arXiv 2402.17834, section on emissions).
POWER_USAGE_EFFECTIVENESS = 1.1
KG_CO2_PER_KWH = 0.385  # mean of the US grid


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a whole run.

    Attributes:
      tokens_per_second: of all devices together. hours: by the clock on the wall.
      device_hours: hours x devices. megawatt_hours, tonnes_co2: None where the power is not known.
    """

    tokens_per_second: float
    hours: float
    device_hours: float
    megawatt_hours: float | None
    tonnes_co2: float | None


def cost_of(
    *,
    tokens: float,
    flops_per_token: float,
    devices: int,
    peak_tflops: float,
    mfu: float,
    watts: float | None,
) -> Cost:
    """The cost of `tokens` at `mfu`, both in the convention that `flops_per_token` is counted in.

    Args:
      watts: mean power of one device with its share of the host, before cooling.
    """
    speed = devices * peak_tflops * 1e12 * mfu / flops_per_token
    hours = tokens / speed / 3600
    energy = None if watts is None else hours * devices * watts * POWER_USAGE_EFFECTIVENESS / 1e6
    co2 = None if energy is None else energy * KG_CO2_PER_KWH
    return Cost(speed, hours, hours * devices, energy, co2)
