"""A complete, valid record to test with, and one for every finger of a sweep."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from modegpt.evaluation.items import pack

TASKS = {  # task: (metric, dense, compressed)
    "easy_facts": ("acc_norm", 0.96, 0.9),
    "hard_facts": ("acc_norm", 0.9, 0.72),
    "physical": ("acc_norm", 0.85, 0.8),
    "pronouns": ("acc", 0.78, 0.75),
    "stories": ("acc_norm", 0.81, 0.78),
}
STDERR, MEAN_STDERR = {1: 0.02, 2: 0.03}, {1: 0.009, 2: 0.013}
"""By the column above: the errors of the dense and of the compressed model are never the same."""
FULL_RANKS = {"mlp": 172, "query_key": 16, "value_output": 16}
NUM_LAYERS = 6


def sample_throughput(speedup: float = 1.5) -> dict:
    """Two workloads of a dense and a compressed model, the larger batch first: ``metrics.throughput``."""
    measurements = []
    for phase, batch_size, milliseconds in (("decode", 8, 4.0), ("decode", 1, 2.0), ("prefill", 1, 64.0)):
        for model, factor in (("dense", 1.0), ("compressed", speedup)):
            seconds, tokens = milliseconds / factor / 1000, batch_size * (64 if phase == "prefill" else 1)
            entry = {
                "phase": phase,
                "batch_size": batch_size,
                "length": 64,
                "model": model,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
            }
            measurements.append(
                entry
                | {
                    "speedup": factor,
                    "ideal_speedup": 2.0 if model == "compressed" else 1.0,
                    "share_of_ideal": factor / 2,
                }
            )
    return {
        "ceiling": {"flops_per_second": 1e11, "bytes_per_second": 1e10},
        "cache_bytes_per_token": {"dense": 512, "compressed": 384},
        "measurements": measurements,
    }


def sample_record(
    *, seed: int = 0, sparsity: float = 0.3, method: str = "modegpt", dense: bool = False, **changes: Any
) -> dict:
    """What a run hands to `RecordStore.write`, as a fresh dict.

    ``seed``, ``sparsity`` and ``method`` decide the identity (and move the perplexity); ``dense`` gives a run that only
    scored the dense model; ``changes`` replace top-level keys.
    """
    decides = {
        "model": {"weights_sha256": "a" * 64},
        "method": "dense" if dense else method,
        "sparsity": sparsity,
        "seed": seed,
    }
    record: dict[str, Any] = {
        "identity": {"decides": decides},
        "name": "tiny-llama dense" if dense else f"tiny-llama {method} {sparsity:g}",
        "experiment": "demo",
        "created": "2025-01-02T03:04:05+00:00",
        "command": f"modegpt compression.sparsity={sparsity:g} seed={seed}",
        "config": {
            "seed": seed,
            "method": {"name": method},
            "decomposition": {
                "mlp": {"name": "nystrom", "ridge": 1e-2},
                "query_key": {"name": "cr"},
                "value_output": {"name": "svd"},
            },
            "allocation": {"name": "entropic", "epsilon": 0.1},
            "calibration": {"name": "tiny", "num_samples": 128},
            "compression": {"sparsity": sparsity},
        },
        "seeds": {"run": seed},
        "provenance": {
            "git": {"commit": "0" * 40, "dirty": False},
            "packages": {"torch": "2.13.0"},
            "python": "3.11.7",
            "hardware": {"cpu": "A processor", "num_cores": 2, "gpus": []},
        },
        "model": {
            "name": "tiny-llama",
            "path": None,
            "family": "llama",
            "weights_sha256": "a" * 64,
            "tokenizer_sha256": "b" * 64,
            "num_parameters": 1_000_000,
            "block_linear_parameters": 800_000,
        },
        "calibration": {
            "source": "tiny",
            "num_samples": 128,
            "sequence_length": 256,
            "seed": seed,
            "num_tokens": 32768,
            "tokens_sha256": "c" * 64,
        },
        "compression": {
            "method": method,
            "target_sparsity": sparsity,
            "achieved_sparsity": sparsity - 0.001,
            "whole_model_sparsity": 0.8 * (sparsity - 0.001),
            "influence": [0.1] * NUM_LAYERS,
            "full_ranks": dict(FULL_RANKS),
            "layers": [_layer(index, sparsity) for index in range(NUM_LAYERS)],
            "details": {},
        },
        "metrics": {
            "dense": _scores(4.0, column=1),
            "compressed": _scores(4.0 + 5.0 * sparsity + 0.1 * seed, column=2),
            "retention": {task: compressed / whole for task, (_, whole, compressed) in TASKS.items()}
            | {"mean": 0.79 / 0.86},
            "limited": False,
        },
        "cost": {
            "stages": [
                {"name": "calibrate", "seconds": 3.5, "flops": 1e9, "bytes": 1e6},
                {"name": "compress", "seconds": 1.5, "flops": 2e9, "bytes": 0.0},
            ],
            "peak_memory_bytes": {"host": 3 * 2**29},
            "forward_passes": 1.0,
            "backward_passes": 0.0,
            "calibration_tokens": 32768,
        },
    }
    if dense:
        record.update(compression=None, calibration=None)
        record["metrics"] |= {"compressed": None, "retention": {}}
    return copy.deepcopy(record | changes)


def _layer(index: int, sparsity: float) -> dict:
    own = sparsity * (0.5 + index / (NUM_LAYERS - 1))  # mean over layers: `sparsity`
    return {
        "index": index,
        "sparsity": own,
        "ranks": {module: 2 * round((1 - own) * full / 2) for module, full in FULL_RANKS.items()},
        "relative_error": {module: own**2 for module in FULL_RANKS},
        "numerics": {},
    }


def _scores(perplexity: float, column: int) -> dict:
    accuracy = {
        task: {"metric": entry[0], "value": entry[column], "stderr": STDERR[column], "num_items": 200}
        for task, entry in TASKS.items()
    }
    mean = sum(float(entry[column]) for entry in TASKS.values()) / len(TASKS)
    return {
        "perplexity": {
            f"ppl_tiny_{window}": {
                "value": perplexity * scale,
                "window": window,
                "num_windows": 9,
                "num_predicted_tokens": 9 * (window - 1),
                "mean_nll": 1.5,
            }
            for window, scale in ((256, 1.0), (128, 1.1))
        },
        "zeroshot": accuracy | {"mean": {"value": mean, "stderr": MEAN_STDERR[column], "num_tasks": 5, "limit": None}},
    }


def scored(right: Sequence[bool]) -> dict:
    """A task's entry from which of its items were right."""
    return {"metric": "acc", "value": float(np.mean(right)), "num_items": len(right), "right": pack(right)}


def with_items(record: dict, seed: int) -> dict:
    """The record with 50 drawn items a task, dense and compressed, and the accuracies they make."""
    record, generator = copy.deepcopy(record), np.random.default_rng(seed)
    for side in ("dense", "compressed"):
        for task, score in record["metrics"][side]["zeroshot"].items():
            if task != "mean":
                score |= scored(generator.random(50) < 0.6) | {"metric": score["metric"]}
    return record
