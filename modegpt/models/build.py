"""Making a compressed model, or one layer of it, out of tensors: no random initialisation, no copies."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from modegpt.models.families import Family, family_of, is_ours, linear_at
from modegpt.models.shapes import LayerShape, compressed_class, compressed_config, layer_shapes
from modegpt.models.weights import decoder_layers


def merged_tensors(family: Family, layer: nn.Module, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a compressed layer: those of the dense ``layer``, each map named in ``changed`` replaced whole."""
    fused = family.fused
    linears = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    replaced = {
        path
        for path in linears
        if any(name.startswith(f"{part}.") for name in changed for part in fused.get(path, (path,)))
    }
    if family.experts_path is not None and any(name.startswith(f"{family.experts_path}.") for name in changed):
        replaced.add(family.experts_path)  # where the family has those of all experts in one
    kept = {name: tensor for name, tensor in layer.state_dict().items() if name.rpartition(".")[0] not in replaced}
    return kept | dict(changed)


def unfused(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with each of its family's fused maps, and its experts, taken apart; ``model`` itself without these.

    What comes back is of this package's class for the family, at full size, and its tensors are views of ``model``'s.
    """
    family = family_of(model.config)
    if not family.taken_apart or is_ours(model.config):
        return model
    config = compressed_config(model.config)
    with torch.device("meta"):
        empty = compressed_class(config).make_layer(config, 0)
    changed: list[dict[str, Tensor]] = []
    for layer in decoder_layers(model):
        changed.append({})
        for path, parts in family.fused.items():
            rows = [empty.get_submodule(part).out_features for part in parts]
            views = linear_at(layer, path).weight.detach().split(rows)
            changed[-1] |= {f"{part}.weight": view for part, view in zip(parts, views, strict=True)}
        if family.experts_path is not None:
            changed[-1] |= _expert_views(family, layer.get_submodule(family.experts_path))
    return build_compressed(model, layer_shapes(config), changed)


def _expert_views(family: Family, experts: Any) -> dict[str, Tensor]:
    """The maps of each expert, as views of the tensors that hold those of all: gate and up (E, 2 n, d_h), down."""
    assert family.gate_path is not None, "experts are gated"
    gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
    parts = ((family.gate_path, gate), (family.up_path, up), (family.down_path, experts.down_proj.detach()))
    return {
        f"{one}.weight": view
        for path, views in parts
        for one, view in zip(family.of_experts(path, len(views)), views, strict=True)
    }


def build_layer(config: PreTrainedConfig, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Decoder layer ``index`` of the model that the compressed ``config`` describes, ready to run, sharing ``tensors``.

    ``tensors`` must be complete (see ``merged_tensors``): a missing, unexpected or misshapen one is a RuntimeError.
    """
    with torch.device("meta"):
        layer = compressed_class(config).make_layer(config, index)
    layer.load_state_dict(tensors, strict=True, assign=True)
    return layer.requires_grad_(False).eval()


def build_compressed(
    model: PreTrainedModel,
    shapes: Sequence[LayerShape],
    layer_tensors: Sequence[Mapping[str, Tensor]],
    kept_layers: Sequence[int] | None = None,
) -> PreTrainedModel:
    """The compressed model: layer ``kept_layers[j]`` of ``model`` in ``shapes[j]``, changed by ``layer_tensors[j]``.

    Untouched tensors are shared with ``model``, which stays as it is. Dtype, device, mode, attention
    implementation, generation settings and tied embeddings carry over; rotary frequencies are float32.

    Args:
        layer_tensors: per kept layer, what ``weights.layer_tensors`` returned (empty: unchanged).
        kept_layers: dense indices of the layers that stay, in order; None keeps all.

    Raises:
        RuntimeError: tensors that do not fit the shapes exactly.
    """
    compressed = empty_compressed(model, shapes, kept_layers)
    config = compressed.config
    family = family_of(config)
    prefix = family.layers
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{prefix}.")}
    dense_layers = decoder_layers(model)
    for index, (source, changed) in enumerate(zip(config.kept_layers, layer_tensors, strict=True)):
        tensors |= {
            f"{prefix}.{index}.{name}": tensor
            for name, tensor in merged_tensors(family, dense_layers[source], changed).items()
        }
    compressed.load_state_dict(tensors, strict=True, assign=True)
    compressed.tie_weights()
    restore_buffers(compressed, model)
    return compressed.train(model.training)


def empty_compressed(
    model: PreTrainedModel, shapes: Sequence[LayerShape], kept_layers: Sequence[int] | None = None
) -> PreTrainedModel:
    """The model that ``build_compressed`` fills, without data (meta tensors of ``model``'s dtype)."""
    config = compressed_config(model.config, shapes, kept_layers)
    with torch.device("meta"):
        compressed = compressed_class(config)(config)
    compressed.generation_config = copy.deepcopy(model.generation_config)
    return compressed.to(model.dtype)


def random_compressed(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> PreTrainedModel:
    """A model of these ``shapes`` to be timed: small random weights where its tensors are not the sizes of ``model``'s.

    Rotary pairs are the first one throughout.
    """
    compressed, dense, tensors = empty_compressed(model, shapes), model.state_dict(), {}
    generator = torch.Generator(model.device).manual_seed(0)
    for name, empty in compressed.state_dict().items():
        own = dense.get(name)
        if own is None or own.shape != empty.shape:
            own = torch.zeros_like(empty, device=model.device)
            if own.is_floating_point():
                own.normal_(std=0.02, generator=generator)
        tensors[name] = own
    compressed.load_state_dict(tensors, strict=True, assign=True)
    compressed.tie_weights()
    restore_buffers(compressed, model)
    return compressed.eval()


def restore_buffers(compressed: PreTrainedModel, model: PreTrainedModel) -> None:
    """Give ``compressed`` the buffers that no state dict holds, from ``model``.

    Rotary embeddings are made anew: casting a model casts their frequencies, which costs more accuracy than casting
    its weights.
    """
    rotary = getattr(compressed.get_decoder(), "rotary_emb", None)
    if rotary is not None:
        compressed.get_decoder().rotary_emb = type(rotary)(config=compressed.config).to(model.device)
    for name, buffer in compressed.named_buffers():
        if buffer.is_meta:
            owner, _, attribute = name.rpartition(".")
            setattr(compressed.get_submodule(owner), attribute, model.get_buffer(name))
