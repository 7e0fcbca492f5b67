"""Allocation policies by name: each turns block influence into one sparsity a layer at the wanted mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from modegpt.allocation import allocate


class Policy(Protocol):
    """``influence`` (L,) is None where ``needs_influence`` is False. ``sparsity``: the mean to meet."""

    needs_influence: ClassVar[bool]

    def __call__(self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator) -> list[float]: ...


@dataclass(frozen=True)
class Uniform:
    """Every layer alike."""

    needs_influence: ClassVar[bool] = False

    def __call__(self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator) -> list[float]:
        return allocate.uniform(num_layers, sparsity)


@dataclass(frozen=True)
class Explicit:
    """One sparsity a layer as given; the wanted mean is not consulted."""

    values: list[float]
    needs_influence: ClassVar[bool] = False

    def __call__(self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator) -> list[float]:
        return allocate.explicit(self.values, num_layers)


@dataclass(frozen=True)
class Entropic:
    """The paper's: ``L phi softmax(-s / epsilon)``, capped, the rest redistributed."""

    epsilon: float = 0.1
    cap: float = 0.8
    needs_influence: ClassVar[bool] = True

    def __call__(self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator) -> list[float]:
        return allocate.entropic(influence, sparsity, epsilon=self.epsilon, cap=self.cap)


@dataclass(frozen=True)
class EntropicCap:
    """Entropic with epsilon chosen so that the most compressed layer just meets the cap."""

    cap: float = 0.8
    needs_influence: ClassVar[bool] = True

    def __call__(self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator) -> list[float]:
        return allocate.entropic_cap(influence, sparsity, cap=self.cap)


@dataclass(frozen=True)
class Inverse:
    """Control: entropic on the negated influence."""

    epsilon: float = 0.1
    cap: float = 0.8
    needs_influence: ClassVar[bool] = True

    def __call__(self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator) -> list[float]:
        return allocate.inverse(influence, sparsity, epsilon=self.epsilon, cap=self.cap)


@dataclass(frozen=True)
class Random:
    """Control: the entropic sparsities in random order."""

    epsilon: float = 0.1
    cap: float = 0.8
    needs_influence: ClassVar[bool] = True

    def __call__(self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator) -> list[float]:
        return allocate.random(influence, sparsity, epsilon=self.epsilon, cap=self.cap, generator=generator)


POLICIES: dict[str, type[Policy]] = {
    "uniform": Uniform,
    "entropic": Entropic,
    "entropic_cap": EntropicCap,
    "explicit": Explicit,
    "inverse": Inverse,
    "random": Random,
}
