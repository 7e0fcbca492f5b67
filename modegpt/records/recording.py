"""A finished run as a record (see ``records/schema.py``): its name, what decides it, and its content."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modegpt.allocation.ranks import missed_target
from modegpt.config import PAPER, RunConfig
from modegpt.data.tokens import CalibrationTokens
from modegpt.evaluation.evaluate import retention
from modegpt.evaluation.spec import ThroughputSpec
from modegpt.methods.base import Compressed
from modegpt.methods.targets import missed
from modegpt.models import block_linear_parameters, decoder_layers, dense_shape, family_of
from modegpt.records.paths import portable
from modegpt.records.provenance import hardware, provenance
from modegpt.records.store import timestamp


def run_name(config: RunConfig, *, recovery: str | None) -> str:
    """What tells a run from its neighbours in a listing; ``recovery`` names the training, if there is one."""
    method = config.method["name"]
    parts = [model_name(config), method]
    if method == "modegpt":
        chosen = {module: getattr(config.decomposition, module)["name"] for module in PAPER}
        parts += [] if chosen == PAPER else list(chosen.values())
        parts.append(config.allocation["name"])
    if method != "dense":
        parts += [config.compression.engine] if config.compression.engine != "any" else []
        parts += [f"s{100 * config.compression.sparsity:g}", f"seed{config.calibration.seed}"]
    return "-".join([*parts, recovery] if recovery else parts)


def model_name(config: RunConfig) -> str:
    """The model's short name: as configured, else the last part of its path."""
    name = config.model.name or config.model.path or "model"
    return name.rstrip("/").rpartition("/")[2]


def speed_decides(spec: ThroughputSpec, device: str) -> dict[str, Any]:
    """What speeds depend on beside the model: how they are measured, and on which machine."""
    parts, place = hardware(), torch.device(device)
    processor = parts["gpus"][place.index or 0]["name"] if place.type == "cuda" else parts["cpu"]
    return asdict(spec) | {"device": processor, "num_threads": parts["num_threads"]}


def make_record(
    config: RunConfig,
    *,
    command: str,
    name: str,
    decides: Mapping[str, Any],
    model: PreTrainedModel,
    tokens: CalibrationTokens | None,
    compressed: Compressed | None,
    dense_scores: dict[str, dict[str, Any]],
    compressed_scores: dict[str, dict[str, Any]] | None,
    speeds: dict[str, Any] | None,
    cost: dict[str, Any],
    commits: Mapping[str, str],
) -> dict[str, Any]:
    """The record of a run.

    Args:
        decides: everything that decides the result, see ``store.identity``.
        model: the dense model.
        tokens: what the method was calibrated on; None without a method, as ``compressed`` and ``compressed_scores``.
        cost: ``CostMeter.summary``.
        commits: of the hub's repositories that model and data are from; no part of the identity, which has the content.
    """
    asked = (config.evaluation.zeroshot, config.evaluation.perplexity)
    kept: dict[str, dict[str, Any]] = {"zeroshot": {}, "perplexity_increase": {}}
    if compressed_scores is not None:
        kept = retention(dense_scores, compressed_scores)
    return {
        "identity": {"decides": decides},
        "name": name,
        "experiment": config.output.experiment,
        "created": timestamp(),
        "command": shlex.join(portable(shlex.split(command))),
        "config": portable(asdict(config)),
        "seeds": {"seed": config.seed, "calibration": config.calibration.seed},
        "provenance": provenance() | ({"hub": dict(commits)} if commits else {}),
        "model": {
            "name": model_name(config),
            "path": portable(config.model.path),
            "weights_sha256": decides["model"]["weights_sha256"],
            "tokenizer_sha256": decides["model"]["tokenizer_sha256"],
        }
        | model_facts(model),
        "calibration": None
        if tokens is None
        else calibration_facts(tokens, source=config.calibration.source, seed=config.calibration.seed),
        "compression": None
        if compressed is None
        else compression_facts(
            model,
            compressed,
            method=config.method["name"],
            target_sparsity=config.compression.sparsity,
        ),
        "metrics": {
            "dense": dense_scores,
            "compressed": compressed_scores,
            "retention": kept["zeroshot"],
            "perplexity_increase": kept["perplexity_increase"],
            "limited": any(spec is not None and spec.limit is not None for spec in asked),
            **({} if speeds is None else {"throughput": speeds}),
        },
        "cost": cost,
    }


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    """What the dense model is."""
    return {
        "family": family_of(model.config).model_type,
        "num_parameters": model.num_parameters(),
        "block_linear_parameters": block_linear_parameters(model),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def calibration_facts(tokens: CalibrationTokens, *, source: str, seed: int) -> dict[str, Any]:
    """Which tokens the method saw."""
    return {
        "source": source,
        "num_samples": tokens.ids.shape[0],
        "sequence_length": tokens.ids.shape[1],
        "seed": seed,
        "num_tokens": tokens.num_tokens,
        "tokens_sha256": tokens.sha256,
        "stream_tokens": tokens.stream_tokens,
    } | ({} if tokens.bos is None else {"bos": "each_window"})


def compression_facts(
    model: PreTrainedModel,
    compressed: Compressed,
    *,
    method: str,
    target_sparsity: float,
) -> dict[str, Any]:
    """What was removed: shares of the block-linear weights and of the whole model, layer by layer."""
    shape = dense_shape(model.config)
    sparsities = layer_sparsities(model, compressed.model)
    reports = {report["index"]: report for report in compressed.layers}
    layers = [
        {"index": index, "sparsity": sparsity, "ranks": {}, "relative_error": {}, "numerics": {}}
        | reports.get(index, {})
        for index, sparsity in enumerate(sparsities)
    ]
    achieved = 1 - block_linear_parameters(compressed.model) / block_linear_parameters(model)
    warnings = [
        *compressed.warnings,
        *filter(None, [missed_target(achieved, target_sparsity)]),
        *missed(compressed.target),
    ]
    return (
        {
            "method": method,
            "target_sparsity": target_sparsity,
            "achieved_sparsity": achieved,
            "whole_model_sparsity": 1 - compressed.model.num_parameters() / model.num_parameters(),
            "num_parameters": compressed.model.num_parameters(),
            "full_ranks": {
                "mlp": shape.intermediate_size,
                "query_key": shape.qk_head_dim,
                "value_output": shape.v_head_dim,
            },
            "influence": compressed.influence,
            "layers": layers,
            "details": compressed.details,
            **compressed.target,
        }
        | ({"warnings": warnings} if warnings else {})
        | ({} if compressed.recovery is None else {"recovery": compressed.recovery})
    )


def layer_sparsities(dense: PreTrainedModel, compressed: PreTrainedModel) -> list[float]:
    """Share of each dense layer's linear weights that is gone; 1 for a dropped layer."""

    def weights(layer: nn.Module) -> int:
        return sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim >= 2)

    left = dict(
        zip(
            getattr(compressed.config, "kept_layers", range(len(decoder_layers(dense)))),
            map(weights, decoder_layers(compressed)),
            strict=True,
        )
    )
    return [1 - left.get(index, 0) / weights(layer) for index, layer in enumerate(decoder_layers(dense))]
