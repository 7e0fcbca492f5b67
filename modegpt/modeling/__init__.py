"""The compressed model as a Hugging Face checkpoint.

Importing this package registers the classes with ``AutoConfig`` and ``AutoModelForCausalLM``, and
makes ``save_pretrained`` put their modeling file beside the weights.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from modegpt.modeling import modeling_modegpt, modeling_sliced

for _model in (*modeling_modegpt.MODELS, *modeling_sliced.MODELS):
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModelForCausalLM.register(_model.config_class, _model)
    _model.config_class.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForCausalLM")
