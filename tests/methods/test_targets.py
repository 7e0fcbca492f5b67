"""A target in bytes or in speed becomes the share to remove, which meets it; one that cannot be met is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from modegpt.calibration.calibration import Calibration
from modegpt.config import CompressionConfig, DecompositionConfig, OutOfCoreConfig, RunConfig, read_bytes
from modegpt.data.tokens import CalibrationTokens
from modegpt.errors import UserError
from modegpt.evaluation.spec import Workload
from modegpt.methods import targets
from modegpt.methods.registry import make_method, settled
from modegpt.methods.targets import aimed, bytes_needed, least_sparsity, missed, reached
from modegpt.models import block_linear_parameters, layer_shapes, random_compressed
from modegpt.models.checkpoints import load_model
from modegpt.prepare import prepare
from modegpt.records.store import load_record
from modegpt.run import run
from tests.small_run import PAPER, small


def found(results: Path, **compression: Any) -> tuple[float, list[str]]:
    """The sparsity for the embedded model, and what is said."""
    aimed_at, said, _ = aim(small(results, compression=CompressionConfig(**compression)))
    return aimed_at.compression.sparsity, said


def aim(config: RunConfig) -> tuple[RunConfig, list[str], dict[str, Any]]:
    """The configuration with its sparsity, what is said, and what is known of the target."""
    said: list[str] = []
    model = load_model(str(config.model.path), device="cpu")
    config = settled(config, device="cpu", model_config=model.config)
    method, tokens = make_method(config), CalibrationTokens(torch.zeros(1, 4, dtype=torch.long), "none", 4)
    assert method is not None
    config, known = aimed(config, method, model, tokens, say=said.append)
    return config, said, known


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("4GiB", 4 << 30), ("1.5 MB", 1_500_000), ("2kB", 2000), ("3TiB", 3 << 40), ("17", 17), ("17B", 17)],
)
def test_sizes_are_read(text: str, wanted: int) -> None:
    assert read_bytes("x", text) == wanted


@pytest.mark.parametrize("text", ["many", "4 giga", "-3GB", "0", "4G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"compression.target_bytes={text} is not understood"):
        CompressionConfig(target_bytes=text)


def test_the_run_meets_it_and_says_so(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small(results, compression=CompressionConfig(target_bytes="4.5MB"), quiet=False)
    record = load_record(run(config, command="modegpt"))
    compression = record["compression"]
    assert compression["target_bytes"] == 4_500_000 >= compression["achieved_bytes"] > 4_480_000
    assert compression["achieved_bytes"] == 4 * compression["num_parameters"]
    assert f"compression.sparsity={compression['target_sparsity']:g}" in capsys.readouterr().out
    assert record["config"]["compression"]["target_bytes"] == "4.5MB" and not compression.get("warnings")
    assert "target" not in json.dumps(record["identity"]), "the rate decides, however it was found"


def test_the_cache_counts_where_it_is_asked_for(results: Path) -> None:
    """Heads shrink with the weights, unless the engine wants them whole, and then the weights pay for all."""
    weights, _ = found(results, target_bytes="5MB")
    both, said = found(results, target_bytes="5.3072MB", target_context=50, target_batch=2)
    whole, _ = found(results, target_bytes="5.3072MB", target_context=50, target_batch=2, engine="gguf")
    assert both < weights == whole and "5,523,968 bytes dense" in said[0]


def test_what_cannot_be_met_is_refused(results: Path) -> None:
    with pytest.raises(UserError, match="there is nothing to remove"):
        found(results, target_bytes="1GB")
    with pytest.raises(UserError, match=r"cannot be met: [\d,]+ bytes are left where everything is removed"):
        found(results, target_bytes="100kB")
    with pytest.raises(UserError, match="no effect with method=dense"):
        prepare(small(results, compression=CompressionConfig(target_bytes="4MB"), method={"name": "dense"}), command="")
    with pytest.raises(UserError, match="no effect without target_bytes"):
        CompressionConfig(target_context=5)


def test_a_missed_target_is_a_warning(results: Path) -> None:
    model = load_model("embedded:tiny-llama", device="cpu")
    asked = CompressionConfig(target_bytes="5MB")
    facts = reached({"target_bytes": 5_000_000}, asked, model, model)
    assert facts["achieved_bytes"] == bytes_needed(model, asked) == 5_216_768
    assert missed(facts) == ["the target is missed: 5,216,768 bytes needed, 5,000,000 asked"]
    assert missed(facts | {"target_bytes": 6_000_000}) == [] == missed({})


PREFILL = {"target_phase": "prefill", "target_context": 64, "target_batch": 2}


def timed(monkeypatch: pytest.MonkeyPatch, *, fixed: float = 0.2) -> list[float]:
    """A model takes the ``fixed`` share of the dense one's time, the rest by its weights; returns what is timed."""
    seen: list[float] = []

    def speedup(dense: PreTrainedModel, other: PreTrainedModel, workload: Workload, **_: Any) -> float:
        left = block_linear_parameters(other) / block_linear_parameters(dense)
        seen.append(1 - left)
        return 1 / (fixed + (1 - fixed) * left)

    monkeypatch.setattr(targets, "measured_speedup", speedup)
    return seen


