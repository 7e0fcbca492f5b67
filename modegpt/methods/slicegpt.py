"""SliceGPT: rotate the residual stream to its principal axes, block by block, and delete the last of them.

Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", ICLR 2024, section 3. First
the method, then the maths on tensors, then the way from a dense model's tensors to a sliced model's.

Weights in the maths are as ``nn.Linear`` stores them, (out, in) for ``y = x weight^T + bias``. A *reader* takes the
residual stream (in = d_h) after a norm, a *writer* adds to it (out = d_h). ``Q`` (d_h, k) holds the orthonormal axes,
as columns, in which a block's input is kept.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from modegpt.calibration.moments import SecondMoment
from modegpt.calibration.stream import HiddenStates, advance
from modegpt.errors import UserError
from modegpt.methods.base import Compressed, CompressionTask, Method
from modegpt.models import Family, block_linear_parameters, decoder_layers, family_of, is_compressed
from modegpt.models.families import SLICED, family_name
from modegpt.models.modeling_modegpt import CompressedFields
from modegpt.models.modeling_sliced import MODELS

SLICED_MODELS = {model.config_class.model_type.removeprefix(SLICED): model for model in MODELS}
"""The sliced model class of each family."""

Tensors = dict[str, Tensor]

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

    Run beside the authors' code (microsoft/TransformerCompression) on the same tokens: without its change of the
    embeddings the logits of SmolLM2-135M at 30 % differ by 4e-9 nats of divergence. Differs from it in two ways. It
    takes the mean off the embeddings of RMSNorm models too, which changes the dense model before anything is sliced and
    the perplexity by 0.5 % (228.3, ours 229.4); here only LayerNorm's mean goes into the weights, where that is exact.
    It adds damping to the Gram matrices, which moves no eigenvector.
    """

    name: ClassVar[str] = "slicegpt"
    experts: ClassVar[bool] = True

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
        """Only families that have a sliced model."""
        if family.model_type not in SLICED_MODELS:
            return f"slicegpt has a sliced model for {', '.join(SLICED_MODELS)}, not for {family.model_type}"
        return None

    @torch.no_grad()
    def compress(self, task: CompressionTask) -> Compressed:
        """Rotate and slice the stream block by block."""
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
            "shortcut_parameters": sum(a * b for a, b in pairwise(sizes)),
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
        dtype, full_size = model.dtype, model.config.hidden_size
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
                folded = folded_layer(model.config, layers[index])
                runnable = runnable_layer(model, index, folded)
                advance(stream.hidden, index, runnable.attention_block)
                Q_mlp, lost_mlp = stream.slice(sizes[2 * index + 1])
                advance(stream.hidden, index, lambda x, block=runnable.mlp_block, **_: block(x))
                if index + 1 < len(layers) or self.slice_head:
                    Q_out, lost_out = stream.slice(sizes[2 * index + 2])
                else:
                    Q_out, lost_out = torch.eye(full_size, dtype=torch.float64, device=model.device), 0.0
                sliced = sliced_layer(model.config, folded, Q, Q_mlp, Q_out)
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
        """Put ``function`` of every batch in its place."""
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


def sliced_parameters(model: PreTrainedModel, sizes: list[int]) -> int:
    """Block-linear weights of ``model`` once sliced to the stream widths ``sizes``, shortcuts included."""
    sliced_class, total = layer_class(model.config), 0
    for index, layer in enumerate(decoder_layers(model)):
        linear: Any = layer.get_submodule
        attention, mlp = (
            (
                sum(linear(path).out_features for path in readers if path != sliced_class.router),
                sum(linear(path).in_features for path in writers),
            )
            for readers, writers, _ in sliced_class.blocks(model.config)
        )
        total += layer_parameters(attention, mlp, sizes[2 * index : 2 * index + 3])
    return total


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
    """What carries a residual connection from the axes ``Q_in`` (d_h, k) to ``Q_out`` (d_h, k'), as a weight (k', k).

    Section 3.3.
    """
    return Q_out.T @ Q_in


