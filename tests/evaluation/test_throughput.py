"""What a benchmark counts is right by hand, and its scripts run and record."""

import json
import sys
from pathlib import Path

import pytest
import torch

from modegpt.errors import UserError
from modegpt.evaluation.spec import ThroughputSpec, Workload
from modegpt.evaluation.throughput import Roof, Work, beside_dense, measure, work_of
from modegpt.models import cache_bytes_per_token
from modegpt.models.checkpoints import save_checkpoint
from modegpt.models.modeling_sliced import SlicedLlamaConfig, SlicedLlamaForCausalLM
from tests.models.family_table import CONFIGS, dense_model, sliced_model
from tests.models.saved import tiny_tokenizer
from tests.scripts import load_script


def test_work_by_hand() -> None:
    """Llama of width 32, 4 query and 2 key/value heads of 8, MLP 40, 3 layers, vocabulary 61."""
    model = dense_model("llama")
    block, head = 3 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 40), 61 * 32
    assert work_of(model, Workload("prefill", 2, 5)) == Work(
        flops=2 * 2 * (5 * block + head + 3 * 4 * 16 * 15), bytes=4 * (block + head)
    )
    cache = 3 * 2 * 16 * 4
    assert cache_bytes_per_token(model.config, torch.float32) == cache
    assert work_of(model, Workload("decode", 2, 5)) == Work(
        flops=2 * 2 * (block + head + 3 * 4 * 16 * 5), bytes=4 * (block + head) + 2 * 5 * cache
    )
    assert Roof(10.0, 100.0).seconds(Work(20.0, 100.0)) == 2.0 and Roof(10.0, 100.0).seconds(Work(1.0, 300.0)) == 3.0


def test_work_of_a_sliced_model_by_hand() -> None:
    """A residual stream of 24 of 32: every map that reads or writes it, two shortcuts a layer; attention as it was."""
    config = CONFIGS["llama"].to_dict()
    model = SlicedLlamaForCausalLM(
        SlicedLlamaConfig(**{key: value for key, value in config.items() if key != "model_type"}, stream_sizes=[24] * 7)
    )
    block, head = 3 * (24 * (32 + 16 + 16 + 32) + 3 * 24 * 40 + 2 * 24 * 24), 61 * 24
    assert work_of(model, Workload("decode", 2, 5)).flops == 2 * 2 * (block + head + 3 * 4 * 16 * 5)
    assert cache_bytes_per_token(model.config, torch.float32) == cache_bytes_per_token(CONFIGS["llama"], torch.float32)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_fixed_cache_is_left_as_it_was(phase: str) -> None:
    """Each round starts from the same prompt, however many went before."""
    model = dense_model("llama")
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda _, __, output: seen.append(output.logits))
    measure(
        {"dense": model},
        [Workload(phase, 2, 6)],
        repeats=2,
        decode_tokens=2,
        roof=Roof(1e9, 1e9),
        say=lambda _: None,
        fixed_cache=True,
    )
    rounds = torch.stack(seen).unflatten(0, (3, -1))
    assert torch.equal(rounds[0], rounds[1]) and torch.equal(rounds[0], rounds[2])


def test_a_record_holds_both_models_and_the_machine() -> None:
    dense = dense_model("llama")
    lines: list[str] = []
    smaller = sliced_model(dense)[0]
    found = beside_dense(
        dense, smaller, ThroughputSpec(prefill=["1x4"], decode=["2x4"], repeats=1, decode_tokens=1), say=lines.append
    )
    assert [(each["phase"], each["model"]) for each in found["measurements"]] == [
        (phase, model) for phase in ("prefill", "decode") for model in ("dense", "compressed")
    ]
    assert found["cache_bytes_per_token"]["compressed"] < found["cache_bytes_per_token"]["dense"] and len(lines) == 4
    assert min(found["ceiling"].values()) > 0
    alone = beside_dense(dense, None, ThroughputSpec(decode=["1x4"], repeats=1, decode_tokens=1), say=lines.append)
    assert list(alone["cache_bytes_per_token"]) == ["dense"] and len(alone["measurements"]) == 1


