"""Where a run's time went, against what the machine could have done: pure functions of a record's ``cost``."""

from collections.abc import Mapping
from typing import Any

from modegpt.cost.ceiling import Ceiling

COMPRESSION = "compression"
FLOOR_KINDS = ("forward", "gram", "factorisation")
"""What a compression cannot do without; its other products (refits, errors) are overhead by this measure."""


def compression_stages(cost: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The stages that compression is made of."""
    return [stage for stage in cost["stages"] if COMPRESSION in (stage["name"], stage.get("within"))]


def ceiling_of(cost: Mapping[str, Any]) -> Ceiling | None:
    """The machine's measured rates; None in a record of before they were."""
    return Ceiling(**cost["machine"]) if "machine" in cost else None


def floor_seconds(cost: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of compression's forward passes, Gram matrices and factorisations at the machine's measured rates, by kind.

    Gram matrices count as plain products (``2 T n^2``), although symmetry saves nearly half; the forward counts in
    full whatever is not a product in it. Empty without measured rates or counted work.
    """
    ceiling, seconds = ceiling_of(cost), {}
    for stage in compression_stages(cost) if ceiling else ():
        for work, flops in stage.get("work", {}).items():
            kind = work.split()[0]
            if kind in FLOOR_KINDS:
                seconds[kind] = seconds.get(kind, 0.0) + ceiling.seconds(work, flops)
    return {kind: seconds[kind] for kind in FLOOR_KINDS if kind in seconds}


def ceiling_share(stage: Mapping[str, Any], ceiling: Ceiling) -> float | None:
    """The least time for the stage's FLOPs, or for its bytes if that is longer, over its seconds; None without counted work."""
    if not stage.get("work") or not stage["seconds"]:
        return None
    least = sum(ceiling.seconds(work, flops) for work, flops in stage["work"].items())
    return max(least, stage["bytes"] / ceiling.copy) / stage["seconds"]


def cost_rows(cost: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row a stage: name, seconds, GFLOP, GB, GFLOP/s, share of the ceiling in percent; a dash for what was not counted."""
    ceiling = ceiling_of(cost)
    rows = []
    for stage in cost["stages"]:
        share = ceiling_share(stage, ceiling) if ceiling else None
        rate = stage["flops"] / stage["seconds"] / 1e9 if stage["flops"] and stage["seconds"] else None
        name = f"  {stage['name']}" if stage.get("within") else stage["name"]
        rows.append(
            (
                name,
                f"{stage['seconds']:.2f}",
                f"{stage['flops'] / 1e9:,.1f}" if stage["flops"] else "-",
                f"{stage['bytes'] / 1e9:,.2f}" if stage["bytes"] else "-",
                "-" if rate is None else f"{rate:,.1f}",
                "-" if share is None else f"{100 * share:.0f} %",
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
    parts = " + ".join(f"{kind} {seconds:.2f}" for kind, seconds in floor.items())
    return f"{total:.2f} s, {total / sum(floor.values()):.2f} x its floor of {sum(floor.values()):.2f} s ({parts})"


def machine_line(cost: Mapping[str, Any]) -> str | None:
    """The measured rates in words."""
    ceiling = ceiling_of(cost)
    if ceiling is None:
        return None
    products = ", ".join(f"{dtype} {rate / 1e9:,.1f}" for dtype, rate in ceiling.gemm.items())
    return f"products {products} GFLOP/s, float64 Cholesky {ceiling.factorisation / 1e9:,.1f} GFLOP/s, copy {ceiling.copy / 1e9:,.1f} GB/s (measured)"
