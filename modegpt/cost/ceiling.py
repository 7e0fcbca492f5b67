"""What a machine was measured to do; without PyTorch, so that looking at records needs none."""

from dataclasses import dataclass


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

    def seconds(self, work: str, flops: float) -> float:
        """The time ``flops`` take at the rate that limits ``work``, such as ``"gram float64"``."""
        kind, dtype = work.split()
        return flops / (self.factorisation if kind == "factorisation" else self.gemm[dtype])
