"""A finished run as a record (see ``records/schema.py``)."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from modegpt.config import RunConfig
from modegpt.data.tokens import CalibrationTokens
from modegpt.evaluation.evaluate import retention
from modegpt.methods.base import Compressed
from modegpt.models import block_linear_parameters, decoder_layers, dense_shape, family_of
from modegpt.records.paths import portable
from modegpt.records.provenance import provenance
from modegpt.records.store import timestamp

if TYPE_CHECKING:
    from modegpt.run import Run


def make_record(
    run: "Run",
    compressed: Compressed | None,
    dense: dict[str, dict],
    scores: dict[str, dict] | None,
    speeds: dict[str, Any] | None,
) -> dict[str, Any]:
    """The run as a record (see ``records/schema.py``)."""
    config = run.config
    limited = config.evaluation.zeroshot is not None and config.evaluation.zeroshot.limit is not None
    kept = {"zeroshot": {}, "perplexity_increase": {}} if scores is None else retention(dense, scores)
    return {
        "identity": {"decides": run.decides},
        "name": run.name,
        "experiment": config.output.experiment,
        "created": timestamp(),
        "command": portable(run.command),
        "config": portable(asdict(config)),
        "seeds": {"seed": config.seed, "calibration": config.calibration.seed},
        "provenance": provenance(),
        "model": {
            "name": model_name(config),
            "path": portable(config.model.path),
            "family": family_of(run.model.config).model_type,
            "weights_sha256": run.weights_sha256,
            "tokenizer_sha256": run.tokenizer_sha256,
            "num_parameters": run.model.num_parameters(),
            "block_linear_parameters": block_linear_parameters(run.model),
            "dtype": str(run.model.dtype).removeprefix("torch."),
        },
        "calibration": run.task and calibration_record(config, run.task.calibration.tokens),
        "compression": compressed and compression_record(run, compressed),
        "metrics": {
            "dense": dense,
            "compressed": scores,
            "retention": kept["zeroshot"],
            "perplexity_increase": kept["perplexity_increase"],
            "limited": limited,
            **({} if speeds is None else {"throughput": speeds}),
        },
        "cost": run.meter.summary(),
    }


def calibration_record(config: RunConfig, tokens: CalibrationTokens) -> dict[str, Any]:
    """Which tokens the method saw."""
    return {
        "source": config.calibration.source,
        "num_samples": tokens.ids.shape[0],
        "sequence_length": tokens.ids.shape[1],
        "seed": config.calibration.seed,
        "num_tokens": tokens.num_tokens,
        "tokens_sha256": tokens.sha256,
        "stream_tokens": tokens.stream_tokens,
    }


def compression_record(run: "Run", compressed: Compressed) -> dict[str, Any]:
    """What was removed: shares of the block-linear weights and of the whole model, layer by layer."""
    shape = dense_shape(run.model.config)
    sparsities = layer_sparsities(run.model, compressed.model)
    reports = {report["index"]: report for report in compressed.layers}
    layers = [
        {"index": index, "sparsity": sparsity, "ranks": {}, "relative_error": {}, "numerics": {}}
        | reports.get(index, {})
        for index, sparsity in enumerate(sparsities)
    ]
    return {
        "method": run.config.method["name"],
        "target_sparsity": run.config.compression.sparsity,
        "achieved_sparsity": 1 - block_linear_parameters(compressed.model) / block_linear_parameters(run.model),
        "whole_model_sparsity": 1 - compressed.model.num_parameters() / run.model.num_parameters(),
        "num_parameters": compressed.model.num_parameters(),
        "full_ranks": {
            "mlp": shape.intermediate_size,
            "query_key": shape.qk_head_dim,
            "value_output": shape.v_head_dim,
        },
        "influence": compressed.influence,
        "layers": layers,
        "details": compressed.details,
    } | ({} if compressed.recovery is None else {"recovery": compressed.recovery})


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


def model_name(config: RunConfig) -> str:
    """The model's short name: as configured, else the last part of its path."""
    name = config.model.name or config.model.path or "model"
    return name.rstrip("/").rpartition("/")[2]
