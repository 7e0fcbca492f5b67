"""Query-key selection for the compressed stream: several candidates, the best on held-out windows for each key head."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from modegpt.calibration.statistics import rotate
from modegpt.calibration.stream import HiddenStates
from modegpt.calibration.world import ALONE, World
from modegpt.decompositions.attention import AttentionStates, elimination_order, output_sensitivity
from modegpt.decompositions.cr import cr_scores
from modegpt.decompositions.elimination import surviving
from modegpt.decompositions.head_norm import keep_head_norms, norm_shares, share_factors
from modegpt.decompositions.linalg import psd_cholesky
from modegpt.decompositions.modules import HEAD_NORM_FIT, QueryKeyWeights, Statistics
from modegpt.decompositions.selection import (
    choose_query_key,
    group_heads,
    keep_query_key,
    sum_pairs,
    take_columns,
)
from modegpt.decompositions.svd import QueryKeySVD
from modegpt.methods.plus.streams import Split, Tap, observe
from modegpt.models import Family, gained, output_gain, read_value_output
from modegpt.models.weights import key_norm, normalised_heads, query_norm


@dataclass(frozen=True)
class SampledStates:
    """States that enter the product of queries and keys, on some calibration windows.

    Args:
        C_Q, C_K: Gram matrices (H, d, d) and (H_kv, d, d).
        norms: the statistics that head norms are fitted on, where the family has these.
        fit, held: attention states of some queries, to select on and to check with, of this process's batches.
        world: the processes that share them.
    """

    C_Q: Tensor
    C_K: Tensor
    fit: list[AttentionStates]
    held: list[AttentionStates]
    norms: dict[str, Tensor] = field(default_factory=dict)
    world: World = ALONE

    def sensitivity(self, parts: Iterable[AttentionStates], *, pairs: bool) -> Tensor:
        """M (H_kv, b, b): ``output_sensitivity`` over ``parts`` of all processes, summed over the heads of a group."""
        of_each = self.world.in_order((output_sensitivity(part, pairs=pairs) for part in parts), self.C_K.device)
        return group_heads(cast(Tensor, sum(of_each)), len(self.C_K)).sum(dim=1)


def sample(
    family: Family,
    layer: nn.Module,
    index: int,
    stream: HiddenStates,
    split: Split,
    *,
    num_windows: int,
    queries_per_window: int,
    precision: torch.dtype,
    generator: torch.Generator,
) -> SampledStates:
    """Run the projections of ``layer`` (number ``index``) on the first batches of ``stream``.

    These have ``num_windows`` windows to fit on. All of their tokens enter the Grams; attention states are those of
    ``queries_per_window`` positions of at most ``num_windows`` windows of either part.
    """
    attention: Any = family.attention(layer)
    rotary = next(iter(stream.arguments[index].values())).get("position_embeddings") if family.rotates(layer) else None
    taps: dict[str, Tap] = {
        "q": (family.query(layer), "output"),
        "k": (family.key(layer), "output"),
        "v": (family.value(layer), "output"),
    }
    norm_Q, norm_K = query_norm(family, layer), key_norm(family, layer)
    W_O = gained(read_value_output(family, layer).W_O.double(), output_gain(family, layer, "attention"))
    metric = psd_cholesky(W_O @ W_O.mT).root()
    sums: dict[str, Tensor] = {}
    states: tuple[list[AttentionStates], list[AttentionStates]] = ([], [])
    first, world, nothing = split.first(num_windows), split.world, (torch.empty(0, dtype=torch.long),) * 2
    # for the batches of all processes, so that all go on drawing the same
    drawn = [_positions(split.held[0].shape[1], queries_per_window, generator) for _ in first]
    turns = list(zip(first, drawn, strict=True))[world.rank :: world.size]
    for seen in itertools.islice(observe(layer, index, stream, taps, stop=True), -(-len(first) // world.size)):
        counts = seen.batch < len(turns)
        windows_of, positions = turns[seen.batch] if counts else (nothing, drawn[0])
        q, k, v = (seen.seen[name].unflatten(-1, (-1, attention.head_dim)) for name in "qkv")
        shares = (
            {} if norm_Q is None or norm_K is None else {"N_Q": norm_shares(q, norm_Q), "N_K": norm_shares(k, norm_K)}
        )
        q = rotate(normalised_heads(family, layer, family.query_norm_path, q), rotary)
        k = rotate(normalised_heads(family, layer, family.key_norm_path, k), rotary)
        of_batch = {
            "C_Q": _gram(q, precision),
            "C_K": _gram(k, precision),
            **{name: _gram(states, torch.float64) for name, states in shares.items()},
        }
        for name, value in of_batch.items():
            total = sums.setdefault(name, torch.zeros_like(value))
            world.add(total, value if counts else torch.zeros_like(value))
        v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2).transpose(1, 2) @ metric.to(v.dtype)
        bias = _attention_bias(stream.layer_arguments(index, seen.x).get("attention_mask"), seen.x, positions)
        for part, windows in zip(states, (windows.to(q.device) for windows in windows_of), strict=True):
            if len(windows) or world.size > 1:
                queries = q[windows][:, positions.to(q.device)].transpose(1, 2) * attention.scaling
                own_bias = bias if len(bias) == 1 else bias[windows]
                own_shares = {}
                if shares:
                    shares_Q = shares["N_Q"][windows][:, positions.to(q.device)].transpose(1, 2)
                    own_shares = {"shares_Q": shares_Q, "shares_K": shares["N_K"][windows].transpose(1, 2)}
                part.append(
                    AttentionStates(q=queries, k=k[windows].transpose(1, 2), v=v[windows], bias=own_bias, **own_shares)
                )
    world.pool([sums[name] for name in sorted(sums)])
    norms = {f"query_key.{name}": sums.pop(name) for name in ("N_Q", "N_K") if name in sums}
    return SampledStates(**sums, fit=states[False], held=states[True], norms=norms, world=world)


def _gram(states: Tensor, precision: torch.dtype) -> Tensor:
    """(heads, d, d) of states (batch, sequence, heads, d)."""
    rows = states.to(precision).flatten(0, 1).transpose(0, 1)
    return (rows.mT @ rows).double()


def _positions(length: int, num_queries: int, generator: torch.Generator) -> Tensor:
    """Sampled query positions; the first token attends to itself alone and shows nothing."""
    order = torch.randperm(length - 1, generator=generator)[:num_queries] + 1
    return order.sort().values


def _attention_bias(mask: Tensor | None, x: Tensor, positions: Tensor) -> Tensor:
    """(1 or batch, 1, t, s): 0 where the sampled queries may attend, -inf elsewhere; the layer gets ``mask``."""
    length = x.shape[1]
    if mask is not None and mask.ndim == 4:
        allowed = mask if mask.dtype == torch.bool else mask >= 0
        allowed = allowed[:, :, positions.to(x.device), :length]
    else:
        allowed = (torch.arange(length) <= positions.unsqueeze(1))[None, None].to(x.device)
    return torch.zeros(allowed.shape, dtype=x.dtype, device=x.device).masked_fill(~allowed, float("-inf"))


@dataclass(frozen=True)
class Candidate:
    """One way to reduce the query-key product: kept dims (H_kv, r) of a basis, T_Q (H, d, r), T_K (H_kv, d, r) on the
    states.
    """

    name: str
    kept: Tensor
    T_Q: Tensor
    T_K: Tensor

    @classmethod
    def of(cls, name: str, kept: Tensor, basis: tuple[Tensor, Tensor]) -> "Candidate":
        """From the dims ``kept`` of ``basis`` (H, d, d) and (H_kv, d, d)."""
        of_heads = kept.repeat_interleave(len(basis[0]) // len(basis[1]), dim=0)
        return cls(name, kept, take_columns(basis[0], of_heads), take_columns(basis[1], kept))


@dataclass(frozen=True)
class QueryKeyChoice:
    """What was chosen.

    Args:
        names: the candidate that each key head took.
        held_out: relative squared error of the attention's output on held-out queries, by candidate.
        relative_error: that of the choice.
    """

    weights: QueryKeyWeights
    names: list[str]
    held_out: dict[str, float]
    relative_error: float


def candidates(weights: QueryKeyWeights, states: SampledStates, rank: int, *, improved: bool) -> list[Candidate]:
    """The paper's selection, and with ``improved`` those by logit error and by the output's first-order error.

    Without RoPE, where any basis of a head will do, the improved candidates work in the singular basis of the logits.
    """
    C_Q, C_K = states.C_Q, states.C_K
    pairs, num_groups = weights.rope, len(C_K)
    identity = torch.eye(weights.inner_size, dtype=torch.float64, device=C_K.device)
    basis = (identity.expand_as(C_Q), identity.expand_as(C_K))
    scores = cr_scores(*(C.diagonal(dim1=-2, dim2=-1) for C in (C_Q, C_K)))
    kept = choose_query_key(sum_pairs(scores) if pairs else scores, rank, rope=pairs)
    found = [Candidate.of("paper", kept, basis)]
    if not improved:
        return found
    parts = states.fit
    if not pairs:
        basis = _singular_basis(C_Q, C_K)
        C_Q, C_K = (T.mT @ C @ T for T, C in zip(basis, (C_Q, C_K), strict=True))
        parts = [part.mapped(*(T.to(part.q.dtype) for T in basis)) for part in parts]
    logits = group_heads(C_Q, num_groups).sum(dim=1) * C_K
    if pairs:
        logits = cast(Tensor, sum(block for half in logits.chunk(2, dim=-1) for block in half.chunk(2, dim=-2)))
    outputs = states.sensitivity(parts, pairs=pairs)
    for name, lost in (("logits", logits), ("output", outputs)):
        found.append(Candidate.of(name, _spared(lost, rank, pairs=pairs), basis))
    return found


def _spared(M: Tensor, rank: int, *, pairs: bool) -> Tensor:
    """Dims (H_kv, rank) that backward elimination on ``M`` (H_kv, b, b) of the blocks of each head leaves."""
    size = M.shape[-1]
    removed, _ = elimination_order(M, size - (rank // 2 if pairs else rank))
    kept = surviving(removed, size)
    return torch.cat([kept, kept + size], dim=1) if pairs else kept


def _singular_basis(C_Q: Tensor, C_K: Tensor) -> tuple[Tensor, Tensor]:
    """T_Q (H, d, d), T_K (H_kv, d, d): the maps of QueryKeySVD at full rank, which leave the logits as they are."""
    identity = torch.eye(C_K.shape[-1], dtype=torch.float64, device=C_K.device)
    maps = QueryKeyWeights(W_Q=identity.repeat(len(C_Q), 1, 1), W_K=identity.repeat(len(C_K), 1, 1), rope=False)
    statistics = {"query_key.C_Q": C_Q, "query_key.C_K": C_K}
    reduced = QueryKeySVD().reduce(maps, statistics, len(identity), torch.Generator()).weights
    return reduced.W_Q, reduced.W_K


def choose(weights: QueryKeyWeights, found: list[Candidate], states: SampledStates) -> QueryKeyChoice:
    """For each key head the candidate whose attention output errs least on held-out queries, softmax and the estimated
    norms of heads included; ties go to the earlier.
    """
    num_groups = len(weights.W_K)
    errors, energy = torch.zeros(len(found), num_groups, dtype=torch.float64, device=weights.W_K.device), 0.0
    factors = [_norm_factors(weights, candidate.kept, states.norms) for candidate in found]

    def lost(part: AttentionStates) -> tuple[Tensor, float]:
        """By candidate and key head, and of how much."""
        dense, lost = part.output(), torch.zeros_like(errors)
        for c, candidate in enumerate(found):
            T_Q, T_K = (T.to(part.q.dtype) for T in (candidate.T_Q, candidate.T_K))
            estimate = factors[c]
            seen = part if estimate is None else part.estimated(*estimate)
            of_heads = (seen.output(T_Q, T_K) - dense).double().square().sum(dim=(0, 2, 3))
            lost[c] = group_heads(of_heads, num_groups).sum(dim=1)
        return lost, float(dense.double().square().sum())

    for of_part, energy_of_part in states.world.in_order(map(lost, states.held), errors.device):
        errors += of_part
        energy += energy_of_part
    best = errors.argmin(dim=0)
    group_size = len(weights.W_Q) // num_groups
    pick = best.repeat_interleave(group_size)
    heads, keys = torch.arange(len(pick)), torch.arange(num_groups)
    T_Q = torch.stack([candidate.T_Q for candidate in found])[pick, heads]
    T_K = torch.stack([candidate.T_K for candidate in found])[best, keys]
    kept = torch.stack([candidate.kept for candidate in found])[best, keys]
    relative = {
        candidate.name: float(error.sum()) / energy if energy else 0.0
        for candidate, error in zip(found, errors, strict=True)
    }
    chosen = float(errors.min(dim=0).values.sum()) / energy if energy else 0.0
    if weights.rope:
        reduced, _ = keep_query_key(weights, kept, states.norms, head_norm=HEAD_NORM_FIT)
    else:
        reduced = _mapped(weights, T_Q, T_K)
    return QueryKeyChoice(reduced, [found[c].name for c in best.tolist()], relative, chosen)


def _norm_factors(weights: QueryKeyWeights, kept: Tensor, norms: Statistics) -> tuple[Tensor, Tensor] | None:
    """What estimates the norms of heads that keep the dims ``kept`` (H_kv, r), as factors of their shares."""
    pairs = kept[:, : kept.shape[1] // 2]
    fitted, _ = keep_head_norms(weights, pairs, norms, fit=HEAD_NORM_FIT)
    if weights.norm_Q is None or weights.norm_K is None:
        return None
    of_queries = pairs.repeat_interleave(len(weights.W_Q) // len(weights.W_K), dim=0)
    return (
        share_factors(weights.norm_Q, fitted["norm_Q"], of_queries),
        share_factors(weights.norm_K, fitted["norm_K"], pairs),
    )


def _mapped(weights: QueryKeyWeights, T_Q: Tensor, T_K: Tensor) -> QueryKeyWeights:
    def times(tensor: Tensor, T: Tensor) -> Tensor:
        rows = tensor.double() if tensor.ndim == 3 else tensor.double().unsqueeze(1)
        return (rows @ T).reshape(*tensor.shape[:-1], -1).to(tensor.dtype)

    return replace(
        weights,
        W_Q=times(weights.W_Q, T_Q),
        W_K=times(weights.W_K, T_K),
        b_Q=None if weights.b_Q is None else times(weights.b_Q, T_Q),
        b_K=None if weights.b_K is None else times(weights.b_K, T_K),
    )
