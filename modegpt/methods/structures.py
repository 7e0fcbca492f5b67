"""Coupled structures that go as a whole: key/value groups (with their query heads) and MLP channels.

What a structure weighs, which to keep under a budget, and the model without the others. Shared by the
structured pruning baselines.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modegpt.decompositions.modules import (
    ExpertWeights,
    HeadNorm,
    MLPWeights,
    QueryKeyWeights,
    ValueOutputWeights,
)
from modegpt.decompositions.selection import keep_mlp
from modegpt.methods.base import Compressed, CompressionTask
from modegpt.models import (
    Family,
    LayerShape,
    block_linear_parameters,
    build_compressed,
    decoder_layers,
    dense_shape,
    layer_tensors,
    read_mlps,
    read_query_key,
    read_value_output,
)


@dataclass(frozen=True)
class Kept:
    """What stays in one layer, as masks: ``groups`` (H_kv,) and ``channels`` (n,), both bool.

    ``channels`` of experts may be (E, n), as many in each.
    """

    groups: Tensor
    channels: Tensor

    @property
    def width(self) -> int:
        """Channels that stay, in each expert where there are several."""
        return int(self.channels.sum(dim=-1).max())

    @classmethod
    def everything(cls, shape: LayerShape) -> "Kept":
        """All structures of a layer of ``shape``."""
        return cls(
            torch.ones(shape.num_kv_heads, dtype=torch.bool), torch.ones(shape.intermediate_size, dtype=torch.bool)
        )


@dataclass(frozen=True)
class StructureSizes:
    """Block-linear weights that one key/value group (with its g query heads) and one MLP channel hold.

    A channel of experts is one in each of them.
    """

    group: int
    channel: int

    @classmethod
    def of(cls, family: Family, layer: nn.Module, shape: LayerShape) -> "StructureSizes":
        """Those of a dense ``layer`` of ``shape``."""
        attention = sum(role(layer).weight.numel() for role in (family.query, family.key, family.value, family.output))
        mlp = sum(
            W.numel()
            for each in LayerWeights.read(family, layer).mlps
            for W in (each.W_U, each.W_G, each.W_D)
            if W is not None
        )
        return cls(attention // shape.num_kv_heads, mlp // shape.intermediate_size)

    def even_shares(self, num_groups: int, num_channels: int, budget: float) -> tuple[int, int]:
        """Groups and channels to remove of one layer so that ``budget`` weights go: an equal share of both.

        Groups are rounded to whole ones, channels take what is left of the budget; at least one of each stays.
        """
        share = budget / (self.group * num_groups + self.channel * num_channels)
        groups = min(round(share * num_groups), num_groups - 1)
        channels = int((budget - groups * self.group) / self.channel + 1e-9)
        return groups, max(0, min(channels, num_channels - 1))

    def removed(self, kept: Kept) -> int:
        """Weights of a layer that are gone when ``kept`` stays."""
        return self.group * int((~kept.groups).sum()) + self.channel * (kept.channels.shape[-1] - kept.width)


@dataclass(frozen=True)
class LayerWeights:
    """The three modules of a layer, in the paper's orientation."""

    mlp: Any  # MLPWeights, or ExpertWeights in a mixture
    query_key: QueryKeyWeights
    value_output: ValueOutputWeights

    @classmethod
    def read(cls, family: Family, layer: nn.Module) -> "LayerWeights":
        """Those of a dense ``layer``."""
        return cls(read_mlps(family, layer), read_query_key(family, layer), read_value_output(family, layer))

    @property
    def mlps(self) -> tuple[MLPWeights, ...]:
        """The one MLP, or every expert."""
        return self.mlp.experts if isinstance(self.mlp, ExpertWeights) else (self.mlp,)

    def with_mlps(self, mlps: Sequence[MLPWeights]) -> "LayerWeights":
        """With others in the place of ``mlps``."""
        return replace(self, mlp=ExpertWeights(tuple(mlps)) if isinstance(self.mlp, ExpertWeights) else mlps[0])

    def without_removed(self, kept: Kept) -> "LayerWeights":
        """The same modules with the structures outside ``kept`` cut out."""
        device = self.query_key.W_K.device
        groups, channels = kept.groups.to(device), kept.channels.to(device)
        heads = groups.repeat_interleave(len(self.query_key.W_Q) // len(groups))

        def cut(tensor: Tensor | None, mask: Tensor) -> Tensor | None:
            return None if tensor is None else tensor[mask]

        query_key, value_output = self.query_key, self.value_output
        masks = channels.expand(len(self.mlps), -1)
        smaller = [keep_mlp(each, mask.nonzero().squeeze(1)) for each, mask in zip(self.mlps, masks, strict=True)]
        return replace(
            self.with_mlps(smaller),
            query_key=replace(
                query_key,
                W_Q=query_key.W_Q[heads],
                W_K=query_key.W_K[groups],
                b_Q=cut(query_key.b_Q, heads),
                b_K=cut(query_key.b_K, groups),
                norm_Q=_norm_of(query_key.norm_Q, heads),
                norm_K=_norm_of(query_key.norm_K, groups),
            ),
            value_output=replace(
                value_output,
                W_V=value_output.W_V[groups],
                W_O=value_output.W_O[heads],
                b_V=cut(value_output.b_V, groups),
            ),
        )


def _norm_of(norm: HeadNorm | None, heads: Tensor) -> HeadNorm | None:
    """The norm of the ``heads`` (H,) that stay; one over all heads becomes one over these."""
    if norm is None:
        return None
    if len(norm.eps) == len(heads):
        return HeadNorm(norm.w[heads], norm.c[heads], norm.eps[heads])
    return HeadNorm(norm.w[heads], norm.c[heads] * len(heads) / max(1, int(heads.sum())), norm.eps)


def cheapest_within(
    costs: Sequence[Tensor], sizes: Sequence[int], budget: float, removable: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Remove structures, cheapest first over all layers, as long as their weights fit the budget.

    A structure that would overshoot is passed over, so small ones fill what large ones leave.

    Args:
        costs: one (num_structures,) tensor a population (the groups or the channels of one layer); of equal costs the
            earlier goes first.
        sizes: weights of one structure of each population.
        budget: weights to remove at most.
        removable: masks of the structures that may go; None: all.

    Returns:
        one bool mask a population, True for what is removed.
    """
    removed = [torch.zeros(len(of), dtype=torch.bool) for of in costs]
    flat = torch.cat([of.double().cpu() for of in costs])
    assert not flat.isnan().any(), "a cost is NaN"
    population = torch.repeat_interleave(torch.arange(len(costs)), torch.tensor([len(of) for of in costs])).tolist()
    position = [place for of in costs for place in range(len(of))]
    allowed = (
        torch.ones_like(flat, dtype=torch.bool) if removable is None else torch.cat([mask.cpu() for mask in removable])
    )
    left = budget
    for candidate in flat.argsort(stable=True).tolist():
        size = sizes[population[candidate]]
        if allowed[candidate] and size <= left:
            removed[population[candidate]][position[candidate]] = True
            left -= size
    return removed


def removal_budget(task: CompressionTask) -> int:
    """Block-linear weights to remove; a fraction of a weight is dropped."""
    return math.floor(task.sparsity * block_linear_parameters(task.model) + 1e-6)


def pruned_model(
    task: CompressionTask, kept: Sequence[Kept], weights: Sequence[LayerWeights] | None = None, **details: object
) -> Compressed:
    """The model without the structures outside ``kept``.

    Args:
        weights: every layer's modules at dense size, where the method changed them; None: the dense model's. A
            bias on the output or down projection that the family lacks becomes an extra bias.
        details: JSON-able facts for ``Compressed.details``.
    """
    family, config = task.family, task.model.config
    dense = dense_shape(config)
    shapes, tensors, reports = [], [], []
    for index, layer in enumerate(decoder_layers(task.model)):
        of_layer = LayerWeights.read(family, layer) if weights is None else weights[index]
        num_groups, width = int(kept[index].groups.sum()), kept[index].width
        changed = (num_groups, width) != (dense.num_kv_heads, dense.intermediate_size)
        biases = (
            (family.output_path, of_layer.value_output.b_O, family.output(layer)),
            *zip(
                family.of_experts(family.down_path, len(of_layer.mlps)),
                (mlp.b_D for mlp in of_layer.mlps),
                family.downs(layer),
                strict=True,
            ),
        )
        extra = tuple(path for path, bias, linear in biases if changed and bias is not None and linear.bias is None)
        shape = replace(dense, num_kv_heads=num_groups, intermediate_size=width, extra_biases=extra)
        small = of_layer.without_removed(kept[index])
        shapes.append(shape)
        tensors.append(layer_tensors(family, config, shape, **vars(small)) if changed else {})
        reports.append(
            {"index": index, "ranks": {"mlp": width, "num_kv_heads": num_groups}, "relative_error": {}, "numerics": {}}
        )
    return Compressed(model=build_compressed(task.model, shapes, tensors), layers=reports, details=dict(details))
