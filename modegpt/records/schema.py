"""What a record must hold, checked whenever one is written or read.

``SCHEMA`` says it all: a mapping lists required keys (more are welcome below the top level), a type is the type of a
leaf, ``X | None`` may be null, ``Nullable`` and ``Each`` do the same for whole nodes.

Conventions beside the types: sparsities and relative errors are shares, ``seconds`` wall time, ``metrics.limited`` is
true as soon as one score was taken on less than its whole test set, ``metrics.compressed`` and ``compression`` are null
for a run that only scored the dense model, ``calibration`` is null for a method that reads no data.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from modegpt.errors import UserError

SCHEMA_VERSION = 1
FINISHED, FAILED = "finished", "failed"
Number = int | float


@dataclass(frozen=True)
class Nullable:
    """A node that follows ``spec`` or is null."""

    spec: Any


@dataclass(frozen=True)
class Each:
    """A list, or a mapping with free keys (``container``), whose every member follows ``spec``."""

    container: type
    spec: Any


SCORES = {
    "perplexity": Each(
        dict, {"value": Number, "window": int, "num_windows": int, "num_predicted_tokens": int, "mean_nll": Number}
    ),
    "zeroshot": dict,
}
SCHEMA = {
    "schema_version": int,
    "identity": {"hash": str, "decides": dict},
    "name": str,
    "experiment": str,
    "status": str,
    "created": str,
    "command": str,
    "config": dict,
    "seeds": Each(dict, int | None),
    "provenance": {
        "git": {"commit": str | None, "dirty": bool | None},
        "packages": Each(dict, str),
        "python": str,
        "hardware": dict,
    },
    "model": {
        "name": str,
        "path": str | None,
        "family": str,
        "weights_sha256": str,
        "tokenizer_sha256": str,
        "num_parameters": int,
        "block_linear_parameters": int,
    },
    "calibration": Nullable(
        {
            "source": str,
            "num_samples": int,
            "sequence_length": int,
            "seed": int,
            "num_tokens": int,
            "tokens_sha256": str,
        }
    ),
    "compression": Nullable(
        {
            "method": str,
            "target_sparsity": Number,
            "achieved_sparsity": Number,
            "whole_model_sparsity": Number,
            "layers": Each(
                list,
                {
                    "index": int,
                    "sparsity": Number | None,
                    "ranks": Each(dict, int | None),
                    "relative_error": Each(dict, Number | None),
                    "numerics": dict,
                },
            ),
        }
    ),
    "metrics": {"dense": SCORES, "compressed": Nullable(SCORES), "retention": dict, "limited": bool},
    "cost": {
        "stages": Each(list, {"name": str, "seconds": Number, "flops": Number, "bytes": Number}),
        "peak_memory_bytes": Each(dict, int),
        "forward_passes": Number,
        "backward_passes": Number,
        "calibration_tokens": int,
    },
    "content_sha256": str,
}


def validate(record: Any, where: str) -> None:
    """Refuse a record that is not one; ``where`` (a file) and the key go into the message.

    Raises:
        UserError: another schema version, a missing or unknown key, a wrong type, or a number that is not finite.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record is a JSON object, this is a {type(record).__name__}")
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(f"{where}: schema_version is {version!r}, this version of modegpt reads {SCHEMA_VERSION}")
    for problem in (*json_problems(record), *_problems(record, SCHEMA, "")):
        raise UserError(f"{where}: {problem}")
    if unknown := sorted(record.keys() - SCHEMA.keys()):
        raise UserError(f"{where}: unknown key {unknown[0]!r}; a record's keys are {', '.join(SCHEMA)}")
    if record["status"] != FINISHED:
        raise UserError(f"{where}: status is {record['status']!r}, a record's is {FINISHED!r}")
    if (record["compression"] is None) != (record["metrics"]["compressed"] is None):
        raise UserError(f"{where}: compression and metrics.compressed must both be there or both be null")


def json_problems(value: Any, key: str = "") -> Iterator[str]:
    """What in ``value`` is not plain finite JSON, each with its dotted key."""
    if isinstance(value, dict):
        for name, member in value.items():
            if type(name) is not str:
                yield f"{_dotted(key, name)}: keys must be strings, this is a {type(name).__name__}"
            yield from json_problems(member, _dotted(key, name))
    elif isinstance(value, list | tuple):
        for index, member in enumerate(value):
            yield from json_problems(member, f"{key}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield f"{key} is {value}, a record holds finite numbers only"
    elif not isinstance(value, str | bool | int | None):
        yield f"{key} is a {type(value).__name__}, which JSON cannot hold"


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys; lists and empty members stay whole."""
    if not isinstance(value, dict) or (key and not value):
        return {key: value}
    return {path: leaf for name, member in value.items() for path, leaf in flatten(member, _dotted(key, name)).items()}


def differences(one: dict, other: dict) -> dict[str, tuple[Any, Any]]:
    """Dotted keys at which two mappings differ, with both values (None where a key is missing)."""
    left, right = flatten(one), flatten(other)
    keys = dict.fromkeys((*left, *right))
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def _problems(value: Any, spec: Any, key: str) -> Iterator[str]:
    match spec:
        case Nullable():
            if value is not None:
                yield from _problems(value, spec.spec, key)
        case Each():
            if not isinstance(value, spec.container):
                yield _mistyped(value, spec.container.__name__, key)
                return
            members = value.items() if spec.container is dict else enumerate(value)
            for name, member in members:
                yield from _problems(
                    member, spec.spec, _dotted(key, name) if spec.container is dict else f"{key}[{name}]"
                )
        case dict():
            if not isinstance(value, dict):
                yield _mistyped(value, "dict", key)
                return
            for name, member in spec.items():
                if name not in value:
                    yield f"{_dotted(key, name)} is missing"
                else:
                    yield from _problems(value[name], member, _dotted(key, name))
        case _:
            # bool is an int to Python, but never a count or a measurement
            if not isinstance(value, spec) or (isinstance(value, bool) and spec not in (bool, bool | None)):
                yield _mistyped(value, getattr(spec, "__name__", None) or str(spec), key)


def _mistyped(value: Any, expected: str, key: str) -> str:
    return f"{key} is {value!r:.60}, expected {expected.replace('NoneType', 'null')}"


def _dotted(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)
