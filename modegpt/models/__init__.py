"""The only place that knows Hugging Face names: families, weights by role, sizes, compressed models, checkpoints.

Importing this package registers the compressed classes with ``AutoConfig`` and ``AutoModelForCausalLM``, and makes
``save_pretrained`` put their modeling file, and the report that a model carries, beside the weights.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from modegpt.models import modeling_modegpt, modeling_sliced
from modegpt.models.build import (
    build_compressed,
    build_layer,
    empty_compressed,
    merged_tensors,
    random_compressed,
    unfused,
)
from modegpt.models.families import FAMILIES, Family, family_of
from modegpt.models.saving import carries_report
from modegpt.models.shapes import (
    LayerShape,
    cache_bytes_per_token,
    compressed_config,
    dense_shape,
    is_compressed,
    layer_shapes,
)
from modegpt.models.weights import (
    block_linear_parameters,
    decoder_layers,
    gained,
    layer_tensors,
    output_gain,
    read_mlp,
    read_mlps,
    read_query_key,
    read_value_output,
    rotary_frequencies,
    ungained,
)

for _model in (*modeling_modegpt.MODELS, *modeling_sliced.MODELS):
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModelForCausalLM.register(_model.config_class, _model)
    _model.config_class.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForCausalLM")
    carries_report(_model)

__all__ = [
    "FAMILIES",
    "Family",
    "LayerShape",
    "block_linear_parameters",
    "build_compressed",
    "build_layer",
    "cache_bytes_per_token",
    "compressed_config",
    "decoder_layers",
    "dense_shape",
    "empty_compressed",
    "family_of",
    "gained",
    "is_compressed",
    "layer_shapes",
    "layer_tensors",
    "merged_tensors",
    "output_gain",
    "random_compressed",
    "read_mlp",
    "read_mlps",
    "read_query_key",
    "read_value_output",
    "rotary_frequencies",
    "unfused",
    "ungained",
]
