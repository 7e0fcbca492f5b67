"""Tyr-the-Pruner's search on MoDeGPT's modules: what each loses is found by evolution on the model's predictions."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from modegpt.allocation.engines import ENGINES
from modegpt.allocation.policies import Uniform
from modegpt.allocation.ranks import ModuleBudget, is_free
from modegpt.decompositions.cr import QueryKeyCR
from modegpt.decompositions.elimination import MLPElimination
from modegpt.decompositions.svd import ValueOutputSVD
from modegpt.errors import UserError
from modegpt.methods.base import Compressed, CompressionTask, RankMethod
from modegpt.methods.divergence import Reference, StandIns, acting_as, few_positions
from modegpt.methods.modegpt import MoDeGPT
from modegpt.methods.prospects import PROSPECTS
from modegpt.models import Family, LayerShape, decoder_layers

Ranks = list[dict[str, int]]
"""ranks[layer][module]: kept inner size."""

LEVELS = 4
"""Steps that a module may move from where it was at the beginning of a round, to either side."""

MOST_SHIFTS = 4

TRIES = 100
"""Draws for each offspring that is wanted, after which there are fewer: most moves are out of range, or seen."""


@dataclass(frozen=True)
class Tyr(RankMethod):
    """The evolutionary search of Tyr-the-Pruner (Li et al., NeurIPS 2025, arXiv 2503.09657) over MoDeGPT's ranks.

    It starts at uniform ranks. An offspring shifts sparsity a few times: a module of one layer gets ``step`` of its
    dims back and the same module of another layer loses as many, so that the budget is kept at every moment. Offspring
    are compared by the KL divergence of the whole model's predictions from the dense model's, all of them on few
    calibration windows, the best of these on more, and the best of those, with their parent, on the most; the least
    is the next parent. Each round halves the step (coarse to fine). The parent is kept unless an offspring diverges
    less on the same windows, so that what is found is never worse there than uniform ranks.

    The modules are MoDeGPT's in closed form on the dense model's statistics: MLP channels by backward elimination,
    rotary pairs by the CR score, the value-output product by its singular values.

    Differs from the paper, beside the modules: these give every rank at once, so no supernet is pruned again each
    round, nor are statistics taken behind layers at the expected rate; the search has ``rounds`` of ``generations`` of
    ``offspring`` where the authors' code (AMD-AGI/Tyr-the-Pruner) has 4 of 50 of 128 with 2,048, 16,384 and 131,072
    tokens, keeps the best 16 and 4, and draws the last windows anew as well; all of the vocabulary is compared, not
    the likeliest 8,192. Memory: every layer's statistics, and in each round the matrices of every rank that is tried.

    Args:
        rounds, generations, offspring: of the search; generations a round, offspring a generation.
        step: share of a module's dims that a shift moves in the first round.
        windows: calibration windows at each stage of a selection, ascending.
        survivors: offspring that each stage but the last passes on.
    """

    name: ClassVar[str] = "tyr"
    experts: ClassVar[bool] = True

    rounds: int = 4
    generations: int = 10
    offspring: int = 16
    step: float = 0.125
    windows: tuple[int, ...] = (4, 16, 32)
    survivors: tuple[int, ...] = (4, 2)

    def __post_init__(self) -> None:
        for name in ("rounds", "generations", "offspring"):
            if getattr(self, name) < 1:
                raise UserError(f"method.{name}={getattr(self, name)} is too small: at least 1")
        if not 0 < self.step < 1:
            raise UserError(f"method.step={self.step} must lie between 0 and 1: it is a share of a module's dims")
        if not self.windows or min(self.windows) < 1 or list(self.windows) != sorted(self.windows):
            raise UserError(f"method.windows={list(self.windows)} must be ascending numbers of calibration windows")
        if len(self.survivors) != len(self.windows) - 1 or min(self.survivors, default=1) < 1:
            raise UserError(
                f"method.survivors={list(self.survivors)} must be a number for every stage of method.windows but the "
                "last, each at least 1"
            )

    @property
    def modules(self) -> MoDeGPT:
        """What reduces the modules, and the uniform ranks that the search starts at."""
        return MoDeGPT(
            mlp=MLPElimination(),
            query_key=QueryKeyCR(),
            value_output=ValueOutputSVD(),
            allocation=Uniform(),
            **self.rules,
        )

    def check(self, task: CompressionTask) -> None:
        """Raise UserError for a target that cannot be met, or an engine that wants all layers alike."""
        if ENGINES[self.engine].one_width:
            raise UserError(f"engine={self.engine} gives all layers one width: {self.name} searches for other ones")
        self.modules.check(task)

    def likely_shapes(self, task: CompressionTask, influence: Sequence[float]) -> list[LayerShape]:
        """Those that the search starts at."""
        return self.modules.likely_shapes(task, influence)

    def required_statistics(self, family: Family) -> frozenset[str]:
        """Those that the modules are reduced on."""
        return self.modules.required_statistics(family)

    def compress(self, task: CompressionTask) -> Compressed:
        """Search for the ranks, then reduce every module to them."""
        start = self.modules.plan(task, None)
        if task.sparsity == 0:
            return self.modules.compress_to(task, start)
        calibration, meter = task.calibration, task.calibration.meter
        read, layers = self.modules.statistics_read(task.family), decoder_layers(task.model)
        observed = calibration.statistics(frozenset().union(*read.values()), loop="prospects")
        prospects = []
        for layer, statistics in zip(layers, observed, strict=True):
            with meter.stage("prospects", counted=True):
                prospects.append({module: PROSPECTS[module](task.family, layer, statistics) for module in read})

        @functools.cache
        def reduced(index: int, module: str, rank: int) -> StandIns:
            return prospects[index][module].at(rank)

        ids = calibration.tokens.ids[: self.windows[-1]]
        with meter.stage("search", counted=True):
            reference = Reference.of(task.model, ids, batch_size=self.windows[0], positions=few_positions(*ids.shape))

            def divergence(ranks: Ranks, batches: Sequence[int]) -> float:
                meter.forward_passes += sum(len(reference.batches[number]) for number in batches) / len(
                    calibration.tokens.ids
                )
                acting = [
                    stand_in
                    for index, of_layer in enumerate(ranks)
                    for module in read
                    for stand_in in reduced(index, module, of_layer[module])
                ]
                with acting_as(acting):
                    return reference.divergence(batches)

            found, before, after = self.search(
                start.ranks,
                self.modules.budgets(task),
                divergence,
                num_batches=len(reference.batches),
                generator=task.generator(),
                on_round=reduced.cache_clear,
            )
        compressed = self.modules.compress_to(task, replace(start, ranks=found))
        compressed.details.update(uniform_divergence=before, divergence=after)
        return compressed

    def search(
        self,
        start: Ranks,
        budgets: Sequence[dict[str, ModuleBudget]],
        divergence: Callable[[Ranks, Sequence[int]], float],
        *,
        num_batches: int,
        generator: torch.Generator,
        on_round: Callable[[], object] = lambda: None,
    ) -> tuple[Ranks, float, float]:
        """The ranks that ``divergence(ranks, batches)`` is least for, and that of ``start`` and of them on all batches.

        Args:
            budgets: what each module offers; those that are not free stay as they are.
            num_batches: how many there are; ``windows[0]`` windows each.
            on_round: called at the end of each round.
        """
        every = range(num_batches)
        best, least = start, divergence(start, every)
        first = least
        for number in range(self.rounds):
            centre = best
            for _ in range(self.generations):
                candidates = self.mutants(best, centre, budgets, self.step / 2**number, generator)
                for windows, survivors in zip(self.windows, self.survivors, strict=False):
                    size = min(-(-windows // self.windows[0]), num_batches)
                    drawn = torch.randperm(num_batches, generator=generator)[:size].tolist()
                    scores = [divergence(ranks, drawn) for ranks in candidates]
                    order = sorted(range(len(candidates)), key=scores.__getitem__)
                    candidates = [candidates[place] for place in order[:survivors]]
                for ranks in candidates:
                    if (score := divergence(ranks, every)) < least:
                        best, least = ranks, score
            on_round()
        return best, first, least

    def mutants(
        self,
        parent: Ranks,
        centre: Ranks,
        budgets: Sequence[dict[str, ModuleBudget]],
        step: float,
        generator: torch.Generator,
    ) -> list[Ranks]:
        """``offspring`` different ranks, each one to four shifts of ``step`` away from ``parent``.

        Fewer where no more are found. None has a module more than ``LEVELS`` steps away from ``centre``.
        """

        def drawn(below: int) -> int:
            return int(torch.randint(below, (1,), generator=generator))

        free = {name: [index for index, layer in enumerate(budgets) if is_free(layer[name])] for name in budgets[0]}
        names = [name for name, layers in free.items() if len(layers) > 1]
        mutants: list[Ranks] = []
        for _ in range(TRIES * self.offspring if names else 0):
            if len(mutants) == self.offspring:
                break
            ranks = [dict(of_layer) for of_layer in parent]
            for _ in range(1 + min(drawn(MOST_SHIFTS), drawn(MOST_SHIFTS))):
                name = names[drawn(len(names))]
                more, less = (free[name][drawn(len(free[name]))] for _ in range(2))
                module = budgets[more][name]
                shift = max(1, round(step * module.size / module.unit)) * module.unit
                wider, narrower = ranks[more][name] + shift, ranks[less][name] - shift
                moved = ((more, wider), (less, narrower))
                if more != less and all(
                    _allowed(rank, module) and abs(rank - centre[index][name]) <= LEVELS * shift
                    for index, rank in moved
                ):
                    ranks[more][name], ranks[less][name] = wider, narrower
            if ranks != parent and ranks not in mutants:
                mutants.append(ranks)
        return mutants


def _allowed(rank: int, module: ModuleBudget) -> bool:
    """Whether a module may have it: a multiple of the unit, or all dims."""
    return rank == module.size or (module.unit <= rank < module.size and rank % module.unit == 0)
