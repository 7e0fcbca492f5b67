"""What each module of a dense layer would lose at every rank, in closed form, and what would act as if it had."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modegpt.calibration.statistics import Statistics
from modegpt.decompositions.curves import mlp_curve, query_key_curve, value_output_curve
from modegpt.decompositions.experts import of_each
from modegpt.decompositions.head_norm import keep_head_norms
from modegpt.decompositions.modules import HEAD_NORM_FIT, HeadNorm
from modegpt.decompositions.nystrom import refit
from modegpt.decompositions.selection import group_heads
from modegpt.methods.divergence import StandIns, exact, exact_linear
from modegpt.models import Family, gained, output_gain, read_mlps, read_query_key, read_value_output, ungained
from modegpt.models.modeling_modegpt import normed_heads


@dataclass(frozen=True)
class Prospect:
    """What one module would lose.

    Args:
        unit: dims that go together.
        curve: squared error of removing k of its dims, k = 0 ... size.
        map: from k to what acts as if k were removed: modules of the dense layer, each with another forward at its full
            size.
    """

    unit: int
    curve: list[float]
    map: Callable[[int], StandIns]

    @property
    def size(self) -> int:
        """Dims of the module."""
        return len(self.curve) - 1

    def at(self, rank: int) -> StandIns:
        """What acts as if the module had ``rank`` dims: nothing at its full size."""
        return [] if rank == self.size else self.map(self.size - rank)

    def removed(self, share: float) -> int:
        """The number of dims nearest to ``share`` that can be removed: not none, and not all."""
        kept = min(max(round((1 - share) * self.size / self.unit), 1) * self.unit, self.size - self.unit)
        return self.size - kept


def mlp_prospect(family: Family, layer: nn.Module, statistics: Statistics) -> Prospect:
    """Channels by backward elimination, with the down projection refitted; those of all experts together."""
    mlps, downs = of_each(read_mlps(family, layer), statistics), family.downs(layer)
    gain = output_gain(family, layer, "mlp")
    curves, orders = zip(*(mlp_curve(C, gained(weights.W_D, gain)) for weights, C in mlps), strict=True)

    def lifted(removed: int) -> StandIns:
        acting: StandIns = []
        for down, (weights, C), order in zip(downs, mlps, orders, strict=True):
            kept = order[removed:].sort().values
            W_D = torch.zeros_like(weights.W_D, dtype=exact(weights.W_D)).index_copy(
                0, kept, refit(C, weights.W_D, kept)[0].to(exact(weights.W_D))
            )
            acting.append((down, exact_linear(W_D.T, weights.b_D)))
        return acting

    return Prospect(1, torch.stack(curves).sum(dim=0).tolist(), lifted)


def value_output_prospect(family: Family, layer: nn.Module, statistics: Statistics) -> Prospect:
    """Truncations of the value-output product, in the output projection."""
    weights = read_value_output(family, layer)
    A = statistics.get("value_output.A")
    G = statistics["value_output.G"] if A is None else group_heads(A, len(weights.W_V)).sum(dim=1)
    gain = output_gain(family, layer, "attention")
    curve, P, B = value_output_curve(G, gained(weights.W_O.double(), gain))
    B = ungained(B, gain)

    def lifted(removed: int) -> StandIns:
        rank = P.shape[-1] - removed
        W_O = (P[..., :rank].unsqueeze(1) @ B[:, :, :rank]).flatten(0, 1).to(exact(weights.W_O))
        b_O = weights.b_O
        if weights.b_V is not None:  # the value bias passes whole, see fold_value_bias
            lost = torch.einsum(
                "hd,hdm->m",
                weights.b_V.to(W_O.dtype).repeat_interleave(len(W_O) // len(weights.b_V), dim=0),
                weights.W_O - W_O,
            )
            b_O = lost if b_O is None else b_O + lost
        return [(family.output(layer), exact_linear(W_O.flatten(0, 1).T, b_O))]

    return Prospect(1, curve.tolist(), lifted)


def query_key_prospect(family: Family, layer: nn.Module, statistics: Statistics) -> Prospect:
    """Rotary pairs, or dims, by the paper's score, set to zero in the key projection; where heads have norms, behind
    these, which are the estimates that the heads would get.
    """
    weights = read_query_key(family, layer)
    curve, order = query_key_curve(statistics["query_key.C_Q"], statistics["query_key.C_K"], rope=weights.rope)
    unit = weights.rank_unit

    def normed(removed: int) -> StandIns:
        kept = order[:, removed // unit :].sort(dim=1).values
        norms, _ = keep_head_norms(weights, kept, statistics, fit=HEAD_NORM_FIT)
        group = len(weights.W_Q) // len(weights.W_K)
        return [
            (layer.get_submodule(path), _full_norm(family, norms[name], pairs, weights.inner_size))
            for path, name, pairs in (
                (family.query_norm_path, "norm_Q", kept.repeat_interleave(group, dim=0)),
                (family.key_norm_path, "norm_K", kept),
            )
            if path is not None
        ]

    def lifted(removed: int) -> StandIns:
        if family.head_norms:
            return normed(removed)
        gone = (
            torch.zeros_like(order, dtype=torch.bool)
            .scatter(1, order[:, : removed // unit], True)
            .repeat(1, unit)
            .flatten()
        )
        key = family.key(layer)
        bias = None if key.bias is None else key.bias.masked_fill(gone, 0.0)
        return [(key, exact_linear(key.weight.masked_fill(gone.unsqueeze(1), 0.0), bias))]

    # a dim that splits a rotary pair costs what the pair costs
    return Prospect(unit, [curve[-(-k // unit)].item() for k in range(weights.inner_size + 1)], lifted)


def _full_norm(family: Family, norm: HeadNorm, pairs: Tensor, size: int) -> Callable[[Tensor], Tensor]:
    """The ``norm`` of heads that keep ``pairs`` (H, k), on states of the full ``size``; the other dims become zero."""
    dims = torch.cat([pairs, pairs + size // 2], dim=1)
    w, c = (part.new_zeros(len(pairs), size).scatter(1, dims, part) for part in (norm.w, norm.c))

    def forward(states: Tensor) -> Tensor:
        shape, rows = states.shape, states.transpose(-2, -3) if family.heads_first else states
        rows = rows.reshape(*rows.shape[: 2 if family.joint_norms else -2], len(pairs), size)
        rows = normed_heads(rows, *(part.to(rows.dtype) for part in (w, c, norm.eps)), joint=family.joint_norms)
        return rows.transpose(-2, -3) if family.heads_first else rows.reshape(shape)

    return forward


PROSPECTS: dict[str, Callable[[Family, nn.Module, Statistics], Prospect]] = {
    "mlp": mlp_prospect,
    "query_key": query_key_prospect,
    "value_output": value_output_prospect,
}
"""By module, of a dense layer."""
