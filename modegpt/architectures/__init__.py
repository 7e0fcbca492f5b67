"""The only place that knows Hugging Face names: families, weights by role, sizes, and building a compressed model."""

from modegpt.architectures.build import build_compressed, build_layer, empty_compressed, merged_tensors, unfused
from modegpt.architectures.families import FAMILIES, Family, family_of
from modegpt.architectures.shapes import LayerShape, compressed_config, dense_shape, is_compressed, layer_shapes
from modegpt.architectures.weights import block_linear_parameters, decoder_layers, layer_tensors
from modegpt.architectures.weights import read_mlp, read_query_key, read_value_output

__all__ = [
    "FAMILIES",
    "Family",
    "LayerShape",
    "block_linear_parameters",
    "build_compressed",
    "build_layer",
    "compressed_config",
    "decoder_layers",
    "dense_shape",
    "empty_compressed",
    "family_of",
    "is_compressed",
    "layer_shapes",
    "layer_tensors",
    "merged_tensors",
    "read_mlp",
    "read_query_key",
    "read_value_output",
    "unfused",
]
