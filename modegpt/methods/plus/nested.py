"""Nested ranks: one calibration orders every module's dims once, and any rate is a cut of that order."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from modegpt.calibration.statistics import Statistics
from modegpt.decompositions.curves import attention_curve, mlp_curve
from modegpt.decompositions.linalg import psd_cholesky, relative
from modegpt.decompositions.modules import HEAD_NORM_FIT, Reduction
from modegpt.decompositions.selection import build_value_output, group_heads, keep_mlp, keep_query_key
from modegpt.decompositions.svd import balance
from modegpt.methods.plus.query_key import SampledStates
from modegpt.methods.plus.sensitivity import Costs
from modegpt.models import Family, read_mlp, read_query_key, read_value_output

FILE = "nested.safetensors"
"""What holds the orders beside a checkpoint's weights."""


@dataclass(frozen=True)
class NestedLayer:
    """The orders of one layer, most important dim first, and the small factors that refit what a cut keeps.

    All float32 or int64. A module left dense has none.

    Args:
        channels: MLP channels by backward elimination, (n,).
        root: lower-triangular L (n, n), ``C = L L^T`` the Gram of the channels in that order.
        blocks: rotary pairs (H_kv, d/2), or dims (H_kv, d) without RoPE, of each key head by backward elimination on
            the attention's output.
        block_errors: share of it, to first order, that keeping k of its b blocks loses, k = 0 ... b - 1, (b,).
        value_root: L (H_kv, d, d), ``G = L L^T``.
        vectors: U (H_kv, d, d), the left singular vectors of ``L^T W_O``, largest first.
        N_Q, N_K: what the norms of heads are fitted on, (heads, e, e), where the family has these.
    """

    channels: Tensor | None = None
    root: Tensor | None = None
    blocks: Tensor | None = None
    block_errors: Tensor | None = None
    value_root: Tensor | None = None
    vectors: Tensor | None = None
    N_Q: Tensor | None = None
    N_K: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that are not None, by name."""
        return {name: tensor.contiguous() for name, tensor in vars(self).items() if tensor is not None}


def nest(family: Family, layer: nn.Module, statistics: Statistics, states: SampledStates | None) -> NestedLayer:
    """Order the dims of the dense ``layer``, from its own statistics; queries and keys only where there are ``states``
    of them.
    """
    W_D, C = read_mlp(family, layer).W_D, statistics["mlp.C"]
    channels = mlp_curve(C, W_D)[1].flip(0)
    value_output = read_value_output(family, layer)
    A = statistics.get("value_output.A")
    G = statistics["value_output.G"] if A is None else group_heads(A, len(value_output.W_V)).sum(dim=1)
    W_O = group_heads(value_output.W_O.double(), len(G))
    value_root = psd_cholesky(G).root().float()
    # the vectors belong to the root as it is stored
    MMt = value_root.double().mT @ torch.einsum("kgdm,kgem->kde", W_O, W_O) @ value_root.double()
    vectors = torch.linalg.eigh(MMt).eigenvectors.flip(-1)
    root = psd_cholesky(C[channels][:, channels]).root().float()
    blocks = block_errors = None
    norms: dict[str, Tensor] = {}
    if states is not None:
        rope = read_query_key(family, layer).rope
        lost, order = attention_curve(states.sensitivity((*states.fit, *states.held), pairs=rope))
        lost, blocks = lost[1:], order.flip(1)
        block_errors = (lost / lost[-1].clamp(min=1e-300)).flip(0).float()
        norms = {name.removeprefix("query_key."): N.float() for name, N in states.norms.items()}
    return NestedLayer(channels, root, blocks, block_errors, value_root, vectors.float(), **norms)


def cut(family: Family, layer: nn.Module, nested: NestedLayer, ranks: Mapping[str, int]) -> dict[str, Reduction]:
    """The reduced modules of the dense ``layer`` at ``ranks``: leading dims, and one triangular solve a module with the
    stored factor.

    MLP, first k channels S: ``W_D <- L_SS^-T (L^T W_D)_S``, the least-squares optimum ``C_SS^-1 C_S: W_D``.
    Value-output: ``W_V <- W_V L^-T U_k``, ``W_O <- U_k^T L^T W_O``. Query-key: the first pairs. k^2 d_h + n^2 d_h
    FLOPs; no activations.
    """
    reductions: dict[str, Reduction[Any]] = {}
    mlp = read_mlp(family, layer)
    if (k := ranks["mlp"]) < mlp.inner_size:
        assert nested.root is not None and nested.channels is not None
        L, kept = nested.root.double(), nested.channels[:k]
        innovations = L.mT @ mlp.W_D.double()[nested.channels]
        W_D = torch.linalg.solve_triangular(L[:k, :k].mT, innovations[:k], upper=True)
        reductions["mlp"] = Reduction(keep_mlp(mlp, kept, W_D=W_D), relative_error=_lost(innovations, k), kept=kept)
    query_key = read_query_key(family, layer)
    if (k := ranks["query_key"]) < query_key.inner_size:
        assert nested.blocks is not None and nested.block_errors is not None
        num_blocks = k // query_key.rank_unit
        blocks = nested.blocks[:, :num_blocks]
        dims = torch.cat([blocks, blocks + query_key.inner_size // 2], dim=1) if query_key.rope else blocks
        norms = {}
        if nested.N_Q is not None and nested.N_K is not None:
            norms = {"query_key.N_Q": nested.N_Q, "query_key.N_K": nested.N_K}
        reduced, numerics = keep_query_key(query_key, dims, norms, head_norm=HEAD_NORM_FIT)
        reductions["query_key"] = Reduction(
            reduced, relative_error=float(nested.block_errors[num_blocks]), kept=dims, numerics=numerics
        )
    value_output = read_value_output(family, layer)
    if (k := ranks["value_output"]) < value_output.inner_size:
        assert nested.value_root is not None and nested.vectors is not None
        L, U = nested.value_root.double(), nested.vectors.double()
        P = torch.linalg.solve_triangular(L.mT, U[..., :k], upper=True)
        B = (L @ U).mT.unsqueeze(1) @ group_heads(value_output.W_O.double(), len(L))
        joined = build_value_output(value_output, *balance(value_output.W_V.double() @ P, B[:, :, :k]))
        reductions["value_output"] = Reduction(
            joined, relative_error=_lost(B.transpose(1, 2).flatten(2).transpose(0, 1).flatten(1), k)
        )
    return reductions


def _lost(innovations: Tensor, k: int) -> float:
    """Share of the output's energy in the orthogonal features (rows) after the first k."""
    energies = innovations.square().sum(dim=1)
    return relative(energies[k:].sum(), energies.sum())


