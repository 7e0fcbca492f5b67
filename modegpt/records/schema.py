"""What a record must hold, checked whenever one is written or read.

``SCHEMA`` says it all: a mapping lists required keys (more are welcome below the top level), a type is the type of a
leaf, ``X | None`` may be null, ``Nullable`` and ``Each`` do the same for whole nodes.

Conventions beside the types: sparsities and relative errors are shares, ``seconds`` wall time, ``metrics.limited`` is
true as soon as one score was taken on less than its whole test set, ``metrics.compressed`` and ``compression`` are null
for a run that only scored the dense model, ``calibration`` is null for a method that reads no data.

A change of what ``SCHEMA`` says, or of what readers may expect in ``config``, makes a new ``SCHEMA_VERSION`` and one
entry in ``MIGRATIONS``. What is on disk stays as it was written, byte for byte, and is verified as such; a reader gets
what `migrated` makes of it. An identity never migrates: it names what decided the result when it was recorded.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from modegpt.errors import UserError

Record = dict[str, Any]
SCHEMA_VERSION = 2
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


def _every_option_named(record: Record) -> Record:
    """1 to 2: ``config`` names the options that came later, at the values that stand for what was done without them."""
    config = record["config"]
    later: dict[str, Mapping[str, Any]] = {
        "model": {"device_map": None, "max_memory": None},
        "out_of_core": {"enabled": False, "hidden_states": "memory", "max_host_bytes": None},
        "output": {"pictures": True},
    }
    if config.get("method", {}).get("name") == "modegpt_plus":
        later["method"] = {"fisher": [], "temperature": False}
    complete = {group: {**options, **config.get(group, {})} for group, options in later.items()}
    return {**record, "config": {**config, **complete}}


MIGRATIONS: dict[int, Callable[[Record], Record]] = {1: _every_option_named}
"""For each former version the step to the next one. A step adds what a reader would otherwise have to guess; it changes
no number, and leaves what it is given as it was."""


def migrated(record: Record, where: str) -> Record:
    """The record in the present schema version. Raises UserError for a version that this code does not know."""
    version = record.get("schema_version")
    if version != SCHEMA_VERSION and version not in MIGRATIONS:
        raise UserError(f"{where}: schema_version is {version!r}, this version of modegpt reads up to {SCHEMA_VERSION}")
    while version != SCHEMA_VERSION:
        record = MIGRATIONS[version](record)
        version += 1
    return {**record, "schema_version": SCHEMA_VERSION}


def validate(record: Record, where: str) -> None:
    """Refuse a record that is not one; ``where`` (a file) and the key go into the message.

    Raises:
        UserError: another schema version, a missing or unknown key, or a value of the wrong type.
    """
    if record["schema_version"] != SCHEMA_VERSION:
        raise UserError(f"{where}: schema_version is {record['schema_version']!r}, a new record's is {SCHEMA_VERSION}")
    for problem in _problems(record, SCHEMA, ""):
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
    if not isinstance(value, Mapping) or (key and not value):
        return {key: value}
    return {path: leaf for name, member in value.items() for path, leaf in flatten(member, _dotted(key, name)).items()}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys at which two mappings differ, with both values (None where a key is missing)."""
    left, right = flatten(one), flatten(other)
    keys = dict.fromkeys((*left, *right))
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def _problems(value: Any, spec: Any, key: str) -> Iterator[str]:
    match spec:
        case Nullable():
            yield from () if value is None else _problems(value, spec.spec, key)
        case Each() if isinstance(value, spec.container):
            for name, member in _members(value, key):
                yield from _problems(member, spec.spec, name)
        case dict() if isinstance(value, dict):
            for name, member in spec.items():
                if name not in value:
                    yield f"{_dotted(key, name)} is missing"
                else:
                    yield from _problems(value[name], member, _dotted(key, name))
        case Each():
            yield _mistyped(value, spec.container.__name__, key)
        case dict():
            yield _mistyped(value, "dict", key)
        case _ if not _fits(value, spec):
            yield _mistyped(value, getattr(spec, "__name__", None) or str(spec), key)


def _fits(value: Any, leaf: Any) -> bool:
    # bool is an int to Python, but never a count or a measurement
    return isinstance(value, leaf) and (not isinstance(value, bool) or leaf in (bool, bool | None))


def _mistyped(value: Any, expected: str, key: str) -> str:
    return f"{key} is {value!r:.60}, expected {expected.replace('NoneType', 'null')}"


def _dotted(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _members(container: Any, key: str) -> Iterator[tuple[str, Any]]:
    """What a list or mapping holds, each with its dotted key."""
    if isinstance(container, dict):
        yield from ((_dotted(key, name), member) for name, member in container.items())
    else:
        yield from ((f"{key}[{index}]", member) for index, member in enumerate(container))
