"""Every compression method by name, made from the configuration."""

from dataclasses import fields, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from modegpt.allocation.policies import POLICIES, Uniform
from modegpt.config import CompressionConfig, RankMultiple, RunConfig, build, unknown
from modegpt.decompositions import MLP_VARIANTS, QUERY_KEY_VARIANTS, VALUE_OUTPUT_VARIANTS
from modegpt.decompositions.modules import Variant
from modegpt.errors import UserError
from modegpt.methods.asvd import ASVD
from modegpt.methods.base import Method
from modegpt.methods.flap import FLAP
from modegpt.methods.llm_pruner import LLMPruner
from modegpt.methods.llm_surgeon import LLMSurgeon
from modegpt.methods.modegpt import MODULES, MoDeGPT
from modegpt.methods.multiples import preferred_multiples
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.methods.shortgpt import ShortGPT
from modegpt.methods.sleb import SLEB
from modegpt.methods.slicegpt import SliceGPT
from modegpt.methods.svd import SVD
from modegpt.methods.svd_llm import SVDLLM

VARIANTS: dict[str, dict[str, type[Variant]]] = {
    "mlp": MLP_VARIANTS,
    "query_key": QUERY_KEY_VARIANTS,
    "value_output": VALUE_OUTPUT_VARIANTS,
}
BASELINES: dict[str, type[Method]] = {
    "svd": SVD,
    "asvd": ASVD,
    "svd_llm": SVDLLM,
    "slicegpt": SliceGPT,
    "shortgpt": ShortGPT,
    "sleb": SLEB,
    "flap": FLAP,
    "llm_pruner": LLMPruner,
    "llm_surgeon": LLMSurgeon,
}
CONTROLS = ("random", "magnitude")
"""Methods that cut every module by a control criterion, uniformly over layers; ``random`` is "uniform" in the paper's tables."""
SHARED = ("modegpt", *CONTROLS)
"""Methods that several processes can share, because all they ask of the data is statistics that are sums."""
UNNAMED = (("fisher", []), ("temperature", False))
"""Options that an identity does not name at these values, because runs from before there were such options did the same."""
METHODS = ("dense", "modegpt", "modegpt_plus", *CONTROLS, *BASELINES)


def make_method(config: RunConfig) -> Method | None:
    """The method that ``config`` describes; None where it only scores the dense model.

    Raises UserError for unknown names or options, and for options that the method would ignore.
    """
    name = config.method.get("name")
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    if name == "dense":
        return None
    if name in BASELINES:
        _refuse_ignored(config.compression, name, keep=("sparsity",))
        return build(BASELINES, config.method, "method")
    if name != "modegpt_plus" and (unused := sorted(config.method.keys() - {"name"})):
        raise UserError(f"method.{unused[0]}: {name} has no options")
    common = {
        "module_sparsity": dict(vars(config.compression.module_sparsity)),
        "rank_multiple": dict(vars(config.compression.rank_multiple)),
        "budget": config.compression.budget,
        "skip_layers": tuple(config.compression.skip_layers),
    }
    if name == "modegpt_plus":
        if config.compression.layer_sparsity is not None:
            raise UserError(f"compression.layer_sparsity has no effect with method={name}; leave it out")
        if taken := sorted(config.method.keys() & common.keys()):
            raise UserError(f"method.{taken[0]} is not known: it is an option of compression, compression.{taken[0]}")
        return build({name: MoDeGPTPlus}, config.method | common, "method")
    if name in CONTROLS:
        return MoDeGPT(**{module: VARIANTS[module][name]() for module in MODULES}, allocation=Uniform(), **common)
    allocation = dict(config.allocation)
    if allocation.get("name") == "explicit":
        if config.compression.layer_sparsity is None:
            raise UserError("allocation=explicit needs compression.layer_sparsity=[...], one sparsity a layer")
        allocation["values"] = config.compression.layer_sparsity
    elif config.compression.layer_sparsity is not None:
        raise UserError(
            f"compression.layer_sparsity has no effect with allocation={allocation.get('name')}; use allocation=explicit"
        )
    return MoDeGPT(
        **{module: _variant(config, module) for module in MODULES},
        allocation=build(POLICIES, allocation, "allocation"),
        **common,
    )


def settled(config: RunConfig, *, device: str | torch.device, model_config: PreTrainedConfig) -> RunConfig:
    """``config`` with what it leaves to the device and the model decided; the same where the method asks for no ranks."""
    if config.method["name"] in ("dense", *BASELINES):
        return config
    given = {
        module: multiple for module, multiple in vars(config.compression.rank_multiple).items() if multiple is not None
    }
    multiples = RankMultiple(**preferred_multiples(device, model_config) | given)
    return replace(config, compression=replace(config.compression, rank_multiple=multiples))


def _variant(config: RunConfig, module: str) -> Variant | None:
    options = getattr(config.decomposition, module)
    if options.get("name") == "none":
        return None
    choices = VARIANTS[module]
    if options.get("name") not in choices:
        raise unknown(f"decomposition/{module}", options.get("name"), [*choices, "none"])
    return build(choices, options, f"decomposition.{module}")


def _refuse_ignored(given: CompressionConfig, method: str, *, keep: tuple[str, ...]) -> None:
    default = CompressionConfig()
    for option in fields(CompressionConfig):
        if option.name not in keep and getattr(given, option.name) != getattr(default, option.name):
            raise UserError(f"compression.{option.name} has no effect with method={method}; leave it out")


def decides(config: RunConfig) -> dict[str, Any]:
    """The part of the configuration that decides what the method does."""
    name = config.method["name"]
    if name == "dense":
        return {"method": {"name": "dense"}}
    chosen: dict[str, Any] = {
        "method": {key: value for key, value in config.method.items() if (key, value) not in UNNAMED},
        "seed": config.seed,
    }
    if name in BASELINES:
        return chosen | {"compression": {"sparsity": config.compression.sparsity}}
    chosen["compression"] = {
        "sparsity": config.compression.sparsity,
        "module_sparsity": dict(vars(config.compression.module_sparsity)),
        "rank_multiple": dict(vars(config.compression.rank_multiple)),
        "budget": config.compression.budget,
        "skip_layers": list(config.compression.skip_layers),
        "layer_sparsity": config.compression.layer_sparsity,
    }
    if name == "modegpt":
        chosen |= {
            "decomposition": {module: dict(getattr(config.decomposition, module)) for module in MODULES},
            "allocation": dict(config.allocation),
        }
    return chosen
