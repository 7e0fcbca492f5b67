"""The maths of SliceGPT on tensors (pure torch).

Weights here are as ``nn.Linear`` stores them, (out, in) for ``y = x weight^T + bias``. A *reader* takes
the residual stream (in = d_h) after a norm, a *writer* adds to it (out = d_h). ``Q`` (d_h, k) holds the
orthonormal axes, as columns, in which a block's input is kept.

Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", ICLR 2024.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def centred(W: Tensor) -> Tensor:
    """``W M`` with ``M = I - 1 1^T / d``: the last dimension's mean taken off (section 3.2)."""
    return W - W.mean(dim=-1, keepdim=True)


def fold_norm(
    weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A reader that takes its norm's ``scale`` and ``shift`` (d_h,) in (section 3.2); what is None is 1 or 0."""
    if shift is not None:
        folded = weight @ shift
        bias = folded if bias is None else bias + folded
    return (weight if scale is None else weight * scale), bias


def principal_axes(C: Tensor) -> tuple[Tensor, Tensor]:
    """Energies (d_h,), decreasing, and principal axes (d_h, d_h), in columns, of a Gram matrix ``C`` (section 3.3).

    Float64. Energies that rounding made negative are 0.
    """
    energies, Q = torch.linalg.eigh(C.to(torch.float64))
    return energies.flip(0).clamp_min(0.0), Q.flip(1)


def lost_energy(energies: Tensor, size: int) -> float:
    """Share of the energy outside the first ``size`` axes, in [0, 1]: the relative squared error of slicing."""
    return (energies[size:].sum() / energies.sum().clamp_min(torch.finfo(energies.dtype).tiny)).item()


def projected(x: Tensor, Q: Tensor) -> Tensor:
    """``x Q Q^T``: what slicing leaves of the stream ``x`` (..., d_h), in the basis it came in."""
    return x @ Q @ Q.T


def rotated_reader(weight: Tensor, Q: Tensor) -> Tensor:
    """A reader (out, d_h) of the stream in the axes ``Q``: (out, k)."""
    return weight @ Q


def rotated_writer(weight: Tensor, bias: Tensor | None, Q: Tensor) -> tuple[Tensor, Tensor | None]:
    """A writer (d_h, in) and its bias (d_h,) to the stream in the axes ``Q``: (k, in) and (k,)."""
    return Q.T @ weight, None if bias is None else bias @ Q


def shortcut(Q_in: Tensor, Q_out: Tensor) -> Tensor:
    """What carries a residual connection from the axes ``Q_in`` (d_h, k) to ``Q_out`` (d_h, k'), as a weight (k', k): section 3.3."""
    return Q_out.T @ Q_in


def layer_parameters(attention: tuple[int, int], mlp: tuple[int, int], sizes: Sequence[int]) -> int:
    """Weights of one sliced layer, its two shortcuts included.

    Args:
        attention, mlp: of each block, rows of all its readers together and columns of its writer.
        sizes: stream width entering the attention, entering the MLP, leaving the layer.
    """
    blocks = ((*attention, sizes[0], sizes[1]), (*mlp, sizes[1], sizes[2]))
    return sum(rows * size_in + columns * size_out + size_in * size_out for rows, columns, size_in, size_out in blocks)
