"""The configuration of a Llama whose MLPs differ in width, as engines with a DeciLM class (nemotron-nas) read it.

Self-contained on purpose: a checkpoint carries a copy of this file, because Transformers has no such configuration.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig


class Block(dict):
    """A part of a layer; its keys are attributes too, as the engines want them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@strict
class DeciLMConfig(LlamaConfig):
    """``block_configs`` has an entry for each layer.

    ``attention`` has ``n_heads_in_group``, ``ffn`` has ``ffn_mult`` or ``intermediate_size``, and both say with
    ``no_op`` that the layer has none.
    """

    model_type = "nemotron-nas"
    block_configs: list[dict] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.block_configs = [
            Block({name: Block(part) for name, part in block.items()}) for block in self.block_configs or []
        ]


DeciLMConfig.register_for_auto_class()
