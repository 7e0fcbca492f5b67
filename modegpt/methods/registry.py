"""Every compression method by name, made from the configuration."""

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from modegpt.config import RankMultiple, RunConfig, unknown
from modegpt.methods.asvd import ASVD
from modegpt.methods.base import Method
from modegpt.methods.controls import Magnitude, Random
from modegpt.methods.flap import FLAP
from modegpt.methods.lems import LEMS
from modegpt.methods.llm_pruner import LLMPruner
from modegpt.methods.llm_surgeon import LLMSurgeon
from modegpt.methods.modegpt import MoDeGPT
from modegpt.methods.multiples import preferred_multiples
from modegpt.methods.obc import StructuredOBC
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.methods.shortgpt import ShortGPT
from modegpt.methods.sleb import SLEB
from modegpt.methods.slicegpt import SliceGPT
from modegpt.methods.slimgpt import SlimGPT
from modegpt.methods.svd import SVD
from modegpt.methods.svd_llm import SVDLLM
from modegpt.methods.two_stage import TwoStage
from modegpt.methods.tyr import Tyr
from modegpt.models import Family

DENSE = "dense"
"""What stands in a method's place where a run only scores the dense model."""
METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        MoDeGPT,
        MoDeGPTPlus,
        Random,
        Magnitude,
        SVD,
        ASVD,
        SVDLLM,
        LEMS,
        SliceGPT,
        ShortGPT,
        SLEB,
        FLAP,
        LLMPruner,
        LLMSurgeon,
        StructuredOBC,
        SlimGPT,
        Tyr,
        TwoStage,
    )
}


def make_method(config: RunConfig) -> Method | None:
    """The method that ``config`` describes; None where it only scores the dense model.

    Raises UserError for unknown names or options, and for options that the method would ignore.
    """
    name = config.method.get("name")
    if name == DENSE:
        return None
    if name not in METHODS:
        raise unknown("method", name, [DENSE, *METHODS])
    return METHODS[name].configured(
        config.method,
        compression=config.compression,
        decomposition=config.decomposition,
        allocation=config.allocation,
    )


def settled(config: RunConfig, *, device: str | torch.device, model_config: PreTrainedConfig) -> RunConfig:
    """``config`` with what it leaves to the method, the device and the model decided: what a record shows."""
    method = make_method(config)
    if method is None:
        return config
    config = replace(config, **method.choices())
    if "rank_multiple" not in method.reads:
        return config
    given = {
        module: multiple for module, multiple in vars(config.compression.rank_multiple).items() if multiple is not None
    }
    multiples = RankMultiple(**preferred_multiples(device, model_config) | given)
    return replace(config, compression=replace(config.compression, rank_multiple=multiples))


def decides(config: RunConfig, family: Family | None = None) -> dict[str, Any]:
    """The part of the configuration that decides what the method does, to a model of ``family`` where one is named."""
    method = make_method(config)
    if method is None:
        return {"method": {"name": DENSE}}
    return method.identity(sparsity=config.compression.sparsity, seed=config.seed, family=family)
