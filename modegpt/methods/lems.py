"""LEMS: ranks of SVD-LLM's factors by an error model of every matrix and an integer program over all of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from modegpt.allocation.choices import cheapest_choices
from modegpt.decompositions.linalg import psd_cholesky
from modegpt.decompositions.modules import LowRank
from modegpt.errors import UserError
from modegpt.methods.base import Compressed, CompressionTask, Method
from modegpt.methods.divergence import Reference, StandIns, acting_as, exact_linear, few_positions
from modegpt.methods.llm_surgeon import curvature_of
from modegpt.methods.low_rank import (
    INPUT_GRAM,
    Truncation,
    block_linears,
    dense_layers,
    factored_model,
    input_gram,
    input_grams,
    input_statistics,
    rank_keeping,
)
from modegpt.methods.svd_llm import whitened_truncation
from modegpt.models import Family, block_linear_parameters, decoder_layers

LARGEST_KEPT, SMALLEST_KEPT = 0.95, {False: 0.1, True: 0.3}
"""A factored matrix keeps no more and no less of its weights; at least 0.3 where half of the model or more stays."""

SMALLEST_LOSS = 1e-6
"""Of the energy lost at the rank that is measured."""

TINY = torch.finfo(torch.float64).tiny

TEMPERATURE = 0.6
"""Of the predictions that are compared."""

FIRST_SHARE = 1 / 8
"""Of each window, where predictions are not compared: 256 of 2048 tokens."""

INPUT_SHRINKAGE, OUTPUT_SHRINKAGE = 0.1, 0.3
"""Of the two factors of K-FAC towards a multiple of the identity."""

MOST_CLIPPED, NO_GRADIENT = 10.0, 1e-10

DEPTHS, STRENGTHS = 3.0, 7.0
"""Ranges that the exponent and the strength of the propagation bias are drawn from."""


@dataclass(frozen=True)
class Spectrum:
    """One matrix W (in, out) and what each rank of its factors would lose.

    Args:
        truncation: the factors at the largest rank, leading directions first: a lower rank is a slice of them.
        lost: (largest rank + 1,) share of the energy that is lost at each rank.
        divergence: of the model's predictions where this matrix alone has the measured rank.
        measured: that rank.
    """

    linear: nn.Linear
    truncation: Truncation
    lost: Tensor
    measured: int
    divergence: float = 0.0

    @classmethod
    def of(cls, linear: nn.Linear, C: Tensor, measured: float, G: Tensor | None = None) -> "Spectrum":
        """C (in, in): Gram matrix of the input. measured: share of the rank at which factors are as large as W.

        G (out, out): second moment of the output's gradients, for K-FAC: ``tr((W - A B)^T C (W - A B) G)`` is least.
        """
        W = linear.weight.detach().T
        full = equal_rank(linear)
        R = None if G is None else psd_cholesky(G).root()
        seen = W if R is None else W.double() @ R
        truncation = whitened_truncation(seen, psd_cholesky(C), max(1, int(LARGEST_KEPT * full)))
        # rows of B are the roots of singular values times unit vectors
        energies = truncation.factors.B.double().square().sum(dim=1).square()
        kept = torch.cat([energies.new_zeros(1), energies.cumsum(0)])
        within = 1 - truncation.relative_error
        if R is not None:
            A, B = vars(truncation.factors).values()
            B = torch.linalg.solve_triangular(R, B, upper=False, left=False)
            truncation = replace(truncation, factors=LowRank(A=A.to(W.dtype), B=B.to(W.dtype)))
        return cls(linear, truncation, 1 - within * kept / kept[-1].clamp(min=TINY), max(1, int(measured * full)))

    def at(self, rank: int) -> Truncation:
        """The factors at ``rank``."""
        factors = self.truncation.factors
        return Truncation(
            LowRank(A=factors.A[:, :rank], B=factors.B[:rank]), float(self.lost[rank]), self.truncation.numerics
        )

    def acting(self, rank: int | None) -> StandIns:
        """The linear map as the factors at ``rank``; None: as it is."""
        if rank is None:
            return []
        factors = self.at(rank).factors
        return [(self.linear, exact_linear((factors.A @ factors.B).T, self.linear.bias))]

    def options(self, sparsity: float, multiple: int) -> tuple[list[int | None], Tensor, Tensor]:
        """The ranks that the matrix may have (None: as it is), the weights of each, and the divergence expected.

        ``D(r) = D(r_0) lost(r) / lost(r_0)`` with the measured D(r_0); nothing for the matrix as it is.
        """
        full = equal_rank(self.linear)
        least = SMALLEST_KEPT[sparsity <= 0.5] * full
        ranks = [rank for rank in range(1, len(self.lost)) if rank >= least and rank % multiple == 0]
        sizes = torch.tensor([self.linear.weight.numel(), *(rank * sum(self.linear.weight.shape) for rank in ranks)])
        expected = self.divergence * self.lost[ranks] / self.lost[self.measured].clamp(min=SMALLEST_LOSS)
        return [None, *ranks], sizes, torch.cat([expected.new_zeros(1), expected])


def equal_rank(linear: nn.Linear) -> int:
    """The largest rank at which the factors are no larger than the matrix."""
    return rank_keeping(1.0, linear.weight.shape)


def propagation_bias(num_layers: int, *, depth: float, strength: float) -> list[float]:
    """What an error of each layer counts: ``1 + strength t_l``, where ``t`` falls from 1 at the first layer to 0 at the
    last as ``sum_(k >= l) (k + 1)^-depth`` does: an error goes through all layers behind it.
    """
    terms = [(index + 1) ** -depth for index in range(num_layers)]
    behind = [sum(terms[index:]) for index in range(num_layers)]
    span = behind[0] - behind[-1]
    return [1 + strength * ((of - behind[-1]) / span if span > 0 else 0.0) for of in behind]


@dataclass(frozen=True)
class LEMS(Method):
    """Layer-wise error model search (Thoma et al., ICML 2026) on the factors of SVD-LLM.

    The error model of a matrix is the share of its whitened energy that a rank loses (local), scaled to the KL
    divergence of the model's predictions that is measured with this matrix alone at a tenth of the rank at which its
    factors are as large as it is (global), times a bias for its depth (propagation). An integer program then picks one
    rank for every matrix, or the matrix as it is, so that the summed error is least and the budget is kept. Exponent
    and strength of the bias are drawn ``trials`` times; the ranks whose model diverges least on the calibration windows
    are taken.

    With ``kfac`` a matrix is truncated in the metric of its output's gradients too (their KFAC-SVD): the second moments
    of inputs and of gradients, which one backward pass gives, are shrunk towards the identity, and the gradients of
    single tokens clipped.

    Source: the authors' code (lems-svd/lems: ``search=lems``, ``svd=svd_llm`` or ``kfac_svd``), whose constants these
    are. The paper was not at hand. Differs: the code draws exponent and strength by Optuna's TPE, whose first ten
    trials, all that it makes, are uniform; here they are uniform from the run's seed. It enforces ranks that are
    multiples of 8, leaves out the first 256 of 2048 positions (here an eighth of every window) and compares all others.
    Its integer program goes to Gurobi; here it is solved exactly (``allocation/choices.py``).

    Args:
        windows: calibration windows on which predictions are compared.
        trials: of the propagation bias; 0: without the bias.
        measured: the share of the rank that is measured.
        multiple: ranks are multiples of this; 8 in the paper's runs.
        kfac: the metric of KFAC-SVD, which needs gradients, instead of SVD-LLM's.
        batch_size: windows per backward pass.
    """

    name: ClassVar[str] = "lems"
    experts: ClassVar[bool] = True

    windows: int = 32
    trials: int = 10
    measured: float = 0.1
    multiple: int = 1
    kfac: bool = False
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("windows", "multiple", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"method.{name}={getattr(self, name)} is too small: at least 1")
        if self.trials < 0:
            raise UserError(f"method.trials={self.trials} is too small: at least 0")
        if not 0 < self.measured <= LARGEST_KEPT:
            raise UserError(f"method.measured={self.measured} is outside (0, {LARGEST_KEPT}]: it is a share of a rank")

    def applicable(self, family: Family) -> str | None:
        """Gradients of experts' outputs are not taken."""
        if family.experts_path is not None and self.kfac:
            return "method.kfac=true does not know mixtures of experts"
        return super().applicable(family)

    def required_statistics(self, family: Family) -> frozenset[str]:
        """The Gram matrix of each map's input; nothing where a backward pass finds it."""
        return frozenset() if self.kfac else input_statistics(family)

    def compress(self, task: CompressionTask) -> Compressed:
        """Measure every matrix, solve the integer program for each bias, take the ranks that diverge least."""
        if task.sparsity == 0:
            return dense_layers(task)
        calibration, generator = task.calibration, task.generator()
        spectra, reference = self.spectra(task)
        budget = int((1 - task.sparsity) * block_linear_parameters(task.model) + 1e-6)
        found: list[tuple[float, dict[str, float], list[dict[str, int | None]]]] = []
        for _ in range(max(1, self.trials)):
            depth, strength = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
            bias = {"depth": DEPTHS * depth, "strength": STRENGTHS * strength if self.trials else 0.0}
            with calibration.meter.stage("search", counted=True):
                ranks = self.ranks(spectra, budget=budget, sparsity=task.sparsity, **bias)
                with acting_as(stand_ins(spectra, ranks)):
                    found.append((reference.divergence(), bias, ranks))
        # dense twice, once a trial, and for each matrix from its layer on
        matrices = sum((index + 1) * len(of_layer) for index, of_layer in enumerate(reversed(spectra)))
        share = min(1.0, self.windows / len(calibration.tokens.ids))
        calibration.meter.forward_passes += share * (2 + len(found) + matrices / len(spectra))
        divergence, bias, ranks = min(found, key=lambda each: each[0])
        factored = [{role: rank for role, rank in of_layer.items() if rank is not None} for of_layer in ranks]
        truncations = (
            {role: of_layer[role].at(rank) for role, rank in chosen.items()}
            for of_layer, chosen in zip(spectra, factored, strict=True)
        )
        compressed = factored_model(task, factored, truncations)
        compressed.details.update(divergence=divergence, **bias)
        return compressed

    def spectra(self, task: CompressionTask) -> tuple[list[dict[str, Spectrum]], Reference]:
        """Every matrix of every layer by role, its divergence measured; and what that was measured against."""
        calibration, spectra = task.calibration, []
        ids = calibration.tokens.ids[: self.windows]
        with calibration.meter.stage("sensitivity", counted=True):
            reference = Reference.of(
                task.model,
                ids,
                batch_size=calibration.batch_size,
                positions=compared_positions(*ids.shape),
                temperature=TEMPERATURE,
            )
        for layer, metrics in zip(decoder_layers(task.model), self._metrics(task), strict=True):
            with calibration.meter.stage("sensitivity", counted=True):
                of_layer = {}
                for role, linear in block_linears(task.family, layer).items():
                    C, G = metrics[role]
                    spectrum = Spectrum.of(linear, C, self.measured, G)
                    with acting_as(spectrum.acting(spectrum.measured)):
                        of_layer[role] = replace(spectrum, divergence=reference.divergence())
                spectra.append(of_layer)
                reference.advance()
        return spectra, reference.restarted()

    def _metrics(self, task: CompressionTask) -> Iterator[dict[str, tuple[Tensor, Tensor | None]]]:
        """Of each layer, by role, the Gram matrix of the input and, for K-FAC, the second moment of the gradients."""
        if not self.kfac:
            observed = task.calibration.statistics(input_statistics(task.family), loop="sensitivity")
            for layer, statistics in zip(decoder_layers(task.model), observed, strict=True):
                grams = input_grams(task.family, layer, statistics)
                yield {role: (grams[input_gram(role)], None) for role in block_linears(task.family, layer)}
            return
        num_tokens, length = task.calibration.tokens.num_tokens, task.calibration.tokens.ids.shape[1]
        curvature = curvature_of(
            task, task.model, tuple(INPUT_GRAM), batch_size=self.batch_size, weighed=partial(clipped, length=length)
        )
        for index, layer in enumerate(decoder_layers(task.model)):
            yield {
                role: (
                    shrunk(curvature.A(f"{index}.{INPUT_GRAM[role]}", num_tokens), INPUT_SHRINKAGE),
                    shrunk(curvature.G(f"{index}.{role}", num_tokens), OUTPUT_SHRINKAGE),
                )
                for role in block_linears(task.family, layer)
            }

    def ranks(
        self, spectra: Sequence[dict[str, Spectrum]], *, budget: int, sparsity: float, depth: float, strength: float
    ) -> list[dict[str, int | None]]:
        """The rank of every matrix of every layer by role, None where it stays as it is: ``budget`` weights at most.

        Raises UserError where not even the lowest ranks keep to the budget.
        """
        biases = propagation_bias(len(spectra), depth=depth, strength=strength)
        of_matrices = [
            (index, role, bias, *spectrum.options(sparsity, self.multiple))
            for index, (of_layer, bias) in enumerate(zip(spectra, biases, strict=True))
            for role, spectrum in of_layer.items()
        ]
        sizes, costs = [size for *_, size, _ in of_matrices], [bias * cost for _, _, bias, _, _, cost in of_matrices]
        least, total = (sum(int(pick(size)) for size in sizes) for pick in (torch.min, torch.max))
        if least > budget:
            raise UserError(
                f"lems: {1 - least / total:.1%} of the block-linear weights can go at most, "
                f"{100 * sparsity:g} % asked; lower compression.sparsity"
            )
        chosen: list[dict[str, int | None]] = [{} for _ in spectra]
        options = cheapest_choices(sizes, costs, budget)
        for (index, role, _, ranks, _, _), option in zip(of_matrices, options, strict=True):
            chosen[index][role] = ranks[option]
        return chosen


