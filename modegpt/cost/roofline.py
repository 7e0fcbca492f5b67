"""What a machine was measured to do, and how long work takes at least at these rates.

Without PyTorch, so that looking at records needs none.
"""

from collections.abc import Mapping
from dataclasses import dataclass

FLOOR_KINDS = ("forward", "gram", "factorisation")
"""What a compression cannot do without; its other products (refits, errors) are overhead by this measure."""


@dataclass(frozen=True)
class Ceiling:
    """Measured rates of one device; a roofline's two kinds of roof.

    Args:
        gemm: FLOP/s of a matrix product, by dtype.
        factorisation: FLOP/s of a float64 Cholesky factorisation.
        copy: bytes/s, read and written, of a copy.
        size: of the matrices timed.
    """

    device: str
    gemm: dict[str, float]
    factorisation: float
    copy: float
    size: int

    def best(self, other: "Ceiling") -> "Ceiling":
        """The higher of two measurements of each rate: what else a machine does can only slow one down."""
        return Ceiling(
            device=self.device,
            gemm={dtype: max(rate, other.gemm[dtype]) for dtype, rate in self.gemm.items()},
            factorisation=max(self.factorisation, other.factorisation),
            copy=max(self.copy, other.copy),
            size=self.size,
        )

    def seconds(self, work: str, flops: float) -> float:
        """The time ``flops`` take at the rate that limits ``work``, such as ``"gram float64"``."""
        kind, dtype = work.split()
        return flops / (self.factorisation if kind == "factorisation" else self.gemm[dtype])

    def floor(self, work: Mapping[str, float]) -> dict[str, float]:
        """Seconds of ``work`` (FLOPs by kind and precision) that compression cannot do without, by kind."""
        seconds: dict[str, float] = {}
        for name, flops in work.items():
            kind = name.split()[0]
            seconds[kind] = seconds.get(kind, 0.0) + self.seconds(name, flops)
        return {kind: seconds[kind] for kind in FLOOR_KINDS if kind in seconds}

    def least_seconds(self, work: Mapping[str, float], num_bytes: float) -> float:
        """The time for the arithmetic, or for moving the bytes if that is longer."""
        return max(sum(self.seconds(name, flops) for name, flops in work.items()), num_bytes / self.copy)