def layer_parameters(attention: tuple[int, int], mlp: tuple[int, int], sizes: Sequence[int]) -> int:
    """Weights of one sliced layer, its two shortcuts included.

    Args:
        attention, mlp: of each block, rows of all its readers together and columns of its writers.
        sizes: stream width entering the attention, entering the MLP, leaving the layer.
    """
    blocks = ((*attention, sizes[0], sizes[1]), (*mlp, sizes[1], sizes[2]))
    return sum(rows * size_in + columns * size_out + size_in * size_out for rows, columns, size_in, size_out in blocks)


def check_sliceable(model: PreTrainedModel) -> None:
    """Raise UserError when a norm of ``model`` does not read the residual stream itself, or it is no stock model."""
    config = model.config
    if family_name(config) not in SLICED_MODELS or is_compressed(config):
        raise UserError(
            f"slicegpt starts from a dense model of {', '.join(SLICED_MODELS)}; this one is {config.model_type!r}"
        )
    if not getattr(config, "do_layer_norm_before", True) or getattr(config, "_remove_final_layer_norm", False):
        raise UserError(
            "slicegpt needs a norm in front of every block and the head; this OPT normalises after its blocks "
            "(do_layer_norm_before=false)"
        )
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        raise UserError(
            f"slicegpt needs embeddings as wide as hidden_size={config.hidden_size}; "
            f"word_embed_proj_dim is {config.word_embed_proj_dim}"
        )


def sliced_config(config: PreTrainedConfig, stream_sizes: list[int] | None = None) -> PreTrainedConfig:
    """The configuration of a dense ``config`` sliced to ``stream_sizes`` (None: full width everywhere)."""
    model_class = SLICED_MODELS[family_name(config)]
    stale = {"model_type", "architectures", "auto_map", "transformers_version"}
    stale |= {field.name for field in dataclasses.fields(CompressedFields)}  # of a mixture that was taken apart
    fields = {name: value for name, value in config.to_dict().items() if name not in stale}
    fields |= {"stream_sizes": stream_sizes, "tie_word_embeddings": False}
    sliced = model_class.config_class(**fields, architectures=[model_class.__name__])
    sliced._attn_implementation = config._attn_implementation
    return sliced


def layer_class(config: PreTrainedConfig) -> Any:
    """The sliced decoder layer class for a dense ``config``."""
    return SLICED_MODELS[family_name(config)].layer_class


def folded_layer(config: PreTrainedConfig, layer: nn.Module) -> Tensors:
    """The tensors of a dense ``layer`` with its norms folded into its linears, float64, shortcuts left out.

    LayerNorm's mean subtraction goes into the writers, so the stream has mean zero (section 3.2).
    """
    sliced_class = layer_class(config)
    tensors = {
        name: tensor.to(torch.float64)
        for name, tensor in layer.state_dict().items()
        if name.partition(".")[0] not in sliced_class.norms
    }
    for name, (readers, writers, _) in zip(sliced_class.norms, sliced_class.blocks(config), strict=True):
        reader = layer.get_submodule(readers[0])
        scale, shift = norm_tensors(getattr(layer, name), next(reader.parameters()).device)
        for path in readers:
            _put(tensors, path, *fold_norm(*_get(tensors, path), scale, shift))
        for path in writers if subtracts_mean(layer) else ():
            weight, bias = _get(tensors, path)
            _put(tensors, path, centred(weight.T).T, None if bias is None else centred(bias))
    return tensors


def folded_embeddings(model: PreTrainedModel) -> Tensors:
    """Every embedding table that is added up to the first layer's input, float64, by its name in the model."""
    decoder: Any = model.get_decoder()
    prefix = family_of(model.config).layers.rpartition(".")[0]
    embeddings = {name: module for name, module in decoder.named_children() if isinstance(module, nn.Embedding)}
    tables = {f"{prefix}.{name}.weight": module.weight.to(torch.float64) for name, module in embeddings.items()}
    return {name: centred(table) for name, table in tables.items()} if subtracts_mean(decoder.layers[0]) else tables