def test_a_speed_becomes_the_least_sparsity_that_has_it(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = timed(monkeypatch)
    config, said, known = aim(small(results, compression=CompressionConfig(target_speedup=1.3, **PREFILL)))
    assert config.compression.sparsity == 0.29  # 1 / (0.2 + 0.8 x 0.71) = 1.302, one per cent less gives 1.289
    assert known["target_speedup"] == 1.3 and known["predicted_speedup"] == pytest.approx(1.302, abs=2e-3)
    assert known["target_workload"] == "prefill 2x64" and len(seen) < 6
    assert said == [
        "compression.target_speedup=1.3: 1.30 times as fast (prefill 2x64) by models of such sizes, "
        "so compression.sparsity=0.29"
    ]


def test_the_sizes_timed_are_those_of_the_engine_and_of_the_method(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[Any] = []
    timed(monkeypatch)

    def noted(model: PreTrainedModel, given: list[Any]) -> PreTrainedModel:
        shapes.append(given)
        return random_compressed(model, given)

    monkeypatch.setattr(targets, "random_compressed", noted)
    asked = CompressionConfig(target_speedup=1.2, engine="gguf", **PREFILL)
    for method in ("modegpt", "modegpt_plus", "tyr"):
        aim(small(results, compression=asked, method={"name": method}))
    widths = {shape.intermediate_size for given in shapes for shape in given}
    assert len(widths) > 2 and all(width % 32 == 0 for width in widths)
    assert {(shape.qk_head_dim, shape.v_head_dim) for given in shapes for shape in given} == {(32, 32)}


@pytest.mark.parametrize("method", [{"name": "modegpt"}, {"name": "modegpt_plus", "allocation": "entropic"}])
def test_the_sizes_timed_are_those_that_the_allocation_gives(
    method: dict[str, Any], results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the influence of one window: the layer that changes its input most keeps most."""
    widths: list[list[int]] = []
    timed(monkeypatch)

    def noted(model: PreTrainedModel, given: list[Any]) -> PreTrainedModel:
        widths.append([shape.intermediate_size for shape in given])
        return random_compressed(model, given)

    monkeypatch.setattr(targets, "random_compressed", noted)
    monkeypatch.setattr(Calibration, "check_activations", lambda self: [0.1 * i for i in range(self.num_layers)])
    asked = CompressionConfig(target_speedup=1.3, **PREFILL)
    aim(small(results, compression=asked, method=method))
    assert all(each == sorted(each) for each in widths) and any(each[0] < each[-1] for each in widths)


def test_a_speed_that_cannot_be_met_is_refused(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, fixed=0.5)

    def refused(config: RunConfig, match: str) -> None:
        with pytest.raises(UserError, match=match):
            aim(config)

    asked = CompressionConfig(target_speedup=2.5, **PREFILL)
    refused(
        small(results, compression=asked), r"cannot be met: compression.sparsity=0.\d+, the most there is, is 1.\d+ "
    )
    refused(small(results, compression=asked, method={"name": "slicegpt"}), "method=slicegpt plans no ranks")
    long = CompressionConfig(target_speedup=2.5, target_context=2000)
    refused(small(results, compression=long), "target_context=2000 is too long: the model has 256 positions")
    svd = DecompositionConfig(**{**PAPER, "mlp": {"name": "svd"}})
    refused(small(results, compression=asked, decomposition=svd), "decomposition/mlp=svd are not those of its ranks")
    for wrong in (
        {"target_speedup": 1.0},
        {"target_speedup": 1.2, "target_bytes": "1GB"},
        {"target_speedup": 1.2, "target_phase": "both"},
        {"target_phase": "prefill"},
    ):
        with pytest.raises(UserError, match="target_"):
            CompressionConfig(**wrong)
    streamed = small(results, compression=asked, out_of_core=OutOfCoreConfig(enabled=True))
    with pytest.raises(UserError, match="times whole models in memory"):
        prepare(streamed, command="")


@pytest.mark.parametrize("wanted", [1.01, 1.5, 1.9, 2.0])
def test_the_search_ends_at_the_least_sparsity_whatever_the_curve(wanted: float) -> None:
    """Also where times fall in steps, and not in line."""
    sparsities = [percent / 100 for percent in range(1, 100)]
    for curve in (lambda s: 1 / (1 - s / 2), lambda s: 1 + s**3, lambda s: 1 + s // 0.125 / 7):
        least = next((s for s in sparsities if curve(s) >= wanted), 0.99)
        assert least_sparsity(wanted, curve, sparsities) == (least, pytest.approx(curve(least)))


def test_a_run_records_target_prediction_and_measurement(
    results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end, by the clock."""
    monkeypatch.setattr(targets, "LEAST_SECONDS", 0.2)
    asked = CompressionConfig(target_speedup=1.05, **PREFILL)
    record = load_record(run(small(results, compression=asked, quiet=False), command="modegpt"))
    facts = record["compression"]
    assert facts["target_speedup"] == 1.05 and facts["target_workload"] == "prefill 2x64"
    assert facts["predicted_speedup"] >= 1.05 and 0.8 < facts["achieved_speedup"] < 3
    assert f"so compression.sparsity={facts['target_sparsity']:g}" in capsys.readouterr().out
    assert facts["achieved_sparsity"] == pytest.approx(facts["target_sparsity"], abs=2e-3)
    assert record["config"]["compression"]["target_speedup"] == 1.05 and "target" in record_stages(record)
    assert "target" not in json.dumps(record["identity"]), "the rate decides, however it was found"


def record_stages(record: dict[str, Any]) -> list[str]:
    return [stage["name"] for stage in record["cost"]["stages"]]


def test_a_speed_that_fell_short_is_a_warning() -> None:
    facts = {"target_speedup": 1.3, "target_workload": "decode 1x512", "predicted_speedup": 1.31}
    assert missed(facts | {"achieved_speedup": 1.29}) == []
    assert missed(facts | {"achieved_speedup": 1.2}) == [
        "the target is missed: 1.20 times as fast (decode 1x512), 1.3 asked and 1.31 predicted"
    ]


def test_random_weights_have_the_sizes_and_share_what_stays() -> None:
    model = load_model("embedded:tiny-llama", device="cpu")
    shape = replace(layer_shapes(model.config)[0], qk_head_dim=8, intermediate_size=100)
    made = random_compressed(model, [shape] * model.config.num_hidden_layers)
    assert layer_shapes(made.config) == [shape] * model.config.num_hidden_layers
    assert made.get_input_embeddings().weight is model.get_input_embeddings().weight or torch.equal(
        made.get_input_embeddings().weight, model.get_input_embeddings().weight
    )
    assert made(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