def test_models_take_turns_and_caches_are_left_as_they_were() -> None:
    dense = dense_model("llama")
    models = {"dense": dense, "smaller": sliced_model(dense)[0]}
    order: list[str] = []
    for label, model in models.items():
        model.register_forward_pre_hook(lambda *_, label=label: order.append(label))
    lines: list[str] = []
    results = measure(
        models,
        [Workload("prefill", 1, 6), Workload("decode", 2, 6)],
        repeats=2,
        decode_tokens=3,
        roof=Roof(1e9, 1e9),
        say=lines.append,
    )
    assert order[:6] == ["dense", "smaller", "smaller", "dense", "dense", "smaller"], "a rotating order"
    assert [(each["phase"], each["model"], len(each["samples_seconds"])) for each in results] == [
        (phase, label, 2) for phase in ("prefill", "decode") for label in models
    ]
    assert all(each["seconds"] > 0 and each["tokens_per_second"] > 0 for each in results)
    assert results[0]["speedup"] == results[0]["ideal_speedup"] == 1.0 < results[1]["ideal_speedup"]
    assert len(lines) == 4 and "of an ideal" in lines[1]


@pytest.mark.parametrize("text", ["8", "x8", "8xa", "0x8"])
def test_a_wrong_workload_is_explained(text: str) -> None:
    with pytest.raises(UserError):
        Workload.parse("decode", text)
    with pytest.raises(UserError, match=r"evaluation.throughput.prefill: .*8x128|at least 1"):
        ThroughputSpec(prefill=[text])


def test_a_workload_beyond_the_context_is_refused() -> None:
    ThroughputSpec(prefill=["1x16"], decode=["1x8"], decode_tokens=8).check(16)
    with pytest.raises(
        UserError, match=r"evaluation.throughput.decode: 1x9 needs 17 tokens, the model's context is 16"
    ):
        ThroughputSpec(decode=["1x9"], decode_tokens=8).check(16)
    with pytest.raises(UserError, match=r"evaluation.throughput.repeats=0"):
        ThroughputSpec(repeats=0)


def test_shapes_are_those_the_method_would_plan() -> None:
    bench = load_script("benchmarks/bench_inference")
    config = CONFIGS["llama"]
    config = type(config)(**{**config.to_dict(), "num_hidden_layers": 8, "intermediate_size": 128})
    shapes = bench.planned_shapes(config, 0.3, {"mlp": 8, "query_key": 2, "value_output": 2})
    assert len(shapes) == 8 and len({shape.intermediate_size for shape in shapes}) > 2
    assert all(shape.intermediate_size % 8 == 0 and shape.qk_head_dim % 2 == 0 for shape in shapes)


def test_the_scripts_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    model = dense_model("llama")
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "whole", {})
    save_checkpoint(sliced_model(model)[0], tiny_tokenizer(), tmp_path / "part", {})
    output = tmp_path / "bench" / "throughput.json"
    options = [
        "--prefill",
        "1x4",
        "--decode",
        "2x4",
        "--repeats",
        "1",
        "--decode-tokens",
        "1",
        "--device",
        "cpu",
        "--output",
        str(output),
    ]
    monkeypatch.setattr(sys, "argv", ["benchmarks/throughput.py", *options])
    throughput = load_script("benchmarks/throughput")
    monkeypatch.setattr(throughput, "measure_roof", lambda *_, **__: Roof(1e9, 1e9))
    assert throughput.main([str(tmp_path / "whole"), str(tmp_path / "part"), *options]) == 0
    record = json.loads(output.read_text())
    assert (
        record["kind"] == "throughput"
        and record["models"]["part"]["cache_share"] < 1
        and record["provenance"]["packages"]["torch"]
    )
    assert str(tmp_path) not in output.read_text() and [path.name for path in output.parent.iterdir()] == [
        "throughput.json"
    ]
    assert throughput.main([str(tmp_path / "whole"), str(tmp_path / "nothing"), *options]) == 2
    assert "no model directory" in capsys.readouterr().err


@pytest.mark.parametrize("length", [7, 8, 9, 11])
def test_decoding_needs_the_prompt_and_what_is_decoded(length: int) -> None:
    spec = ThroughputSpec(decode=[f"1x{length}"], decode_tokens=4)
    spec.check(length + 4)
    with pytest.raises(UserError, match=f"needs {length + 4} tokens"):
        spec.check(length + 3)
