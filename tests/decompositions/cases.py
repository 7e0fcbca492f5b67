"""Small modules with their calibration states, so that closed forms can be checked against the states themselves."""

from dataclasses import dataclass

import torch
from torch import Tensor

from modegpt.decompositions.modules import (
    MLPWeights,
    QueryKeyWeights,
    Statistics,
    ValueOutputWeights,
)

HEADS = {"multi-head": (4, 4), "grouped-query": (6, 2), "multi-query": (3, 1)}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass
class MLPCase:
    weights: MLPWeights
    h: Tensor  # (T, n)

    @property
    def statistics(self) -> Statistics:
        num_tokens = torch.tensor(len(self.h))
        return {"mlp.C": self.h.mT @ self.h, "mlp.mean": self.h.mean(dim=0), "layer.num_tokens": num_tokens}

    def output_error(self, h_kept: Tensor, W_D: Tensor) -> float:
        dense = self.h @ self.weights.W_D
        return float((dense - h_kept @ W_D).square().sum() / dense.square().sum())


def mlp_case(
    *, T: int = 120, d_h: int = 10, n: int = 24, gated: bool = True, bias: bool = False, seed: int = 0
) -> MLPCase:
    weights = MLPWeights(
        W_U=normal(d_h, n, seed=seed),
        W_G=normal(d_h, n, seed=seed + 1) if gated else None,
        W_D=normal(n, d_h, seed=seed + 2),
        b_U=normal(n, seed=seed + 3) if bias else None,
        b_G=normal(n, seed=seed + 4) if bias and gated else None,
        b_D=normal(d_h, seed=seed + 5) if bias else None,
    )
    x = normal(T, d_h, seed=seed + 6)
    return MLPCase(weights=weights, h=mlp_states(weights, x))


def mlp_states(weights: MLPWeights, x: Tensor) -> Tensor:
    up = x @ weights.W_U + (0 if weights.b_U is None else weights.b_U)
    if weights.W_G is None:
        return torch.relu(up)
    return torch.nn.functional.silu(x @ weights.W_G + (0 if weights.b_G is None else weights.b_G)) * up


@dataclass
class QueryKeyCase:
    weights: QueryKeyWeights
    x: Tensor  # (T, d_h)
    Q: Tensor  # (H, T, d) before any rotation
    K: Tensor  # (H_kv, T, d)

    @property
    def statistics(self) -> Statistics:
        grams = {"query_key.C_Q": self.Q.mT @ self.Q, "query_key.C_K": self.K.mT @ self.K}
        return grams | {"query_key.mean_K": self.K.mean(dim=1), "layer.num_tokens": torch.tensor(self.K.shape[1])}

    def logits(self, weights: QueryKeyWeights | None = None) -> Tensor:
        """(H, T, T), from the states of the (reduced) weights, without rotation."""
        Q, K = query_key_states(self.weights if weights is None else weights, self.x)
        return Q @ K.repeat_interleave(len(Q) // len(K), dim=0).mT


def query_key_states(weights: QueryKeyWeights, x: Tensor) -> tuple[Tensor, Tensor]:
    Q, K = x @ weights.W_Q, x @ weights.W_K
    if weights.b_Q is not None:
        Q = Q + weights.b_Q.unsqueeze(1)
    if weights.b_K is not None:
        K = K + weights.b_K.unsqueeze(1)
    return Q, K


def query_key_case(
    *,
    heads: tuple[int, int],
    T: int = 60,
    d_h: int = 12,
    d: int = 8,
    rope: bool = True,
    bias: bool = False,
    seed: int = 0,
) -> QueryKeyCase:
    H, H_kv = heads
    spread = torch.logspace(0, -1, d, dtype=torch.float64)
    weights = QueryKeyWeights(
        W_Q=normal(H, d_h, d, seed=seed) * spread.roll(seed),
        W_K=normal(H_kv, d_h, d, seed=seed + 1)
        * torch.stack([spread.roll(3 * k + 1) for k in range(H_kv)]).unsqueeze(1),
        b_Q=normal(H, d, seed=seed + 2) if bias else None,
        b_K=normal(H_kv, d, seed=seed + 3) if bias else None,
        rope=rope,
        frequencies=10.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d) if rope else None,
    )
    x = normal(T, d_h, seed=seed + 4)
    Q, K = query_key_states(weights, x)
    return QueryKeyCase(weights=weights, x=x, Q=Q, K=K)


@dataclass
class ValueOutputCase:
    weights: ValueOutputWeights
    x: Tensor  # (T, d_h)
    v: Tensor  # (H_kv, T, d) without bias
    a: Tensor  # (H, T, d) values mixed by causal attention rows, without bias
    attention: Tensor  # (H, T, T)

    @property
    def statistics(self) -> Statistics:
        return {"value_output.G": self.v.mT @ self.v, "value_output.A": self.a.mT @ self.a}

    def maps(self, weights: ValueOutputWeights | None = None) -> Tensor:
        """(H, d_h, d_h): W_V W_O of each query head."""
        weights = self.weights if weights is None else weights
        return weights.W_V.repeat_interleave(len(weights.W_O) // len(weights.W_V), dim=0) @ weights.W_O

    def value_error(self, weights: ValueOutputWeights) -> float:
        """Squared output error over energy of the unmixed values."""
        dense = self.x @ self.maps()
        return float((dense - self.x @ self.maps(weights)).square().sum() / dense.square().sum())

    def attention_error(self, weights: ValueOutputWeights) -> float:
        """The same of the mixed values, per query head."""
        mixed = self.attention @ self.x
        dense = mixed @ self.maps()
        return float((dense - mixed @ self.maps(weights)).square().sum() / dense.square().sum())

    def module_output(self, weights: ValueOutputWeights | None = None) -> Tensor:
        """(T, d_h): the whole module with its biases."""
        weights = self.weights if weights is None else weights
        v = self.x @ weights.W_V
        if weights.b_V is not None:
            v = v + weights.b_V.unsqueeze(1)
        v = v.repeat_interleave(len(weights.W_O) // len(weights.W_V), dim=0)
        return (self.attention @ v @ weights.W_O).sum(dim=0) + (0 if weights.b_O is None else weights.b_O)


def value_output_case(
    *, heads: tuple[int, int], T: int = 60, d_h: int = 12, d: int = 8, bias: bool = False, seed: int = 0
) -> ValueOutputCase:
    H, H_kv = heads
    weights = ValueOutputWeights(
        W_V=normal(H_kv, d_h, d, seed=seed) * torch.logspace(0, -1, d, dtype=torch.float64),
        W_O=normal(H, d, d_h, seed=seed + 1) * torch.logspace(-0.7, 0, d, dtype=torch.float64)[:, None],
        b_V=normal(H_kv, d, seed=seed + 2) if bias else None,
        b_O=normal(d_h, seed=seed + 3) if bias else None,
    )
    x = normal(T, d_h, seed=seed + 4)
    scores = 2 * normal(H, T, T, seed=seed + 5)
    attention = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(dim=-1)
    v = x @ weights.W_V
    a = attention @ v.repeat_interleave(H // H_kv, dim=0)
    return ValueOutputCase(weights=weights, x=x, v=v, a=a, attention=attention)


def matrix_root(C: Tensor) -> Tensor:
    """C^1/2 of a positive semidefinite C, by eigendecomposition."""
    eigenvalues, vectors = torch.linalg.eigh(C)
    return (vectors * eigenvalues.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
