"""Every block-linear weight stored as two factors: ranks from a budget, weighted truncation, the model of the factors.

Shared by the per-matrix low-rank baselines. Row vectors, ``y = x W`` with W (in, out).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from modegpt.decompositions import experts
from modegpt.decompositions.linalg import relative
from modegpt.decompositions.modules import LowRank, Statistics
from modegpt.methods.base import Compressed, CompressionTask
from modegpt.models import Family, LayerShape, build_compressed, decoder_layers, dense_shape, read_mlps
from modegpt.models.families import linear_at

INPUT_GRAM = {
    "query": "attention.C_x",
    "key": "attention.C_x",
    "value": "attention.C_x",
    "output": "value_output.C_o",
    "gate": "mlp.C_x",
    "up": "mlp.C_x",
    "down": "mlp.C",
}
"""The statistic that holds the Gram matrix of each linear's input, by the linear's role."""

INPUT_GRAMS = frozenset(INPUT_GRAM.values())

EXPERT_GRAM = {"gate": "experts.C_x", "up": "experts.C_x", "down": "experts.C"}
"""The same of experts' linears, for all experts."""


def input_gram(role: str) -> str:
    """What ``input_grams`` calls the Gram matrix of the input of the linear with this role."""
    kind, _, expert = role.partition(".")
    return f"{EXPERT_GRAM[kind]}.{expert}" if expert else INPUT_GRAM[kind]


def input_statistics(family: Family) -> frozenset[str]:
    """The statistics that ``input_grams`` reads."""
    if family.experts_path is None:
        return INPUT_GRAMS
    return experts.REQUIRED | {*EXPERT_GRAM.values()} | {INPUT_GRAM[role] for role in INPUT_GRAM.keys() - EXPERT_GRAM}


def input_grams(family: Family, layer: nn.Module, statistics: Statistics) -> Mapping[str, Tensor]:
    """The Gram matrices of the inputs of a layer's linears, by name; those of experts one by one.

    Of an expert that saw fewer tokens than it has inputs the Gram is filled up: with a multiple of the identity, or as
    for its reduction (see ``decompositions/experts.py``) that of its down projection.
    """
    if family.experts_path is None:
        return statistics
    weights = read_mlps(family, layer)
    grams = {name: statistics[name] for name in INPUT_GRAMS & statistics.keys()}
    for index, (count, (_, C)) in enumerate(
        zip(experts.token_counts(statistics), experts.of_each(weights, statistics), strict=True)
    ):
        C_x = statistics["experts.C_x"][index]
        grams |= {f"experts.C.{index}": C, f"experts.C_x.{index}": experts.filled(C_x, torch.ones_like(C_x[0]), count)}
    return grams


@dataclass(frozen=True)
class Truncation:
    """One factored matrix. ``relative_error``: squared error over energy, in the norm the method minimises."""

    factors: LowRank
    relative_error: float
    numerics: dict = field(default_factory=dict)


