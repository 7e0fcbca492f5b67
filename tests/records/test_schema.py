"""What a record must hold: every refusal names the file and the key."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modegpt.errors import UserError
from modegpt.records.schema import MIGRATIONS, SCHEMA, SCHEMA_VERSION, differences, flatten, migrated
from modegpt.records.store import RecordStore, content_hash, load_record
from tests.records.sample import sample_record


def changed(record: dict, key: str, value: Any) -> dict:
    *path, last = key.split(".")
    node = record
    for name in path:
        node = node[int(name)] if isinstance(node, list) else node[name]
    node[last] = value
    return record


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        (
            "metrics.compressed.perplexity.ppl_tiny_256.value",
            float("nan"),
            r"metrics\.compressed\.perplexity\.ppl_tiny_256\.value is nan",
        ),
        ("cost.stages.0.seconds", float("inf"), r"cost\.stages\[0\]\.seconds is inf"),
        ("metrics.dense.zeroshot", torch.zeros(1), r"metrics\.dense\.zeroshot is a Tensor"),
        ("compression.achieved_sparsity", "0.3", r"compression\.achieved_sparsity is '0\.3', expected int \| float"),
        ("compression.layers.2.index", 2.0, r"compression\.layers\[2\]\.index is 2\.0, expected int"),
        ("model.num_parameters", True, r"model\.num_parameters is True, expected int"),
        ("metrics.limited", 0, r"metrics\.limited is 0, expected bool"),
        ("model.weights_sha256", None, r"model\.weights_sha256 is None, expected str"),
        ("compression", None, "compression and metrics.compressed"),
        ("results", {}, "unknown key 'results'"),
        ("schema_version", 99, "schema_version is 99"),
    ],
)
def test_bad_values_are_refused_and_nothing_is_written(tmp_path: Path, key: str, value: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as refusal:
        RecordStore(tmp_path).write(changed(sample_record(), key, value))
    assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)
    assert list(tmp_path.rglob("*.json")) == []


OURS = {"schema_version", "status", "content_sha256", "identity"}  # the store's own work


@pytest.mark.parametrize("key", sorted(SCHEMA.keys() - OURS - {"experiment", "name"}))
def test_every_key_is_required(tmp_path: Path, key: str) -> None:
    record = sample_record()
    del record[key]
    with pytest.raises(UserError, match=f"{key} is missing"):
        RecordStore(tmp_path).write(record)


def test_null_stands_where_it_may(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.write(sample_record(dense=True))
    store.write(changed(sample_record(calibration=None), "provenance.git", {"commit": None, "dirty": None}))
    assert len(store.paths()) == 2


def test_flatten_and_differences() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [1]}}, "e": {}}) == {"a.b": 1, "a.c.d": [1], "e": {}}
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2, "d": 4}) == {"a.b": (1, 3), "d": (None, 4)}
    assert flatten({}) == {}


def test_there_is_a_step_from_every_former_version() -> None:
    assert sorted(MIGRATIONS) == list(range(1, SCHEMA_VERSION))


@pytest.mark.parametrize("method", ["modegpt", "modegpt_plus"])
def test_an_old_record_reads_like_a_new_one_and_stays_as_it_was(tmp_path: Path, method: str) -> None:
    old = json.loads(RecordStore(tmp_path).write(sample_record(method=method)).read_text())
    old |= {"schema_version": 1}
    old["config"] |= {"model": {"name": "tiny-llama"}, "output": {"pictures": False}}
    old["content_sha256"] = content_hash(old)
    (path,) = tmp_path.glob("*/*/record.json")
    path.write_text(json.dumps(old), encoding="utf-8")
    before = path.read_bytes()

    record = load_record(path)
    config = record["config"]
    assert record["schema_version"] == SCHEMA_VERSION and path.read_bytes() == before
    assert config["model"] == {"name": "tiny-llama", "device_map": None, "max_memory": None}
    assert config["out_of_core"] == {"enabled": False, "hidden_states": "memory", "max_host_bytes": None}
    assert config["output"] == {"pictures": False}, "what is there already stays"
    later = {"fisher": [], "temperature": False} if method == "modegpt_plus" else {}
    assert config["method"] == {"name": method, **later}
    for key in SCHEMA.keys() - {"schema_version", "config"}:
        assert record[key] == old[key], key
    assert migrated(record, "") == record

    path.write_text(json.dumps(old | {"schema_version": SCHEMA_VERSION}), encoding="utf-8")
    with pytest.raises(UserError, match="content_sha256 does not match"):
        load_record(path)


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    path = RecordStore(tmp_path).write(sample_record())
    later = json.loads(path.read_text()) | {"schema_version": 99}
    later["content_sha256"] = content_hash(later)
    path.write_text(json.dumps(later), encoding="utf-8")
    with pytest.raises(UserError, match="schema_version is 99, this version of modegpt reads up to"):
        load_record(path)