def stand_ins(spectra: Sequence[dict[str, Spectrum]], ranks: Sequence[dict[str, int | None]]) -> StandIns:
    """Every matrix acting as its factors at its rank."""
    return [
        stand_in
        for of_layer, chosen in zip(spectra, ranks, strict=True)
        for role, spectrum in of_layer.items()
        for stand_in in spectrum.acting(chosen[role])
    ]


def clipped(gradient: Tensor, *, length: int) -> Tensor:
    """Gradients of a linear's output at the middle of every window: the first and the last eighth of its ``length``
    tokens are left out, and the norm of a token's is kept between a tenth and ten times the mean of its window.
    """
    cut = int(FIRST_SHARE * length)
    middle = gradient.detach().float().reshape(-1, length, gradient.shape[-1])[:, cut : length - cut]
    norms = middle.norm(dim=-1, keepdim=True)
    seen = norms >= NO_GRADIENT
    mean = (norms * seen).sum(dim=1, keepdim=True) / seen.sum(dim=1, keepdim=True).clamp(min=1)
    wanted = norms.clamp(mean / MOST_CLIPPED, mean * MOST_CLIPPED)
    return middle * torch.where(seen, wanted / norms.clamp(min=NO_GRADIENT), 1.0)


def shrunk(moment: Tensor, share: float) -> Tensor:
    """``(1 - share) M + share mean(diag M) I`` of a second moment M (n, n)."""
    moment = moment.double()
    return (1 - share) * moment + share * torch.diag(moment.diagonal().mean().expand(len(moment)))


def compared_positions(num_windows: int, length: int) -> Tensor:
    """Positions of each window at which predictions are compared, evenly spaced behind its beginning."""
    return few_positions(num_windows, length, first=int(FIRST_SHARE * length))
