"""LLM Surgeon: multi-shot structured pruning by Kronecker-factored curvature, with correlated weight updates."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modegpt.calibration.gradients import differentiable, in_micro_batches, summed_loss
from modegpt.errors import UserError
from modegpt.methods.base import Compressed, CompressionTask, Method
from modegpt.methods.kronecker import Curvature, damped, inverse, observed_curvature, removal_costs, without_rows
from modegpt.methods.low_rank import INPUT_GRAM, block_linears
from modegpt.methods.structures import Kept, LayerWeights, StructureSizes, cheapest_within, pruned_model, removal_budget
from modegpt.models import LayerShape, decoder_layers, dense_shape

READERS = {"groups": ("output",), "channels": ("down",)}
"""The linears that read a structure of each population: its inputs go."""
WRITERS = {"groups": ("query", "key", "value"), "channels": ("up", "gate")}
"""The linears that write it: their outputs go."""


@dataclass(frozen=True)
class Part:
    """One linear's share in a population of structures, restricted to those that are left.

    Args:
        W: (rows, other): the weight, as float64, rows of one structure consecutive.
        own_inverse: (rows, rows): inverse of the damped curvature factor along the rows.
        other: (other, other): the damped factor along the other side.
        target: the weight itself, rows first, a view to write to; ``index`` (rows,) are the rows of W in it.
    """

    W: Tensor
    own_inverse: Tensor
    other: Tensor
    target: Tensor
    index: Tensor


@dataclass(frozen=True)
class LLMSurgeon(Method):
    """The LLM Surgeon (van der Ouderaa et al., ICLR 2024, arXiv 2312.17244), structured, with correlated updates.

    Algorithm 1, in each of ``shots`` shots: estimate the curvature ``A (x) G`` of every linear of the current model
    (section 3.1; the empirical Fisher of the next-token loss), cost every structure (section 3.2), remove the
    cheapest of the whole model (3.3) up to a linear schedule (3.5), and update what is left for all removals of a
    matrix jointly (3.4).

    Simplifications, for a model whose shapes really shrink:
    - Structures are coupled: MLP channels and whole heads (key/value groups with their query heads), where the paper
      removes rows and columns of each matrix on its own.
    - Structures differ in size, so the threshold is on the cost per weight removed.
    - Biases stay as they are; there is no LoRA correction between shots (section 3.6, optional there).

    Args:
        shots: how often curvature is estimated again; 1 is one-shot.
        damping: added to both factors, relative to their mean diagonal.
        coupling: ``inputs``: a structure costs what its removal costs in the linear that reads it (down, output),
            and that linear adapts. What the removed outputs of the linears before were no longer matters, so their
            removal is free. ``both``: every row and column of a structure is costed and compensated for in its own
            matrix, and costs are summed: the exact minimum where curvature is block-diagonal over matrices, as
            the paper assumes, but a loss is then made up for twice.
        batch_size: windows per backward pass.
    """

    shots: int = 5
    damping: float = 0.01
    coupling: Literal["inputs", "both"] = "inputs"
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.shots < 1:
            raise UserError(f"method.shots={self.shots} is too small: at least 1")
        if self.damping <= 0:
            raise UserError(f"method.damping={self.damping} must be positive: curvature of few tokens is singular")
        if self.batch_size < 1:
            raise UserError(f"method.batch_size={self.batch_size} is too small: at least 1")

    def compress(self, task: CompressionTask) -> Compressed:
        shape = dense_shape(task.model.config)
        kept = [Kept.everything(shape)] * task.calibration.num_layers
        if task.sparsity == 0:
            return pruned_model(task, kept)
        working = copy.deepcopy(task.model)
        for shot in range(1, self.shots + 1):
            curvature = self._curvature(task, working)
            kept = self._shoot(task, working, shape, curvature, kept, removal_budget(task) * shot / self.shots)
        return pruned_model(task, kept, [LayerWeights.read(task.family, layer) for layer in decoder_layers(working)])

    def _roles(self, population: str) -> tuple[str, ...]:
        return READERS[population] + (WRITERS[population] if self.coupling == "both" else ())

    def _curvature(self, task: CompressionTask, model: PreTrainedModel) -> Curvature:
        """Curvature of the linears that matter, from one forward and backward pass of ``model`` over the calibration windows."""
        roles = self._roles("groups") + self._roles("channels")
        linears, input_names = {}, {}
        for index, layer in enumerate(decoder_layers(model)):
            for role, linear in block_linears(task.family, layer).items():
                if role in roles:
                    linears[f"{index}.{role}"] = linear
                    input_names[f"{index}.{role}"] = f"{index}.{INPUT_GRAM[role]}"
        # Only activations need gradients, so the graph starts at the embeddings and no weight gradient is computed.
        source = model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.detach().requires_grad_())
        try:
            with (
                differentiable(model, ()),
                observed_curvature(linears, input_names, task.calibration.precision) as curvature,
            ):
                in_micro_batches(
                    task.calibration, "curvature", self.batch_size, lambda batch: summed_loss(model, batch).backward()
                )
        finally:
            source.remove()
        return curvature

    def _shoot(
        self,
        task: CompressionTask,
        model: PreTrainedModel,
        shape: LayerShape,
        curvature: Curvature,
        kept: list[Kept],
        budget: float,
    ) -> list[Kept]:
        """Remove structures until ``budget`` weights are gone since the dense model, and update ``model`` in place.

        Two walks over the layers, one for costs and one for updates, so that one layer's inverses live at a time.
        """
        sizes = StructureSizes.of(task.family, decoder_layers(task.model)[0], shape)
        size_of = {"groups": sizes.group, "channels": sizes.channel}
        with task.calibration.meter.stage("solve", counted=True):
            costs, populations, removable = [], [], []
            for _, population, alive, parts in self._populations(task, model, curvature, kept):
                num_alive = int(alive.sum())
                cost = torch.full(alive.shape, torch.inf, dtype=torch.float64)
                least = sum(
                    removal_costs(part.W, part.own_inverse, part.other, len(part.W) // num_alive) for part in parts
                )
                cost[alive] = least.cpu() / size_of[population]
                costs.append(cost)
                populations.append(population)
                removable.append(alive)
            still = budget - sum(sizes.removed(of_layer) for of_layer in kept)
            removed = cheapest_within(costs, [size_of[population] for population in populations], still, removable)
            masks = [{"groups": of_layer.groups, "channels": of_layer.channels} for of_layer in kept]
            walk = self._populations(task, model, curvature, kept)
            for (index, population, alive, parts), gone in zip(walk, removed, strict=True):
                if gone.any():
                    masks[index][population] = alive & ~gone
                    for part in parts:
                        rows = gone[alive].repeat_interleave(len(part.W) // int(alive.sum())).to(part.W.device)
                        part.target[part.index] = without_rows(part.W, part.own_inverse, rows).to(part.target.dtype)
        return [Kept(**of_layer) for of_layer in masks]

    def _populations(
        self, task: CompressionTask, model: PreTrainedModel, curvature: Curvature, kept: list[Kept]
    ) -> Iterator[tuple[int, str, Tensor, list[Part]]]:
        """Layer, population, which of its structures are left, and the linears they span; populations without any are skipped."""
        for index, layer in enumerate(decoder_layers(model)):
            linears = block_linears(task.family, layer)
            for population, alive in (("groups", kept[index].groups), ("channels", kept[index].channels)):
                if alive.any():
                    roles = [role for role in self._roles(population) if role in linears]
                    yield (
                        index,
                        population,
                        alive,
                        [self._part(task, linears[role], role, index, curvature, alive) for role in roles],
                    )

    def _part(
        self, task: CompressionTask, linear: nn.Linear, role: str, index: int, curvature: Curvature, alive: Tensor
    ) -> Part:
        num_tokens = task.calibration.tokens.num_tokens
        A = curvature.A(f"{index}.{INPUT_GRAM[role]}", num_tokens)
        G = curvature.G(f"{index}.{role}", num_tokens)
        reads = role in READERS["groups"] + READERS["channels"]
        own, other = (A, G) if reads else (G, A)
        target = linear.weight.detach().T if reads else linear.weight.detach()
        rows = alive.to(target.device).repeat_interleave(len(target) // len(alive)).nonzero().squeeze(1)
        own_inverse = inverse(damped(own[rows][:, rows], self.damping))
        return Part(
            W=target[rows].double(),
            own_inverse=own_inverse,
            other=damped(other, self.damping),
            target=target,
            index=rows,
        )
