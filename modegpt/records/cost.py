"""Where a run's time went, against what the machine could have done: pure functions of a record's ``cost``."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from modegpt.cost.roofline import Ceiling

COMPRESSION = "compression"
MEASURING_ERROR = 0.05
"""By so much a share of a rate that was measured may lie above 1."""
SLOW_PROBE = "the probe ran slow"
"""What is said where a stage beat the measured rates, which then are not the machine's."""


def compression_stages(cost: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The stages that compression is made of."""
    return [stage for stage in cost["stages"] if COMPRESSION in (stage["name"], stage.get("within"))]


def ceiling_of(cost: Mapping[str, Any]) -> Ceiling | None:
    """The machine's measured rates; None in a record of before they were."""
    return Ceiling(**cost["machine"]) if "machine" in cost else None


def floor_seconds(cost: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of compression's forward passes, Gram matrices and factorisations at the measured rates, by kind.

    The forward counts in full whatever is not a product in it. Empty without measured rates or counted work.
    """
    ceiling, work = ceiling_of(cost), defaultdict[str, float](float)
    for stage in compression_stages(cost):
        for name, flops in stage.get("work", {}).items():
            work[name] += flops
    return ceiling.floor(work) if ceiling else {}


def ceiling_share(stage: Mapping[str, Any], ceiling: Ceiling) -> float | None:
    """The least time for what the stage did over its seconds; None without counted work."""
    if not stage.get("work") or not stage["seconds"]:
        return None
    return ceiling.least_seconds(stage["work"], stage["bytes"]) / float(stage["seconds"])


def probe_ran_slow(cost: Mapping[str, Any]) -> bool:
    """Whether a stage beat the machine's measured rates: something else kept the machine busy when they were taken."""
    ceiling = ceiling_of(cost)
    shares = [ceiling_share(stage, ceiling) for stage in cost["stages"]] if ceiling else []
    return any(share is not None and share > 1 + MEASURING_ERROR for share in shares)


def stage_name(stage: Mapping[str, Any], stages: Iterable[Mapping[str, Any]]) -> str:
    """What a stage is called in a list of ``stages``: one with others inside is what they leave of it."""
    name = str(stage["name"])
    return f"rest of {name}" if any(other.get("within") == name for other in stages) else name


def cost_rows(cost: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row a stage: name, seconds, GFLOP, GB, GFLOP/s, share of the ceiling.

    Dashes for what was not counted, and for all shares where they cannot be trusted (`probe_ran_slow`).
    """
    ceiling = None if probe_ran_slow(cost) else ceiling_of(cost)
    rows: list[tuple[str, ...]] = []
    for stage in cost["stages"]:
        share = ceiling_share(stage, ceiling) if ceiling else None
        rate = stage["flops"] / stage["seconds"] / 1e9 if stage["flops"] and stage["seconds"] else None
        name = ("  " if stage.get("within") else "") + stage_name(stage, cost["stages"])
        rows.append(
            (
                name,
                f"{stage['seconds']:.2f}",
                f"{stage['flops'] / 1e9:,.1f}" if stage["flops"] else "-",
                f"{stage['bytes'] / 1e9:,.2f}" if stage["bytes"] else "-",
                "-" if rate is None else f"{rate:,.1f}",
                "-" if share is None else f"{100 * min(share, 1):.0f} %",
            )
        )
    return rows


COST_HEADERS = ("stage", "seconds", "GFLOP", "GB", "GFLOP/s", "of ceiling")


def floor_line(cost: Mapping[str, Any]) -> str | None:
    """Compression's seconds over its floor, in words; None where there is no floor to compare with."""
    floor = floor_seconds(cost)
    total = sum(stage["seconds"] for stage in compression_stages(cost))
    if not floor or not total:
        return None
    if probe_ran_slow(cost):
        return f"{total:.2f} s, its floor is not known: {SLOW_PROBE}"
    parts = " + ".join(f"{kind} {seconds:.2f}" for kind, seconds in floor.items())
    return f"{total:.2f} s, {total / sum(floor.values()):.2f} x its floor of {sum(floor.values()):.2f} s ({parts})"


def machine_line(cost: Mapping[str, Any]) -> str | None:
    """The measured rates in words."""
    ceiling = ceiling_of(cost)
    if ceiling is None:
        return None
    products = ", ".join(f"{dtype} {rate / 1e9:,.1f}" for dtype, rate in ceiling.gemm.items())
    cholesky, copy = ceiling.factorisation / 1e9, ceiling.copy / 1e9
    measured = f"measured; {SLOW_PROBE}, so no share of these is shown" if probe_ran_slow(cost) else "measured"
    return f"products {products} GFLOP/s, float64 Cholesky {cholesky:,.1f} GFLOP/s, copy {copy:,.1f} GB/s ({measured})"
