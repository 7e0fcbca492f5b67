"""Kronecker-factored curvature of linear maps, and what it says about removing rows of a weight.

For ``y = x W`` the curvature of the loss in W (in, out) is approximated by ``A (x) G`` with ``A = E[x^T x]``
(in, in) and ``G = E[g^T g]`` (out, out), g the gradient of the loss in y: a change D of W costs
``1/2 tr(D^T A D G)``. Everything below is for rows of W (inputs); for columns (outputs) pass ``W.T``
with A and G exchanged. Source: van der Ouderaa et al., ICLR 2024, sections 3.1 to 3.4.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from modegpt.calibration.moments import SecondMoment
from modegpt.decompositions.linalg import psd_cholesky


@dataclass
class Curvature:
    """Factors while they are collected: ``inputs[name]`` and ``outputs[name]`` are sums over tokens."""

    precision: torch.dtype = torch.float64
    inputs: dict[str, SecondMoment] = field(default_factory=dict)
    outputs: dict[str, SecondMoment] = field(default_factory=dict)

    def add(self, moments: dict[str, SecondMoment], name: str, rows: Tensor) -> None:
        rows = rows.detach().reshape(-1, 1, rows.shape[-1])
        if name not in moments:
            moments[name] = SecondMoment.zeros(1, rows.shape[-1], device=rows.device, precision=self.precision)
        moments[name].update(rows)

    def A(self, name: str, num_tokens: int) -> Tensor:
        """(in, in): mean of x^T x over tokens."""
        return self.inputs[name].value[0] / num_tokens

    def G(self, name: str, num_tokens: int) -> Tensor:
        """(out, out): mean of g^T g over tokens, where the loss is summed over tokens."""
        return self.outputs[name].value[0] / num_tokens


@contextmanager
def observed_curvature(
    linears: Mapping[str, nn.Linear], input_names: Mapping[str, str], precision: torch.dtype
) -> Iterator[Curvature]:
    """Collect curvature while the model runs forward and backward inside.

    Args:
        linears: the linear maps by name; their outputs must require gradients.
        input_names: under which name each linear's input is kept; linears that read the same tensor share one.
    """
    curvature = Curvature(precision)
    readers = {input_name: name for name, input_name in input_names.items()}

    def watch(name: str):
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if readers[input_names[name]] == name:
                curvature.add(curvature.inputs, input_names[name], args[0])
            out.register_hook(lambda gradient: curvature.add(curvature.outputs, name, gradient))

        return hook

    handles = [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    try:
        yield curvature
    finally:
        for handle in handles:
            handle.remove()


def damped(factor: Tensor, damping: float) -> Tensor:
    """``M + damping mean(diag M) I`` of a factor M (n, n), float64."""
    factor = factor.double()
    return factor + damping * factor.diagonal().mean() * torch.eye(
        len(factor), dtype=factor.dtype, device=factor.device
    )


def inverse(factor: Tensor) -> Tensor:
    """Inverse of a positive definite factor (n, n), float64."""
    return psd_cholesky(factor).solve(torch.eye(len(factor), dtype=torch.float64, device=factor.device))


def removal_costs(W: Tensor, A_inverse: Tensor, G: Tensor, rows_each: int) -> Tensor:
    """Least cost of setting each block of ``rows_each`` consecutive rows of W to zero while all other rows adapt.

    ``min_D 1/2 tr(D^T A D G)`` s.t. ``D_S = -W_S`` is ``1/2 tr((A^-1_SS)^-1 W_S G W_S^T)``, for every block S.

    Args:
        W: (in, out). A_inverse: (in, in). G: (out, out).

    Returns:
        (in / rows_each,) float64.
    """
    num_blocks = len(W) // rows_each
    blocks = torch.arange(len(W), device=W.device).view(num_blocks, rows_each)
    W_S = W.double().unflatten(0, (num_blocks, rows_each))
    inner = torch.einsum("bio,oj,bkj->bik", W_S, G, W_S)
    A_SS = A_inverse[blocks.unsqueeze(2), blocks.unsqueeze(1)]
    return torch.linalg.solve(A_SS, inner).diagonal(dim1=-2, dim2=-1).sum(dim=-1) / 2


def without_rows(W: Tensor, A_inverse: Tensor, removed: Tensor) -> Tensor:
    """W (in, out) after the rows ``removed`` ((in,) bool) became zero and the others made up for it, correlations and all.

    The minimiser of ``removal_costs``' problem for all removed rows S at once: ``D = -A^-1_:S (A^-1_SS)^-1 W_S``
    (G drops out). Float64.
    """
    W = W.double()
    updated = W - A_inverse[:, removed] @ torch.linalg.solve(A_inverse[removed][:, removed], W[removed])
    updated[removed] = 0.0
    return updated
