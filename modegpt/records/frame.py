"""The whole store as one table: a row a finished run, a column a fact."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas

from modegpt.records.schema import flatten
from modegpt.records.scores import Score, all_scores
from modegpt.records.store import RecordStore


def load_records(root: Path | str = "results") -> pandas.DataFrame:
    """Load, check and flatten every record under ``root``, in archives and in directories.

    Columns, missing where a run does not have them:

    - what ran: ``experiment name model method mlp query_key value_output allocation calibration ...``
    - what was removed, as shares: ``target_sparsity achieved_sparsity whole_model_sparsity``
    - what it scored: ``ppl_<text>_<window>``, ``zeroshot_<task>`` with ``_stderr`` and ``_metric``, ``zeroshot_mean``;
      ``dense_...`` for the same of the dense model, which is also what a dense run scores; ``before_...`` for what
      recovery started from; ``retention_<task>`` with ``_stderr``
    - how fast it ran: ``<phase>_<batch>x<length>_tokens_per_second``, ``_milliseconds``, ``_speedup``, ``dense_...``
    - what it cost: ``seconds seconds_<stage> peak_memory_bytes ...``
    - where it is: ``hash path schema_version limited``

    A record that is broken or was changed is left out, with a warning that names it.

    Raises:
        UserError: the root is not a directory.
    """
    frame, left_out = tabulated(root)
    for problem in left_out:
        warnings.warn(f"left out: {problem}", stacklevel=2)
    return frame


def tabulated(root: Path | str) -> tuple[pandas.DataFrame, list[str]]:
    """The table of `load_records`, and a line for each record that is left out of it."""
    rows, left_out = RecordStore(root).survey(lambda path, record: {**row(record), "path": os.path.relpath(path, root)})
    columns = None if rows else ["experiment", "name", "hash", "path"]
    return pandas.DataFrame(rows, columns=columns), left_out


def row(record: Mapping[str, Any]) -> dict[str, Any]:
    """One record as a flat mapping from column to scalar; see `load_records` for the columns."""
    model, config = record["model"], record["config"] if record["compression"] else {}
    calibration, compression, cost = record["calibration"] or {}, record["compression"] or {}, record["cost"]
    decomposition = config.get("decomposition") or {}
    stages, peaks, recovery = cost["stages"], cost["peak_memory_bytes"], compression.get("recovery") or {}
    return {
        "experiment": record["experiment"],
        "name": record["name"],
        "hash": record["identity"]["hash"],
        "created": record["created"],
        "model": model["name"],
        "family": model["family"],
        "method": compression.get("method", "dense"),
        **{module: choice(decomposition.get(module)) for module in ("mlp", "query_key", "value_output")},
        "allocation": choice(config.get("allocation")),
        "recovery": recovery.get("name", "none"),
        "recovery_targets": recovery.get("targets"),
        "calibration": calibration.get("source"),
        **{
            f"calibration_{key}": calibration.get(key)
            for key in ("seed", "num_samples", "sequence_length", "num_tokens")
        },
        **{f"seed_{name}": seed for name, seed in record["seeds"].items()},
        **{key: compression.get(key, 0.0) for key in ("target_sparsity", "achieved_sparsity", "whole_model_sparsity")},
        **{column: value for score in all_scores(record) for column, value in _columns(score).items()},
        **{
            f"retention_{key.replace('.', '_')}": value
            for key, value in flatten(record["metrics"]["retention"]).items()
        },
        **_speeds(record["metrics"].get("throughput")),
        **_mean_errors(compression.get("layers", [])),
        "seconds": sum(stage["seconds"] for stage in stages),
        **{f"seconds_{stage['name']}": stage["seconds"] for stage in stages},
        "flops": sum(stage["flops"] for stage in stages),
        "peak_memory_bytes": peaks.get("host"),
        "peak_gpu_memory_bytes": peak_gpu_bytes(peaks),
        "forward_passes": cost["forward_passes"],
        "backward_passes": cost["backward_passes"],
        "num_parameters": model["num_parameters"],
        "block_linear_parameters": model["block_linear_parameters"],
        "weights_sha256": model["weights_sha256"],
        "commit": record["provenance"]["git"]["commit"],
        "dirty": record["provenance"]["git"]["dirty"],
        "limited": record["metrics"]["limited"],
        "schema_version": record["schema_version"],
    }


def choice(node: Any) -> str | None:
    """The name that was chosen in a configuration group."""
    return node.get("name") if isinstance(node, Mapping) else node


def workload_name(measured: Mapping[str, Any]) -> str:
    """What the columns of a measurement of speed begin with, for example ``decode_8x128``."""
    return f"{measured['phase']}_{measured['batch_size']}x{measured['length']}"


def _columns(score: Score) -> dict[str, Any]:
    columns: dict[str, Any] = {score.name: score.final, f"dense_{score.name}": score.dense}
    if score.before is not None:
        columns |= {f"before_{score.name}": score.before}
    if score.metric != "perplexity":
        columns |= {f"{score.name}_stderr": score.final_stderr, f"dense_{score.name}_stderr": score.dense_stderr}
        columns |= {
            f"{score.name}_metric": score.metric,
            f"retention_{score.name.removeprefix('zeroshot_')}_stderr": score.retention_stderr,
        }
    return columns


def _speeds(throughput: Mapping[str, Any] | None) -> dict[str, float]:
    """Speed by workload, in columns such as ``decode_8x128_speedup``; ``speedup_<phase>``: of its largest batch."""
    if throughput is None:
        return {}
    cache = throughput["cache_bytes_per_token"]
    columns: dict[str, float] = {}
    final = "compressed" if "compressed" in cache else "dense"
    for each in sorted(throughput["measurements"], key=lambda each: each["batch_size"]):
        name = workload_name(each)
        speed = {f"{name}_tokens_per_second": each["tokens_per_second"], f"{name}_milliseconds": 1000 * each["seconds"]}
        if each["model"] == "dense":
            columns |= {f"dense_{column}": value for column, value in speed.items()}
        if each["model"] == final:
            columns |= speed | {f"{name}_{key}": each[key] for key in ("speedup", "ideal_speedup", "share_of_ideal")}
            columns[f"speedup_{each['phase']}"] = each["speedup"]
    return columns | {"dense_cache_bytes_per_token": cache["dense"], "cache_bytes_per_token": cache[final]}


def peak_gpu_bytes(peaks: Mapping[str, int]) -> int | None:
    """The most that any GPU held, of the peaks by device; None without one."""
    return max((peak for device, peak in peaks.items() if device != "host"), default=None)


def _mean_errors(layers: list[dict[str, Any]]) -> dict[str, float]:
    """Relative reconstruction error per module, mean over the layers that have one."""
    modules = dict.fromkeys(module for layer in layers for module in layer["relative_error"])
    values = {module: [layer["relative_error"].get(module) for layer in layers] for module in modules}
    present = {module: [value for value in of if value is not None] for module, of in values.items()}
    return {f"relative_error_{module}": fmean(of) for module, of in present.items() if of}
