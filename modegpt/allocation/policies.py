"""Allocation policies by name: each turns block influence into one sparsity a layer at the wanted mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from modegpt.allocation import allocate
from modegpt.errors import UserError


class Policy(Protocol):
    """``influence`` (L,) is None where ``needs_influence`` is False. ``sparsity``: the mean to meet."""

    needs_influence: ClassVar[bool]

    def __call__(
        self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator
    ) -> list[float]: ...


@dataclass(frozen=True)
class Softmax:
    """The range of the entropic policies' options."""

    epsilon: float = 0.1
    cap: float = 0.8
    needs_influence: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < float("inf"):
            raise UserError(
                f"allocation.epsilon={self.epsilon} must be positive: it is the temperature of the allocation"
            )
        check_cap(self.cap)


def check_cap(cap: float) -> None:
    if not 0 < cap < 1:
        raise UserError(f"allocation.cap={cap} must lie between 0 and 1: it is the largest share a layer may lose")


@dataclass(frozen=True)
class Uniform:
    """Every layer alike."""

    needs_influence: ClassVar[bool] = False

    def __call__(
        self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator
    ) -> list[float]:
        return allocate.uniform(num_layers, sparsity)


@dataclass(frozen=True)
class Explicit:
    """One sparsity a layer as given; the wanted mean is not consulted."""

    values: list[float]
    needs_influence: ClassVar[bool] = False

    def __call__(
        self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator
    ) -> list[float]:
        return allocate.explicit(self.values, num_layers)


@dataclass(frozen=True)
class Entropic(Softmax):
    """The paper's: ``L phi softmax(-s / epsilon)``, capped, the rest redistributed."""

    def __call__(
        self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator
    ) -> list[float]:
        return allocate.entropic(influence, sparsity, epsilon=self.epsilon, cap=self.cap)


@dataclass(frozen=True)
class EntropicCap:
    """Entropic with epsilon chosen so that the most compressed layer just meets the cap."""

    cap: float = 0.8
    needs_influence: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_cap(self.cap)

    def __call__(
        self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator
    ) -> list[float]:
        return allocate.entropic_cap(influence, sparsity, cap=self.cap)


@dataclass(frozen=True)
class Inverse(Softmax):
    """Control: entropic on the negated influence."""

    def __call__(
        self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator
    ) -> list[float]:
        return allocate.inverse(influence, sparsity, epsilon=self.epsilon, cap=self.cap)


@dataclass(frozen=True)
class Random(Softmax):
    """Control: the entropic sparsities in random order."""

    def __call__(
        self, influence: Sequence[float] | None, *, num_layers: int, sparsity: float, generator: torch.Generator
    ) -> list[float]:
        return allocate.random(influence, sparsity, epsilon=self.epsilon, cap=self.cap, generator=generator)


POLICIES: dict[str, type[Policy]] = {
    "uniform": Uniform,
    "entropic": Entropic,
    "entropic_cap": EntropicCap,
    "explicit": Explicit,
    "inverse": Inverse,
    "random": Random,
}
