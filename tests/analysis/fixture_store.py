"""A store of invented records for the experiments, written through the real writer.

The numbers are made so that means and spreads are known: perplexity is ``4 + 10 * sparsity * weight + 0.1 * seed``,
compression takes ``4 * weight`` seconds.
"""

import importlib.util
import math
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from analysis.expected import Experiment, experiment
from analysis.ingredients import combinations
from modegpt.records.store import RecordStore

SAMPLE = Path(__file__).resolve().parent.parent / "records" / "sample.py"
INGREDIENTS = "experiments/ingredients"
_spec = importlib.util.spec_from_file_location("sample_for_analysis", SAMPLE)
assert _spec is not None and _spec.loader is not None
_sample = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_sample)
sample_record = _sample.sample_record
sample_throughput = _sample.sample_throughput


def write(
    root: Path, name: str, *, model: str = "tiny-llama", skip: Iterable[int] = (), text: str = "tiny", **changes: Any
) -> list[Path]:
    """One record for each setting of ``experiments/<name>.yaml`` but those at the positions ``skip``."""
    each = experiment(name)
    return [
        write_one(root, each, settings, model=model, text=text, **changes)
        for index, settings in enumerate(each.settings)
        if index not in set(skip)
    ]


def write_one(
    root: Path,
    each: Experiment,
    settings: dict[str, Any],
    *,
    model: str = "tiny-llama",
    text: str = "tiny",
    limit: int | None = None,
    weights: str = "a",
    **more: Any,
) -> Path:
    """One invented record with these settings."""
    sparsity, seed = settings.get("compression.sparsity", 0.3), settings.get("seed", 0)
    method = settings.get("method", "modegpt_plus" if INGREDIENTS in settings else "modegpt")
    record = sample_record(sparsity=sparsity, seed=seed, method=method)
    for key, value in settings.items():
        _put(record["config"], key, value)
    record["config"]["calibration"]["source"] = record["calibration"]["source"] = text
    record["calibration"]["seed"] = seed
    weight = 1 + _position(each, settings)
    scores = record["metrics"]["compressed"]["perplexity"]
    for entry in scores.values():
        entry["value"] = 4 + 10 * sparsity * weight + 0.1 * seed
    for entries in (scores, record["metrics"]["dense"]["perplexity"]):
        for entry in entries.values():
            entry["mean_nll"] = math.log(entry["value"])
    record["cost"]["stages"] += [
        {"name": "compression", "seconds": 3.0 * weight, "flops": 1.0, "bytes": 0.0},
        {"name": "layers", "within": "compression", "seconds": 1.0 * weight, "flops": 1.0, "bytes": 0.0},
    ]
    for task, entry in record["metrics"]["compressed"]["zeroshot"].items():
        entry["value"] = accuracy = (
            record["metrics"]["dense"]["zeroshot"][task]["value"] - 0.05 * sparsity * weight - 0.01 * seed
        )
        record["metrics"]["retention"][task] = accuracy / record["metrics"]["dense"]["zeroshot"][task]["value"]
    if "recovery.targets" in settings:  # which takes one nat off
        before = {
            "perplexity": {name: {"value": math.e * entry["value"]} for name, entry in scores.items()},
            "zeroshot": {"mean": {"value": 0.25}},
        }
        record["compression"]["recovery"] = {
            "name": "lora",
            "targets": settings["recovery.targets"],
            "num_steps": 1,
            "before": before,
        }
    if each.name == "throughput":
        record["metrics"]["throughput"] = sample_throughput(1 + sparsity)
    record["model"] |= {"name": model, "weights_sha256": weights * 64}
    record["metrics"]["limited"] = limit is not None
    _put(record["config"], "evaluation.perplexity.limit", limit)
    record["seeds"] = {"seed": seed, "calibration": seed}
    record["experiment"] = each.folder
    chosen = {
        key: record["config"][key]
        for key in ("method", "decomposition", "allocation", "compression", "module", "calibration", "recovery")
        if key in record["config"]
    }
    record["identity"] = {
        "decides": {
            "seed": seed,
            "chosen": chosen,
            "model": [model, weights],
            "calibration": [text, seed],
            "evaluation": {},
            "limit": limit,
        }
    }
    record["name"] = model
    swept = " ".join(f"'{key}={value}'" for key, value in settings.items())
    chosen_model = shlex.quote(f"model={model}")
    record["command"] = f"modegpt {swept} +experiments={each.name} {chosen_model} output.root=elsewhere threads=1"
    for key, value in more.items():
        record[key] = value
    return RecordStore(root).write(record)


def _position(each: Experiment, settings: dict[str, Any]) -> int:
    """Where the settings' methods or variants stand in their lists; for methods, in that of ``methods``."""
    position = 0
    for key, value in settings.items():
        listed = dict.fromkeys(
            other[key] for other in (experiment("methods") if key == "method" else each).settings if key in other
        )
        if key not in ("seed", "compression.sparsity") and value in listed:
            position += list(listed).index(value)
    return position


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    value = dict(value) if isinstance(value, tuple) else value
    if key == INGREDIENTS:
        config["method"] = combinations()[value]
        return
    if key in ("method", "allocation") or "/" in key:
        node, parts, value = config, key.split("/"), {"name": value}
    else:
        node, parts = config, key.split(".")
    for part in parts[:-1]:
        node = node.setdefault(part, {})
    if not (isinstance(value, dict) and node.get(parts[-1], {}).get("name") == value.get("name", "")):
        node[parts[-1]] = value


def method_position(method: str) -> int:
    """Where a method stands in the list of ``methods``, which decides its invented scores."""
    return list(dict.fromkeys(settings["method"] for settings in experiment("methods").settings)).index(method)
