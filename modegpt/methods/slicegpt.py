"""SliceGPT: rotate the residual stream to its principal axes, block by block, and delete the last of them.

Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", ICLR 2024, section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modegpt.calibration.moments import SecondMoment
from modegpt.calibration.stream import HiddenStates, advance
from modegpt.errors import UserError
from modegpt.methods.base import Compressed, CompressionTask, Method
from modegpt.methods.slicegpt_folding import (
    SLICED_MODELS,
    Tensors,
    assemble,
    cast,
    check_sliceable,
    folded_embeddings,
    folded_head,
    folded_layer,
    layer_class,
    runnable_layer,
    sliced_layer,
    subtracts_mean,
)
from modegpt.methods.slicegpt_rotation import (
    centred,
    layer_parameters,
    lost_energy,
    principal_axes,
    projected,
    rotated_reader,
)
from modegpt.models import Family, block_linear_parameters, decoder_layers

CHOICES = {
    "budget": ("parameters", "slicing"),
    "calibrate_on": ("sliced", "dense"),
    "signal": ("residual", "normalised"),
}


@dataclass(frozen=True)
class SliceGPT(Method):
    """Every block's input loses the same number of principal directions.

    Args:
        budget: what the task's sparsity means. ``parameters``: share of the block-linear weights removed, the
            shortcut matrices counted as weights that were added (the same budget as every method's);
            ``slicing``: share of the hidden dimension removed, as the paper states its figures.
        calibrate_on: the stream whose principal axes are taken. ``sliced``: that of the network as sliced so
            far (section 3.3); ``dense``: that of the dense network, all rotations first, then slicing.
        signal: ``residual``: the block's input, as in the authors' code; ``normalised``: what its norm makes
            of it, so that every token weighs the same, as section 3.3 reads.
        slice_head: whether the head's input is sliced as well; the authors' code leaves it whole.
        multiple: the kept width is a multiple of this.

    Differs from the authors' code in that no damping is added to the Gram matrices: it moves no eigenvector.
    """

    budget: str = "parameters"
    calibrate_on: str = "sliced"
    signal: str = "residual"
    slice_head: bool = False
    multiple: int = 1

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"slicegpt {name}={getattr(self, name)!r} is unknown; use one of {', '.join(choices)}")
        if self.multiple < 1:
            raise UserError(f"slicegpt multiple={self.multiple} must be at least 1")

    def applicable(self, family: Family) -> str | None:
        if family.model_type not in SLICED_MODELS:
            return f"slicegpt has a sliced model for {', '.join(SLICED_MODELS)}, not for {family.model_type}"
        return None

    @torch.no_grad()
    def compress(self, task: CompressionTask) -> Compressed:
        model = task.model
        check_sliceable(model)
        num_layers, full_size = len(decoder_layers(model)), model.config.hidden_size
        if task.sparsity == 0:
            details = {"slicing_fraction": 0.0, "kept_size": full_size, "removed_share": 0.0}
            return Compressed(model, [{"index": index} for index in range(num_layers)], details=details)
        size = self.kept_size(task)
        sizes = self.stream_sizes(size, num_layers, full_size)
        tensors, layers = self._slice(task, sizes)
        sliced = assemble(model, sizes, tensors)
        details = {
            "slicing_fraction": 1.0 - size / full_size,
            "kept_size": size,
            "stream_sizes": sizes,
            "shortcut_parameters": sum(a * b for a, b in zip(sizes, sizes[1:])),
            "removed_share": 1.0 - sliced_parameters(model, sizes) / block_linear_parameters(model),
        }
        return Compressed(sliced, layers, details=details)

    def stream_sizes(self, size: int, num_layers: int, full_size: int) -> list[int]:
        """The stream's width entering each block and the head when ``size`` directions are kept."""
        return [size] * (2 * num_layers) + [size if self.slice_head else full_size]

    def kept_size(self, task: CompressionTask) -> int:
        """The width whose share of removed weights (or of directions) is nearest to the task's sparsity."""
        model = task.model
        num_layers, full_size, dense = (
            len(decoder_layers(model)),
            model.config.hidden_size,
            block_linear_parameters(model),
        )

        def removed(size: int) -> float:
            if self.budget == "slicing":
                return 1.0 - size / full_size
            return 1.0 - sliced_parameters(model, self.stream_sizes(size, num_layers, full_size)) / dense

        candidates = range(self.multiple, full_size + 1, self.multiple)
        if not candidates:
            raise UserError(f"slicegpt multiple={self.multiple} is larger than the model's hidden size {full_size}")
        return min(candidates, key=lambda size: abs(removed(size) - task.sparsity))

    def _slice(self, task: CompressionTask, sizes: list[int]) -> tuple[Tensors, list[dict]]:
        """All tensors of the sliced model, and the layers' reports. One folded layer lives at a time."""
        calibration, model = task.calibration, task.model
        layers, meter, prefix = decoder_layers(model), calibration.meter, calibration.family.layers
        sliced_class, dtype, full_size = layer_class(model.config), model.dtype, model.config.hidden_size
        num_tokens = calibration.tokens.num_tokens
        with meter.stage("slicing", counted=True):
            stream = Stream(
                calibration.embed(), calibration.precision, self.signal == "normalised", self.calibrate_on == "sliced"
            )
            if subtracts_mean(layers[0]):
                stream.apply(centred)
            Q, lost = stream.slice(sizes[0])
            tensors = cast({name: rotated_reader(table, Q) for name, table in folded_embeddings(model).items()}, dtype)
            reports = []
            for index in calibration.progress.track(range(len(layers)), "rotate and slice", unit="layer"):
                folded = folded_layer(sliced_class, layers[index])
                runnable = runnable_layer(model, index, folded)
                advance(stream.hidden, index, runnable.attention_block)
                Q_mlp, lost_mlp = stream.slice(sizes[2 * index + 1])
                advance(stream.hidden, index, lambda x, **_: runnable.mlp_block(x))
                if index + 1 < len(layers) or self.slice_head:
                    Q_out, lost_out = stream.slice(sizes[2 * index + 2])
                else:
                    Q_out, lost_out = torch.eye(full_size, dtype=torch.float64, device=model.device), 0.0
                sliced = sliced_layer(sliced_class, folded, Q, Q_mlp, Q_out)
                tensors |= {f"{prefix}.{index}.{name}": tensor for name, tensor in cast(sliced, dtype).items()}
                ranks = {"attention_input": sizes[2 * index], "mlp_input": sizes[2 * index + 1]}
                reports.append(
                    {"index": index, "ranks": ranks, "relative_error": {"attention_input": lost, "mlp_input": lost_mlp}}
                )
                Q, lost = Q_out, lost_out
            W, b = folded_head(model)
            head = {"lm_head.weight": rotated_reader(W, Q)} | ({} if b is None else {"lm_head.bias": b})
        meter.forward_passes += 1
        meter.calibration_tokens = num_tokens
        return tensors | cast(head, dtype), reports


@dataclass
class Stream:
    """The folded network's residual stream on the calibration tokens, in the dense model's basis.

    Slicing is a projection here, ``x Q Q^T``: the norms that read it see the same length, so the network
    that runs on it is the sliced one, seen in another basis.
    """

    hidden: HiddenStates
    precision: torch.dtype
    normalised: bool
    follow: bool

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        self.hidden.batches[:] = [function(x) for x in self.hidden.batches]

    def slice(self, size: int) -> tuple[Tensor, float]:
        """The ``size`` principal axes (d_h, size) of the stream here, and the share of its energy they leave out.

        Where the axes are to follow the sliced network, the stream is projected onto them.
        """
        width, device = self.hidden.batches[0].shape[-1], self.hidden.batches[0].device
        moment = SecondMoment.zeros(1, width, device=device, precision=self.precision)
        for x in self.hidden.batches:
            rows = x.flatten(0, 1)
            moment.update(
                (nn.functional.normalize(rows.to(self.precision), dim=-1) if self.normalised else rows).unsqueeze(1)
            )
        energies, Q = principal_axes(moment.value.squeeze(0))
        Q = Q[:, :size]
        if self.follow:
            self.apply(lambda x: projected(x, Q.to(x.dtype)))
        return Q, lost_energy(energies, size)


def sliced_parameters(model: nn.Module, sizes: list[int]) -> int:
    """Block-linear weights of ``model`` once sliced to the stream widths ``sizes``, shortcuts included."""
    sliced_class, total = layer_class(model.config), 0
    for index, layer in enumerate(decoder_layers(model)):
        linear = layer.get_submodule
        attention = (
            sum(linear(path).out_features for path in sliced_class.attention_readers),
            linear(sliced_class.attention_writer).in_features,
        )
        mlp = (
            sum(linear(path).out_features for path in sliced_class.mlp_readers),
            linear(sliced_class.mlp_writer).in_features,
        )
        total += layer_parameters(attention, mlp, sizes[2 * index : 2 * index + 3])
    return total
