"""Attention states of some queries of some calibration windows, as the query-key selection looks at them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modegpt.calibration.statistics import rotate
from modegpt.calibration.stream import HiddenStates
from modegpt.decompositions.attention import AttentionStates
from modegpt.decompositions.linalg import psd_cholesky
from modegpt.methods.plus.streams import Split, observe
from modegpt.models import Family, read_value_output


@dataclass(frozen=True)
class SampledStates:
    """C_Q (H, d, d), C_K (H_kv, d, d) Grams of the states entering the product, k_sum (H_kv, d) and the number of their tokens; states to fit on, and held out."""

    C_Q: Tensor
    C_K: Tensor
    k_sum: Tensor
    num_tokens: int
    fit: list[AttentionStates]
    held: list[AttentionStates]

    @property
    def centred_C_K(self) -> Tensor:
        """The Gram of the keys about their mean, which softmax cannot see: it adds the same number to every logit of a query."""
        return self.C_K - self.k_sum.unsqueeze(-1) * self.k_sum.unsqueeze(-2) / self.num_tokens


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
    """Run the projections of ``layer`` (number ``index``) on the first batches of ``stream`` that have ``num_windows`` windows to fit on.

    All of their tokens enter the Grams; attention states are those of ``queries_per_window`` positions of at most ``num_windows``
    windows of either part.
    """
    attention = family.attention(layer)
    rotary = next(iter(stream.arguments[index].values())).get("position_embeddings")
    taps = {
        "q": (family.query(layer), "output"),
        "k": (family.key(layer), "output"),
        "v": (family.value(layer), "output"),
    }
    W_O = read_value_output(family, layer).W_O.double()
    metric = psd_cholesky(W_O @ W_O.mT).root()
    some = HiddenStates(stream.batches[: split.batches_with(num_windows)], stream.arguments)
    sums: dict[str, Tensor] = {}
    states: tuple[list[AttentionStates], list[AttentionStates]] = ([], [])
    left, num_tokens = [num_windows] * 2, 0
    for seen in observe(layer, index, some, taps, stop=True):
        q, k, v = (seen.seen[name].unflatten(-1, (-1, attention.head_dim)) for name in "qkv")
        q, k = rotate(family.normalise_query(layer, q), rotary), rotate(family.normalise_key(layer, k), rotary)
        num_tokens += q.shape[:2].numel()
        of_batch = {
            "C_Q": _gram(q, precision),
            "C_K": _gram(k, precision),
            "k_sum": k.sum(dim=(0, 1), dtype=torch.float64),
        }
        sums = {name: value + sums[name] if sums else value for name, value in of_batch.items()}
        v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2).transpose(1, 2) @ metric.to(v.dtype)
        positions = _positions(q.shape[1], queries_per_window, generator)
        bias = _attention_bias(stream.layer_arguments(index, seen.x).get("attention_mask"), seen.x, positions)
        for held in (False, True):
            windows = split.windows(seen.batch, held=held)[: left[held]].to(q.device)
            if len(windows):
                left[held] -= len(windows)
                queries = q[windows][:, positions.to(q.device)].transpose(1, 2) * attention.scaling
                own_bias = bias if len(bias) == 1 else bias[windows]
                states[held].append(
                    AttentionStates(q=queries, k=k[windows].transpose(1, 2), v=v[windows], bias=own_bias)
                )
    return SampledStates(**sums, num_tokens=num_tokens, fit=states[False], held=states[True])


def _gram(states: Tensor, precision: torch.dtype) -> Tensor:
    """(heads, d, d) of states (batch, sequence, heads, d)."""
    rows = states.to(precision).flatten(0, 1).transpose(0, 1)
    return (rows.mT @ rows).double()


def _positions(length: int, num_queries: int, generator: torch.Generator) -> Tensor:
    """Sampled query positions; the first token attends to itself alone and shows nothing."""
    order = torch.randperm(length - 1, generator=generator)[:num_queries] + 1
    return order.sort().values


def _attention_bias(mask: Tensor | None, x: Tensor, positions: Tensor) -> Tensor:
    """(1 or batch, 1, t, s): 0 where the sampled queries may attend, -inf elsewhere; ``mask`` is what the layer gets."""
    length = x.shape[1]
    if mask is not None and mask.ndim == 4:
        allowed = mask if mask.dtype == torch.bool else mask >= 0
        allowed = allowed[:, :, positions.to(x.device), :length]
    else:
        allowed = (torch.arange(length) <= positions.unsqueeze(1))[None, None].to(x.device)
    return torch.zeros(allowed.shape, dtype=x.dtype, device=x.device).masked_fill(~allowed, float("-inf"))
