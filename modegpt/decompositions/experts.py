"""Type I for a mixture of experts: each expert's MLP by itself, on the tokens that it sees, to one width.

The Gram of an expert is that of its hidden states times their shares in the sum, so that errors are those of what the
layer adds to the stream. An expert that saw fewer tokens than it has channels says too little of them: its Gram is
filled up with a diagonal of its weights' sizes, in the share of the tokens that it lacks. Refits then stay near plain
slices, and an expert that no token reached is cut by its weights alone. The router is not touched.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from modegpt.decompositions.linalg import energy, relative
from modegpt.decompositions.modules import ExpertWeights, MLPWeights, Reduction, Statistics, Variant
from modegpt.decompositions.selection import mlp_residual

REQUIRED = frozenset({"experts.C", "experts.share", "layer.num_tokens"})
"""The statistics that every decomposition of experts reads."""


def experts_applicable(variant: Variant[Any]) -> str | None:
    """Why ``variant`` cannot reduce experts, or None."""
    if variant.required == {"mlp.C"}:
        return None
    return "experts take decompositions that choose channels by their Gram: nystrom, columns, elimination or a control"


def expert_gram(C: Tensor, weights: MLPWeights[Tensor], num_tokens: int) -> Tensor:
    """The Gram (n, n) by which an expert is reduced that saw ``num_tokens`` with Gram C (n, n), unnormalised."""
    sizes = weights.W_U.double().square().sum(dim=0)
    if weights.W_G is not None:
        sizes = sizes * weights.W_G.double().square().sum(dim=0)
    return filled(C, sizes, num_tokens)


def filled(C: Tensor, sizes: Tensor, num_tokens: int) -> Tensor:
    """The Gram C (n, n) of ``num_tokens``, and the diagonal ``sizes`` (n,) in the share of the tokens that it lacks.

    At the level of C; as it is where there is no token.
    """
    lacking = max(0.0, 1 - num_tokens / len(C))
    if not lacking:
        return C
    level = C.diagonal().mean() if num_tokens else sizes.mean()
    return C + torch.diag(lacking * level * sizes / sizes.mean())


def token_counts(statistics: Statistics) -> list[int]:
    """How many tokens each expert saw."""
    return (statistics["experts.share"] * statistics["layer.num_tokens"]).round().long().tolist()


def of_each(
    weights: MLPWeights[Tensor] | ExpertWeights, statistics: Statistics
) -> list[tuple[MLPWeights[Tensor], Tensor]]:
    """The MLP of a layer, or each expert, with the Gram (n, n) by which it is reduced."""
    if not isinstance(weights, ExpertWeights):
        return [(weights, statistics["mlp.C"])]
    return [
        (expert, expert_gram(C.double(), expert, count))
        for expert, C, count in zip(weights.experts, statistics["experts.C"], token_counts(statistics), strict=True)
    ]


def token_report(counts: Sequence[int], width: int) -> dict[str, Any]:
    """For the record, of experts of ``width`` that saw ``counts`` tokens.

    The least and the most that one saw, and which saw fewer than they have channels (``few``) or none (``unseen``).
    """
    report: dict[str, Any] = {"fewest_tokens": min(counts), "most_tokens": max(counts)}
    for name, bound in (("few", width), ("unseen", 1)):
        if short := [index for index, count in enumerate(counts) if count < bound]:
            report[name] = short
    return report


def reduce_experts(
    reduce: Callable[..., Reduction[MLPWeights[Tensor]]],
    weights: ExpertWeights,
    statistics: Statistics,
    rank: int,
    generator: torch.Generator,
) -> Reduction[ExpertWeights]:
    """Every expert by the MLP variant ``reduce``, at width ``rank``.

    relative_error: over all experts, from the tokens that each saw. numerics: ``token_report``, and what solvers had to
    do.
    """
    experts, kept, lost, whole = [], [], torch.zeros(()), torch.zeros(())
    numerics = token_report(token_counts(statistics), weights.inner_size)
    for index, (expert, gram) in enumerate(of_each(weights, statistics)):
        C = statistics["experts.C"][index].double()
        done = reduce(expert, {"mlp.C": gram}, rank, generator)
        assert done.kept is not None, "variants of experts choose channels"
        lost = lost + energy(C, mlp_residual(expert.W_D, done.kept, done.weights.W_D))
        whole = whole + energy(C, expert.W_D.double())
        experts.append(done.weights)
        kept.append(done.kept)
        if done.numerics:
            numerics[f"expert {index}"] = done.numerics
    return Reduction(ExpertWeights(tuple(experts)), relative(lost, whole), torch.stack(kept), numerics)