def folded_head(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """The head's weight (vocabulary, d_h) and bias with the final norm folded in, float64."""
    norm = getattr(model.get_decoder(), SLICED_MODELS[family_name(model.config)].final_norm)
    head = model.get_output_embeddings()
    return fold_norm(head.weight.to(torch.float64), None, *norm_tensors(norm, model.device))


def norm_tensors(norm: nn.Module, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift (d_h,) of a norm, float64; None where it has none. A LayerNorm has a shift, if of zeros."""
    own: tuple[Any, Any] = (norm.weight, getattr(norm, "bias", None))
    scale, shift = (None if tensor is None else tensor.detach().to(torch.float64) for tensor in own)
    if isinstance(norm, nn.LayerNorm) and shift is None:
        shift = torch.zeros(norm.normalized_shape, dtype=torch.float64, device=device)
    return scale, shift


def subtracts_mean(layer: nn.Module) -> bool:
    """Whether the norms of a dense ``layer`` are LayerNorm rather than RMSNorm."""
    return any(isinstance(module, nn.LayerNorm) for module in layer.children())


def sliced_layer(
    config: PreTrainedConfig, folded: Mapping[str, Tensor], Q_attention: Tensor, Q_mlp: Tensor, Q_out: Tensor
) -> Tensors:
    """A folded layer in the axes of its attention's input, its MLP's input and the next layer's, (d_h, k) each."""
    tensors = dict(folded)
    axes = ((Q_attention, Q_mlp), (Q_mlp, Q_out))
    for (readers, writers, name), (Q_in, Q_next) in zip(layer_class(config).blocks(config), axes, strict=True):
        for path in readers:
            tensors[f"{path}.weight"] = rotated_reader(folded[f"{path}.weight"], Q_in)
        for path in writers:
            _put(tensors, path, *rotated_writer(*_get(folded, path), Q_next))
        tensors[f"{name}.weight"] = shortcut(Q_in, Q_next)
    return tensors


def runnable_layer(model: PreTrainedModel, index: int, folded: Mapping[str, Tensor]) -> Any:
    """A folded layer at full width, in the dense model's basis, dtype and attention implementation."""
    config = sliced_config(model.config)
    with torch.device("meta"):
        layer = layer_class(model.config)(config, index)
    eye = torch.eye(config.hidden_size, device=model.device)
    tensors = dict(folded) | {"attention_shortcut.weight": eye, "mlp_shortcut.weight": eye}
    layer.load_state_dict(cast(tensors, model.dtype), strict=True, assign=True)
    return layer.requires_grad_(False).eval()


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensors:
    """The tensors in ``dtype``, contiguous."""
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def assemble(model: PreTrainedModel, stream_sizes: list[int], tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """The sliced model made of ``tensors`` (all of them, by name), with the settings of the dense ``model``.

    Raises:
        RuntimeError: tensors that do not fit ``stream_sizes`` exactly.
    """
    config = sliced_config(model.config, stream_sizes)
    with torch.device("meta"):
        sliced = SLICED_MODELS[family_name(model.config)](config)
    sliced.load_state_dict(tensors, strict=True, assign=True)
    rotary = getattr(sliced.get_decoder(), "rotary_emb", None)
    if rotary is not None:
        # No state dict holds its frequencies, and a cast model's are rounded.
        sliced.get_decoder().rotary_emb = type(rotary)(config=config).to(model.device)
    sliced.generation_config = copy.deepcopy(model.generation_config)
    return sliced.train(model.training)


def _get(tensors: Mapping[str, Tensor], path: str) -> tuple[Tensor, Tensor | None]:
    return tensors[f"{path}.weight"], tensors.get(f"{path}.bias")


def _put(tensors: Tensors, path: str, weight: Tensor, bias: Tensor | None) -> None:
    tensors[f"{path}.weight"] = weight
    if bias is not None:
        tensors[f"{path}.bias"] = bias
