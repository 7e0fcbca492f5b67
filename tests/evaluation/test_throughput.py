"""What a benchmark counts is right by hand, and its scripts run and record."""

import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from modegpt.errors import UserError
from modegpt.evaluation import throughput
from modegpt.evaluation.spec import ThroughputSpec, Workload
from modegpt.evaluation.throughput import (
    Roof,
    Work,
    beside_dense,
    describe_model,
    measure,
    measured_speedup,
    work_of,
)
from modegpt.methods.slicegpt import SLICED_MODELS
from modegpt.models import block_linear_parameters, cache_bytes_per_token
from modegpt.models.checkpoints import save_checkpoint
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
    sliced, fields = SLICED_MODELS["llama"], {key: value for key, value in config.items() if key != "model_type"}
    model = sliced(sliced.config_class(**fields, stream_sizes=[24] * 7))
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


def test_a_clock_that_does_not_move_gives_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_seconds", lambda step, _: (1.0, 0.0))
    [found] = measure(
        {"dense": dense_model("llama")},
        [Workload("prefill", 1, 4)],
        repeats=2,
        decode_tokens=1,
        roof=Roof(1e9, 1e9),
        say=lambda _: None,
    )
    assert found["cpu_seconds"] == 0 and found["cpu_speedup"] is None and found["speedup"] == 1


def test_a_speed_is_not_made_of_a_clock_that_does_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.cycle([(1.0, 1.0), (1.0, 0.0)])
    monkeypatch.setattr(throughput, "_seconds", lambda step, _: next(seconds))
    model = dense_model("llama")
    with pytest.raises(UserError, match="is too little work to be timed here"):
        throughput.measured_speedup(model, model, Workload("prefill", 1, 4), repeats=2, seconds=1, decode_tokens=1)


