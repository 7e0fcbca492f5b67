"""The controls: every module cut by a criterion that looks at no data, uniformly over layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from modegpt.allocation.policies import Uniform
from modegpt.config import CompressionConfig, DecompositionConfig
from modegpt.decompositions import VARIANTS
from modegpt.methods.base import RankMethod
from modegpt.methods.modegpt import MODULES, MoDeGPT


@dataclass(frozen=True)
class Control(MoDeGPT):
    """MoDeGPT with the decompositions called as the control is, and uniform allocation: neither is configured."""

    reads: ClassVar[frozenset[str]] = RankMethod.reads

    @classmethod
    def elsewhere(
        cls, *, compression: CompressionConfig, decomposition: DecompositionConfig, allocation: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The decompositions by the control's name, uniform allocation, and what ``compression`` says about ranks."""
        variants = {module: VARIANTS[module][cls.name]() for module in MODULES}
        ranks = super(MoDeGPT, cls).elsewhere(
            compression=compression, decomposition=decomposition, allocation=allocation
        )
        return variants | {"allocation": Uniform()} | ranks

    choices = RankMethod.choices
    identity = RankMethod.identity


@dataclass(frozen=True)
class Random(Control):
    """Dims chosen at random; "uniform" in the paper's tables."""

    name: ClassVar[str] = "random"


@dataclass(frozen=True)
class Magnitude(Control):
    """Dims chosen by the norms of the weights that they meet."""

    name: ClassVar[str] = "magnitude"
