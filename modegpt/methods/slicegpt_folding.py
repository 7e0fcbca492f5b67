"""Between a dense model's tensors and a sliced model's: norms folded, weights rotated, the model put together."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from modegpt.errors import UserError
from modegpt.methods.slicegpt_rotation import centred, fold_norm, rotated_reader, rotated_writer, shortcut
from modegpt.models import family_of
from modegpt.models.families import SLICED
from modegpt.models.modeling_sliced import MODELS

SLICED_MODELS = {model.config_class.model_type.removeprefix(SLICED): model for model in MODELS}
"""The sliced model class of each family."""

Tensors = dict[str, Tensor]


def check_sliceable(model: PreTrainedModel) -> None:
    """Raises UserError when the norms of ``model`` do not all read the residual stream itself, or it is no stock model."""
    config = model.config
    if config.model_type not in SLICED_MODELS:
        raise UserError(
            f"slicegpt starts from a dense model of {', '.join(SLICED_MODELS)}; this one is {config.model_type!r}"
        )
    if not getattr(config, "do_layer_norm_before", True) or getattr(config, "_remove_final_layer_norm", False):
        raise UserError(
            "slicegpt needs a norm in front of every block and the head; this OPT normalises after its blocks (do_layer_norm_before=false)"
        )
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        raise UserError(
            f"slicegpt needs embeddings as wide as hidden_size={config.hidden_size}; word_embed_proj_dim is {config.word_embed_proj_dim}"
        )


def sliced_config(config: PreTrainedConfig, stream_sizes: list[int] | None = None) -> PreTrainedConfig:
    """The configuration of a dense ``config`` sliced to ``stream_sizes`` (None: full width everywhere)."""
    model_class = SLICED_MODELS[config.model_type]
    fields = config.to_dict()
    for stale in ("model_type", "architectures", "auto_map", "transformers_version"):
        fields.pop(stale, None)
    fields |= {"stream_sizes": stream_sizes, "tie_word_embeddings": False}
    sliced = model_class.config_class(**fields, architectures=[model_class.__name__])
    sliced._attn_implementation = config._attn_implementation
    return sliced


def layer_class(config: PreTrainedConfig) -> type[nn.Module]:
    """The sliced decoder layer class for a dense ``config``."""
    return SLICED_MODELS[config.model_type].layer_class


def folded_layer(sliced_class: type[nn.Module], layer: nn.Module) -> Tensors:
    """The tensors of a dense ``layer`` with its norms folded into its linears, float64, shortcuts left out.

    LayerNorm's mean subtraction goes into the writers, so the stream has mean zero (section 3.2).
    """
    tensors = {
        name: tensor.to(torch.float64)
        for name, tensor in layer.state_dict().items()
        if name.partition(".")[0] not in sliced_class.norms
    }
    for name, readers in zip(
        sliced_class.norms, (sliced_class.attention_readers, sliced_class.mlp_readers), strict=True
    ):
        scale, shift = norm_tensors(getattr(layer, name), layer.get_submodule(readers[0]).weight.device)
        for path in readers:
            _put(tensors, path, *fold_norm(*_get(tensors, path), scale, shift))
    if subtracts_mean(layer):
        for path in (sliced_class.attention_writer, sliced_class.mlp_writer):
            weight, bias = _get(tensors, path)
            _put(tensors, path, centred(weight.T).T, None if bias is None else centred(bias))
    return tensors


def folded_embeddings(model: PreTrainedModel) -> Tensors:
    """Every embedding table that is added up to the first layer's input, float64, by its name in the model."""
    decoder, prefix = model.get_decoder(), family_of(model.config).layers.rpartition(".")[0]
    embeddings = {name: module for name, module in decoder.named_children() if isinstance(module, nn.Embedding)}
    tables = {f"{prefix}.{name}.weight": module.weight.to(torch.float64) for name, module in embeddings.items()}
    return {name: centred(table) for name, table in tables.items()} if subtracts_mean(decoder.layers[0]) else tables


def folded_head(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """The head's weight (vocabulary, d_h) and bias with the final norm folded in, float64."""
    norm = getattr(model.get_decoder(), SLICED_MODELS[model.config.model_type].final_norm)
    return fold_norm(model.lm_head.weight.to(torch.float64), None, *norm_tensors(norm, model.device))


def norm_tensors(norm: nn.Module, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift (d_h,) of a norm, float64; None where it has none. A LayerNorm always has a shift, if of zeros."""
    scale, shift = (
        None if tensor is None else tensor.detach().to(torch.float64)
        for tensor in (norm.weight, getattr(norm, "bias", None))
    )
    if isinstance(norm, nn.LayerNorm) and shift is None:
        shift = torch.zeros(norm.normalized_shape, dtype=torch.float64, device=device)
    return scale, shift


def subtracts_mean(layer: nn.Module) -> bool:
    """Whether the norms of a dense ``layer`` are LayerNorm rather than RMSNorm."""
    return any(isinstance(module, nn.LayerNorm) for module in layer.children())


def sliced_layer(
    sliced_class: type[nn.Module], folded: Mapping[str, Tensor], Q_attention: Tensor, Q_mlp: Tensor, Q_out: Tensor
) -> Tensors:
    """A folded layer in the axes of its attention's input, its MLP's input and the next layer's, (d_h, k) each."""
    tensors = dict(folded)
    blocks = (
        (sliced_class.attention_readers, sliced_class.attention_writer, "attention_shortcut", Q_attention, Q_mlp),
        (sliced_class.mlp_readers, sliced_class.mlp_writer, "mlp_shortcut", Q_mlp, Q_out),
    )
    for readers, writer, name, Q_in, Q_next in blocks:
        for path in readers:
            tensors[f"{path}.weight"] = rotated_reader(folded[f"{path}.weight"], Q_in)
        _put(tensors, writer, *rotated_writer(*_get(folded, writer), Q_next))
        tensors[f"{name}.weight"] = shortcut(Q_in, Q_next)
    return tensors


def runnable_layer(model: PreTrainedModel, index: int, folded: Mapping[str, Tensor]) -> nn.Module:
    """A folded layer at full width, in the dense model's basis, dtype and attention implementation."""
    config = sliced_config(model.config)
    with torch.device("meta"):
        layer = layer_class(model.config)(config, index)
    eye = torch.eye(config.hidden_size, device=model.device)
    tensors = dict(folded) | {"attention_shortcut.weight": eye, "mlp_shortcut.weight": eye}
    layer.load_state_dict(cast(tensors, model.dtype), strict=True, assign=True)
    return layer.requires_grad_(False).eval()


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensors:
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def assemble(model: PreTrainedModel, stream_sizes: list[int], tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """The sliced model made of ``tensors`` (all of them, by name), with the settings of the dense ``model``.

    Raises:
        RuntimeError: tensors that do not fit ``stream_sizes`` exactly.
    """
    config = sliced_config(model.config, stream_sizes)
    with torch.device("meta"):
        sliced = SLICED_MODELS[model.config.model_type](config)
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
