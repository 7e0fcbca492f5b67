"""LLM Surgeon: multi-shot structured pruning by Kronecker-factored curvature, with correlated weight updates.

For ``y = x W`` the curvature of the loss in W (in, out) is approximated by ``A (x) G`` with ``A = E[x^T x]`` (in, in)
and ``G = E[g^T g]`` (out, out), g the gradient of the loss in y: a change D of W costs ``1/2 tr(D^T A D G)``. The maths
here is for rows of W (inputs); for columns (outputs) pass ``W.T`` with A and G exchanged.

Source: van der Ouderaa et al., ICLR 2024, sections 3.1 to 3.4.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modegpt.calibration.gradients import differentiable, in_micro_batches, summed_loss
from modegpt.calibration.moments import SecondMoment
from modegpt.decompositions.linalg import psd_cholesky
from modegpt.errors import UserError
from modegpt.methods.base import Compressed, CompressionTask, Method
from modegpt.methods.low_rank import INPUT_GRAM, block_linears
from modegpt.methods.structures import Kept, LayerWeights, StructureSizes, cheapest_within, pruned_model, removal_budget
from modegpt.models import LayerShape, decoder_layers, dense_shape


@dataclass
class Curvature:
    """Factors while they are collected: ``inputs[name]`` and ``outputs[name]`` are sums over tokens."""

    precision: torch.dtype = torch.float64
    inputs: dict[str, SecondMoment] = field(default_factory=dict)
    outputs: dict[str, SecondMoment] = field(default_factory=dict)

    def add(self, moments: dict[str, SecondMoment], name: str, rows: Tensor) -> None:
        """Add ``rows`` (..., n) to the second moment ``name`` of ``moments``."""
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
    linears: Mapping[str, nn.Linear],
    input_names: Mapping[str, str],
    precision: torch.dtype,
    weighed: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Iterator[Curvature]:
    """Collect curvature while the model runs forward and backward inside.

    Args:
        linears: the linear maps by name; their outputs must require gradients.
        input_names: under which name each linear's input is kept; linears that read the same tensor share one.
        weighed: from the gradient of an output to what enters its second moment.
    """
    curvature = Curvature(precision)
    readers = {input_name: name for name, input_name in input_names.items()}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if readers[input_names[name]] == name:
                curvature.add(curvature.inputs, input_names[name], args[0])
            out.register_hook(lambda gradient: curvature.add(curvature.outputs, name, weighed(gradient)))

        return hook

    handles = [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    try:
        yield curvature
    finally:
        for handle in handles:
            handle.remove()


def curvature_of(
    task: CompressionTask,
    model: PreTrainedModel,
    roles: Sequence[str],
    *,
    batch_size: int,
    weighed: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Curvature:
    """Curvature of the linears of ``roles`` in every layer of ``model``, from one pass forth and back over the
    calibration windows. Outputs are named ``"3.down"``, inputs ``"3.mlp.C"`` after their statistic.
    """
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
            observed_curvature(linears, input_names, task.calibration.precision, weighed) as curvature,
        ):
            in_micro_batches(
                task.calibration, "curvature", batch_size, lambda batch: summed_loss(model, batch).backward()
            )
    finally:
        source.remove()
    return curvature


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
    """W (in, out) after the rows ``removed`` ((in,) bool) became zero and the others made up for all of them jointly.

    The minimiser of ``removal_costs``' problem for all removed rows S at once: ``D = -A^-1_:S (A^-1_SS)^-1 W_S``
    (G drops out). Float64.
    """
    W = W.double()
    updated = W - A_inverse[:, removed] @ torch.linalg.solve(A_inverse[removed][:, removed], W[removed])
    updated[removed] = 0.0
    return updated


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

    Checked line by line against the official code (Qualcomm-AI-research/llm-surgeon), and run beside it: on tiny-llama
    its costs of the columns of the output and down projections are proportional to those here to 0.2 % (it damps the
    inverse alone). At 10 and 20 % in 5 shots, its rows and columns masked, perplexity is 1.9743 and 1.9798; here 1.9743
    and 1.9821. It puts biases into the curvature, and its structured runs take 40 shots.

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

    name: ClassVar[str] = "llm_surgeon"

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
        """Remove structures shot by shot, each on the curvature of what is left."""
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
        """Curvature of the linears that matter, from one pass forth and back over the calibration windows."""
        roles = self._roles("groups") + self._roles("channels")
        return curvature_of(task, model, roles, batch_size=self.batch_size)

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
                least = [
                    removal_costs(part.W, part.own_inverse, part.other, len(part.W) // num_alive) for part in parts
                ]
                cost[alive] = sum(least[1:], least[0]).cpu() / size_of[population]
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
        """Layer, population, which of its structures are left, and their linears; empty populations are skipped."""
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
