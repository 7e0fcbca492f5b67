"""The compressed model as a Hugging Face checkpoint.

Importing this package registers the classes with ``AutoConfig`` and ``AutoModelForCausalLM``, and
makes ``save_pretrained`` put the modeling file beside the weights.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from modegpt.modeling.modeling_modegpt import MODELS

for _model in MODELS:
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModelForCausalLM.register(_model.config_class, _model)
    _model.config_class.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForCausalLM")