def block_linears(family: Family, layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps of a dense layer by role; those of experts have the expert's number behind it (``up.3``)."""
    return {role: linear_at(layer, path) for role, path in paths(family, len(family.downs(layer))).items()}


def paths(family: Family, num_mlps: int) -> dict[str, str]:
    """Where a layer of the family, with ``num_mlps`` experts or one MLP, keeps each linear map, by role."""
    found: dict[str, str] = {}
    for role in INPUT_GRAM:
        path = getattr(family, f"{role}_path")
        if path is not None and "*" in path:
            found |= {f"{role}.{index}": each for index, each in enumerate(family.of_experts(path, num_mlps))}
        elif path is not None:
            found[role] = path
    return found


def factor_ranks(sizes: Iterable[tuple[int, int]], sparsity: float) -> list[int]:
    """Ranks at which both factors of every matrix store the share ``1 - sparsity`` of its weights.

    A matrix (in, out) at rank r stores ``r (in + out)``. A fraction of a rank that one matrix cannot use
    is handed on to the next of its size: ranks of equal matrices differ by at most one, and each size
    spends its budget but for less than one rank. At least rank 1.
    """
    ranks = []
    unspent: defaultdict[tuple[int, int], float] = defaultdict(float)
    for size in sizes:
        rows, columns = size
        unspent[size] += (1.0 - sparsity) * rows * columns
        ranks.append(max(1, int(unspent[size] // (rows + columns))))
        unspent[size] -= ranks[-1] * (rows + columns)
    return ranks


def rank_keeping(share: float, size: tuple[int, ...]) -> int:
    """The largest rank at which the factors of a map (in, out) store no more than ``share`` of its weights, or 1."""
    rows, columns = size
    return max(1, int(share * rows * columns / (rows + columns)))


def truncated(W: Tensor, rank: int, *, weigh: Tensor | None = None, unweigh: Tensor | None = None) -> Truncation:
    """The rank-``rank`` A B that minimises ``||T (W - A B)||_F``.

    ``A = T^-1 U_r sqrt(S_r)`` and ``B = sqrt(S_r) V_r^T`` of ``T W = U S V^T``. Eckart-Young: the squared error is the
    sum of the dropped squared singular values of T W. Float64; factors in W's dtype.

    Args:
        W: (in, out).
        weigh: T W, (in, out); None: T is the identity.
        unweigh: T^-1, (in, in), or its diagonal (in,); None: the identity.
    """
    U, S, Vh = torch.linalg.svd(W.double() if weigh is None else weigh, full_matrices=False)
    root = S[:rank].sqrt()
    A, B = U[:, :rank] * root, root.unsqueeze(-1) * Vh[:rank]
    if unweigh is not None:
        A = unweigh.unsqueeze(-1) * A if unweigh.ndim == 1 else unweigh @ A
    return Truncation(LowRank(A=A.to(W.dtype), B=B.to(W.dtype)), relative((S[rank:] ** 2).sum(), (S**2).sum()))


def layer_ranks(task: CompressionTask) -> list[dict[str, int]]:
    """The rank of every linear of every layer, by role: one sparsity for all of them."""
    layers = [block_linears(task.family, layer) for layer in decoder_layers(task.model)]
    ranks = iter(
        factor_ranks(
            [(linear.out_features, linear.in_features) for linears in layers for linear in linears.values()],
            task.sparsity,
        )
    )
    return [{role: next(ranks) for role in linears} for linears in layers]


def dense_layers(task: CompressionTask) -> Compressed:
    """The answer to sparsity 0: every tensor is the dense model's own."""
    shapes = [dense_shape(task.model.config)] * task.calibration.num_layers
    reports = [{"index": index, "ranks": {}, "relative_error": {}, "numerics": {}} for index in range(len(shapes))]
    return Compressed(model=build_compressed(task.model, shapes, [{} for _ in shapes]), layers=reports)


def factored_shape(task: CompressionTask, ranks: Mapping[str, int]) -> LayerShape:
    """A dense layer's shape with the linears named in ``ranks`` (by role) factored."""
    own = paths(task.family, getattr(task.model.config, "num_experts", 1))
    return replace(dense_shape(task.model.config), linear_ranks={own[role]: rank for role, rank in ranks.items()})


def factored_tensors(family: Family, layer: nn.Module, truncations: Mapping[str, Truncation]) -> dict[str, Tensor]:
    """The changed tensors of a layer whose linears are stored as the given factors, by role; biases stay."""
    tensors: dict[str, Tensor] = {}
    own = paths(family, len(family.downs(layer)))
    for role, truncation in truncations.items():
        path, factors = own[role], truncation.factors
        bias = linear_at(layer, path).bias
        tensors[f"{path}.A.weight"] = factors.A.T.contiguous()
        tensors[f"{path}.B.weight"] = factors.B.T.contiguous()
        if bias is not None:
            tensors[f"{path}.B.bias"] = bias.detach()
    return tensors


def factored_model(
    task: CompressionTask, ranks: list[dict[str, int]], truncations: Iterator[dict[str, Truncation]]
) -> Compressed:
    """Consume each layer's truncations, in order, into a compressed model and its report."""
    tensors, reports = [], []
    for index, (layer, of_layer) in enumerate(zip(decoder_layers(task.model), truncations, strict=True)):
        tensors.append(factored_tensors(task.family, layer, of_layer))
        reports.append(
            {
                "index": index,
                "ranks": dict(ranks[index]),
                "relative_error": {role: truncation.relative_error for role, truncation in of_layer.items()},
                "numerics": {role: truncation.numerics for role, truncation in of_layer.items() if truncation.numerics},
            }
        )
    return Compressed(
        model=build_compressed(task.model, [factored_shape(task, of_layer) for of_layer in ranks], tensors),
        layers=reports,
    )