def write_orders(path: Path, *, layers: Sequence[NestedLayer], costs: Costs | None, method: Mapping[str, Any]) -> None:
    """Write orders, rank costs and the options they were made with as one safetensors file."""
    tensors = {
        f"layers.{index}.{name}": tensor
        for index, layer in enumerate(layers)
        for name, tensor in layer.tensors().items()
    }
    for index, modules in enumerate(costs or []):
        tensors |= {
            f"costs.{index}.{module}": torch.tensor(cost, dtype=torch.float64) for module, cost in modules.items()
        }
    save_file(tensors, path, metadata={"method": json.dumps(method), "num_layers": str(len(layers))})


def read_orders(path: Path) -> tuple[list[NestedLayer], Costs | None, dict[str, Any]]:
    """What ``write_orders`` wrote: orders, costs (None where ranks do not follow them), options."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict: keys() is all it has)
    parts: dict[str, list[dict[str, Any]]] = {
        kind: [{} for _ in range(int(metadata["num_layers"]))] for kind in ("layers", "costs")
    }
    for name, tensor in tensors.items():
        kind, index, rest = name.split(".")
        parts[kind][int(index)][rest] = tensor.tolist() if kind == "costs" else tensor
    layers = [NestedLayer(**layer) for layer in parts["layers"]]
    return layers, parts["costs"] if any(parts["costs"]) else None, json.loads(metadata["method"])
