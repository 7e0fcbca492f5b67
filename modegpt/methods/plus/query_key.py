"""Query-key selection for the compressed stream: several candidates, the best on held-out windows for each key head."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modegpt.decompositions.attention import AttentionStates, block_map, eliminate_blocks, output_sensitivity
from modegpt.decompositions.cr import cr_scores
from modegpt.decompositions.modules import QueryKeyWeights
from modegpt.decompositions.selection import group_heads, largest, sum_pairs
from modegpt.decompositions.svd import QueryKeySVD
from modegpt.methods.plus.attention_states import SampledStates


@dataclass(frozen=True)
class Candidate:
    """One way to reduce the query-key product: kept blocks (H_kv, .) of a basis, T_Q (H, d, r), T_K (H_kv, d, r) on the states."""

    name: str
    kept: Tensor
    T_Q: Tensor
    T_K: Tensor


@dataclass(frozen=True)
class QueryKeyChoice:
    """weights; the candidate each key head took; squared error of the attention's output on held-out queries by candidate, relative."""

    weights: QueryKeyWeights
    names: list[str]
    held_out: dict[str, float]
    relative_error: float


def candidates(
    weights: QueryKeyWeights,
    states: SampledStates,
    rank: int,
    *,
    ridges: tuple[float, ...],
    improved: bool,
    centred: bool,
) -> list[Candidate]:
    """The paper's selection, and with ``improved`` those by logit and by output error, the latter also with rescaled queries.

    Without RoPE, where any basis of a head will do, the improved candidates work in the singular basis of the logits. ``centred``: their
    logit errors are those about the mean over keys, which softmax cannot see.
    """
    C_Q, C_K = states.C_Q, states.C_K
    pairs, d, num_groups = weights.rope, weights.inner_size, len(C_K)
    num_kept = rank // 2 if pairs else rank
    scores = cr_scores(*(C.diagonal(dim1=-2, dim2=-1) for C in (C_Q, C_K)))
    kept = largest(sum_pairs(scores) if pairs else scores, num_kept)
    identity = torch.eye(d, dtype=torch.float64, device=C_K.device)
    basis = (identity.expand_as(C_Q), identity.expand_as(C_K))
    plain = (torch.arange(d, device=C_K.device) < (d // 2 if pairs else d)).double().expand(len(C_Q) // num_groups, d)
    found = [_candidate("paper", [(kept_head, plain) for kept_head in kept], basis, pairs)]
    if not improved:
        return found
    if centred:
        C_K = states.centred_C_K
    if not pairs:
        basis = _singular_basis(C_Q, C_K)
        C_Q, C_K = (T.mT @ C @ T for T, C in zip(basis, (C_Q, C_K), strict=True))
    logits = group_heads(C_Q, num_groups).sum(dim=1) * C_K
    if pairs:
        logits = sum(block for half in logits.chunk(2, dim=-1) for block in half.chunk(2, dim=-2))
    found.append(
        _candidate(
            "logits",
            [eliminate_blocks(M.unsqueeze(0), num_kept, pairs=False, ridge=None)[0] for M in logits],
            basis,
            pairs,
            plain,
        )
    )
    to_state = tuple(T.to(states.fit[0].q.dtype) for T in basis)
    sensitivity = sum(output_sensitivity(part if pairs else part.mapped(*to_state), pairs=pairs) for part in states.fit)
    for ridge in (None, *ridges):
        choices = [
            eliminate_blocks(M, num_kept, pairs=pairs, ridge=ridge) for M in group_heads(sensitivity, num_groups)
        ]
        found.append(
            _candidate("output" if ridge is None else f"output, rescaled at ridge {ridge:g}", choices, basis, pairs)
        )
    return found


def _candidate(
    name: str, choices: list, basis: tuple[Tensor, Tensor], pairs: bool, plain: Tensor | None = None
) -> Candidate:
    """From the kept blocks and query coefficients of each key head, in ``basis``."""
    choices = [choice if plain is None else (choice, plain) for choice in choices]
    maps = [block_map(kept, coefficients, basis[1].shape[-1], pairs=pairs) for kept, coefficients in choices]
    T_Q, T_K = torch.cat([T for T, _ in maps]), torch.stack([T for _, T in maps])
    return Candidate(name, torch.stack([kept for kept, _ in choices]), basis[0] @ T_Q, basis[1] @ T_K)


def _singular_basis(C_Q: Tensor, C_K: Tensor) -> tuple[Tensor, Tensor]:
    """T_Q (H, d, d), T_K (H_kv, d, d): the maps of QueryKeySVD at full rank, which leave the logits as they are."""
    identity = torch.eye(C_K.shape[-1], dtype=torch.float64, device=C_K.device)
    maps = QueryKeyWeights(W_Q=identity.repeat(len(C_Q), 1, 1), W_K=identity.repeat(len(C_K), 1, 1), rope=False)
    statistics = {"query_key.C_Q": C_Q, "query_key.C_K": C_K}
    reduced = QueryKeySVD().reduce(maps, statistics, len(identity), torch.Generator()).weights
    return reduced.W_Q, reduced.W_K


def choose(weights: QueryKeyWeights, found: list[Candidate], held: list[AttentionStates]) -> QueryKeyChoice:
    """For each key head the candidate whose attention output errs least on ``held``, softmax and all; ties go to the earlier one."""
    num_groups = len(weights.W_K)
    errors, energy = torch.zeros(len(found), num_groups, dtype=torch.float64, device=weights.W_K.device), 0.0
    for states in held:
        dense = states.output()
        energy += float(dense.double().square().sum())
        for c, candidate in enumerate(found):
            T_Q, T_K = (T.to(states.q.dtype) for T in (candidate.T_Q, candidate.T_K))
            lost = (states.output(T_Q, T_K) - dense).double().square().sum(dim=(0, 2, 3))
            errors[c] += group_heads(lost, num_groups).sum(dim=1)
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
    return QueryKeyChoice(_mapped(weights, T_Q, T_K, kept), [found[c].name for c in best.tolist()], relative, chosen)


def _mapped(weights: QueryKeyWeights, T_Q: Tensor, T_K: Tensor, kept: Tensor) -> QueryKeyWeights:
    def times(tensor: Tensor | None, T: Tensor) -> Tensor | None:
        if tensor is None:
            return None
        rows = tensor.double() if tensor.ndim == 3 else tensor.double().unsqueeze(1)
        return (rows @ T).reshape(*tensor.shape[:-1], -1).to(tensor.dtype)

    index = None
    if weights.rope:
        index = kept if weights.rope_index is None else weights.rope_index.gather(-1, kept)
    return replace(
        weights,
        W_Q=times(weights.W_Q, T_Q),
        W_K=times(weights.W_K, T_K),
        b_Q=times(weights.b_Q, T_Q),
        b_K=times(weights.b_K, T_K),
        rope_index=index,
    )