def test_a_record_holds_both_models_and_the_machine() -> None:
    dense = dense_model("llama")
    lines: list[str] = []
    smaller = sliced_model(dense)[0]
    calls: list[int] = []
    counting = dense.register_forward_pre_hook(lambda *_: calls.append(1))
    found = beside_dense(
        dense, smaller, ThroughputSpec(prefill=["1x4"], decode=["2x4"], repeats=1, decode_tokens=1), say=lines.append
    )
    counting.remove()
    assert len(calls) == 2 * 1 + 1 + 2 * 1, "a round to warm up and one to measure; the prompt that is decoded from"
    assert [(each["phase"], each["model"], len(each["samples_seconds"])) for each in found["measurements"]] == [
        (phase, model, 1) for phase in ("prefill", "decode") for model in ("dense", "compressed")
    ]
    assert found["cache_bytes_per_token"]["compressed"] < found["cache_bytes_per_token"]["dense"] and len(lines) == 4
    assert min(found["ceiling"].values()) > 0
    alone = beside_dense(dense, None, ThroughputSpec(decode=["1x4"], repeats=1, decode_tokens=1), say=lines.append)
    assert list(alone["cache_bytes_per_token"]) == ["dense"] and len(alone["measurements"]) == 1


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_numbers_are_those_of_the_rounds(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians of three rounds by hand; a measurement of decoding makes four tokens of two sequences of six."""
    dense = dense_model("llama")
    models = {"dense": dense, "smaller": sliced_model(dense)[0]}
    rounds = {"dense": [(8.0, 6.0), (12.0, 6.0), (40.0, 8.0)], "smaller": [(4.0, 6.0), (12.0, 2.0), (10.0, 2.0)]}
    times = {id(model): iter(rounds[label]) for label, model in models.items()}

    def prepared(model: Any, *_: object) -> Any:
        return lambda: id(model)

    @contextmanager
    def peak(_: object) -> Iterator[list[int]]:
        yield [100]

    monkeypatch.setattr(throughput, "_prepare", prepared)
    monkeypatch.setattr(throughput, "_seconds", lambda step, _: next(times[step()]))
    monkeypatch.setattr(throughput, "_peak_memory", peak)
    workload, roof = Workload(phase, 2, 6), Roof(1e9, 1e6)
    found = measure(models, [workload], repeats=3, decode_tokens=4, roof=roof, say=lambda _: None)
    steps, tokens = (4, 2) if phase == "decode" else (1, 12)
    ideal = roof.seconds(work_of(dense, workload)) / roof.seconds(work_of(models["smaller"], workload))
    assert [each["seconds"] * steps for each in found] == [12.0, 10.0]
    assert [each["cpu_seconds"] * steps for each in found] == [6.0, 2.0]
    assert [each["tokens_per_second"] for each in found] == [tokens * steps / 12, tokens * steps / 10]
    assert [each["speedup"] for each in found] == [1.0, 2.0] and [each["cpu_speedup"] for each in found] == [1.0, 3.0]
    assert found[1]["ideal_speedup"] == pytest.approx(ideal) and found[1]["share_of_ideal"] == pytest.approx(2 / ideal)
    assert [each["samples_seconds"] for each in found] == [[t / steps for t, _ in rounds[label]] for label in models]
    weights = [sum(parameter.nbytes for parameter in model.parameters()) for model in models.values()]
    assert [each["peak_memory_bytes"] for each in found] == [100 + of_model for of_model in weights]


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 2.0), (7.0, 3.0)])
def test_a_speedup_is_the_median_over_rounds_that_last_long_enough(
    seconds: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of processor seconds: three rounds give 2, 1 and 4, and two more, until there are 7 seconds, 3 and 5."""
    dense, other = dense_model("llama"), sliced_model(dense_model("llama"))[0]
    times = {id(dense): iter([1.0, 1.0, 1.0, 1.5, 1.25]), id(other): iter([0.5, 1.0, 0.25, 0.5, 0.25])}
    monkeypatch.setattr(throughput, "_prepare", lambda model, *_, **__: lambda: id(model))
    monkeypatch.setattr(throughput, "_seconds", lambda step, _: (7.0, next(times[step()])))
    workload = Workload("decode", 1, 8)
    found = measured_speedup(dense, other, workload, repeats=3, seconds=seconds, decode_tokens=2)
    assert found == expected


def test_a_model_is_described_beside_the_dense_one() -> None:
    dense = dense_model("llama")
    smaller, _ = sliced_model(dense)
    found, blocks = describe_model(smaller, dense), block_linear_parameters(smaller)
    assert found["block_linear_parameters"] == blocks and found["num_parameters"] == smaller.num_parameters()
    assert found["sparsity"] == pytest.approx(1 - blocks / block_linear_parameters(dense)) and found["sparsity"] > 0
    cache = [cache_bytes_per_token(model.config, torch.float32) for model in (smaller, dense)]
    assert (found["cache_bytes_per_token"], found["cache_share"]) == (cache[0], cache[0] / cache[1])
    assert (
        describe_model(dense, dense)["layers"]
        == [{"mlp": 40, "query_key": 8, "value_output": 8, "num_kv_heads": 2}] * 3
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_in_bytes() -> None:
    now, peak = (throughput._resident(name) for name in ("VmRSS", "VmHWM"))
    assert now is not None and peak is not None and 2**26 < now <= 1.05 * peak < 2**36


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


def test_the_benchmark_takes_any_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    save_checkpoint(dense_model("gemma", num_hidden_layers=8), tiny_tokenizer(), tmp_path / "released", {})
    output = tmp_path / "bench" / "inference.json"
    options = "--layers 8 --hidden 32 --width 40 --heads 4 --kv-heads 2 --vocabulary 61 --sparsity 0.3 --prefill 1x4"
    options += " --decode 1x4 --repeats 1 --decode-tokens 2 --clock processor"
    bench = load_script("benchmarks/bench_inference")
    monkeypatch.setattr(bench, "measure_roof", lambda *_, **__: Roof(1e9, 1e9))
    arguments = ["--models", "random", str(tmp_path / "released"), "--output", str(output), *options.split()]
    monkeypatch.setattr(sys, "argv", ["benchmarks/bench_inference.py", *arguments])
    assert bench.main() == 0 and output.with_suffix(".png").is_file()
    record = json.loads(output.read_text())
    assert list(record["compared"]) == ["random", "released"] and str(tmp_path) not in output.read_text()
    for found in record["compared"].values():
        assert 0.2 < found["models"]["30% exact"]["sparsity"] < 0.4
        assert [each["model"] for each in found["measurements"]] == ["dense", "30% exact"] * 2
        assert all(each["seconds"] == each["cpu_seconds"] for each in found["measurements"])
    monkeypatch.setattr(sys, "argv", ["benchmarks/bench_inference.py", "--models", "a/b", "c/b"])
    assert bench.main() == 2 and "different names" in capsys.readouterr().err


@pytest.mark.parametrize("length", [7, 8, 9, 11])
def test_decoding_needs_the_prompt_and_what_is_decoded(length: int) -> None:
    spec = ThroughputSpec(decode=[f"1x{length}"], decode_tokens=4)
    spec.check(length + 4)
    with pytest.raises(UserError, match=f"needs {length + 4} tokens"):
        spec.check(length + 3)
