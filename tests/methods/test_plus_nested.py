"""Nested ranks: cutting a saved model is what compressing to that rate with nested ranks does, and each cut is the
closed-form optimum for its dims.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from modegpt.cli.cut import main
from modegpt.decompositions import MLPElimination, ValueOutputSVD
from modegpt.decompositions.attention import output_sensitivity
from modegpt.errors import UserError
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.methods.plus.nested import FILE, cut, nest, read_orders, write_orders
from modegpt.methods.plus.query_key import SampledStates, sample
from modegpt.methods.plus.streams import Split
from modegpt.models import FAMILIES, decoder_layers, read_mlp, read_query_key, read_value_output
from modegpt.models.checkpoints import load_model, save_checkpoint
from tests.methods.protocol_checks import check_compression, check_zero_sparsity
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model, tokens

NESTED = {"nested": True, "sequential": False, "refit": False, "align": False, "temperature": False}


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")))


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3"])
def test_the_budget_is_met_and_nothing_removed_is_the_dense_model(name: str) -> None:
    compressed = check_compression(MoDeGPTPlus(**NESTED), name, 0.3, tolerance=0.02)
    assert not compressed.files, "orders of the dense model's dims are nothing to cut a smaller one by"
    check_zero_sparsity(MoDeGPTPlus(**NESTED), name)


def test_orders_come_from_the_positions_and_windows_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict] = []

    def noted(*args, **options):
        asked.append(options)
        return sample(*args, **options)

    monkeypatch.setattr("modegpt.methods.plus.method.sample", noted)
    method = MoDeGPTPlus(**NESTED, allocation="uniform", queries_per_window=3, query_key_windows=5)
    task = task_of(dense_model("llama"), 0.3)
    task.calibration.precision = torch.float32
    method.compress(task)
    wanted = {"queries_per_window": 3, "num_windows": 5, "precision": torch.float32}
    assert len(asked) == 3 and all(each | wanted == each for each in asked)
    assert asked[0]["generator"].initial_seed() == task.seed and asked[0]["generator"] is asked[2]["generator"]


@pytest.mark.parametrize(("name", "allocation"), [("llama", "loss"), ("opt", "loss"), ("qwen2", "uniform")])
def test_cutting_a_saved_model_is_compressing_to_that_rate(
    name: str, allocation: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, method = dense_model(name), MoDeGPTPlus(**NESTED, allocation=allocation)
    whole = method.compress(task_of(model, 0.0))
    save_checkpoint(whole.model, tokenizer(), tmp_path / "whole", {}, files=whole.files)
    for sparsity in (0.2, 0.5):
        assert main([str(tmp_path / "whole"), str(sparsity), str(tmp_path / f"cut{sparsity}")]) == 0
        cut_model, dedicated = (
            load_model(str(tmp_path / f"cut{sparsity}"), device="cpu"),
            method.compress(task_of(model, sparsity)).model,
        )
        assert cut_model.config.intermediate_sizes == dedicated.config.intermediate_sizes
        with torch.no_grad():
            assert torch.equal(cut_model(tokens()).logits, dedicated(tokens()).logits)
    assert "of the block-linear weights removed" in capsys.readouterr().out


def test_a_checkpoint_without_orders_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(tmp_path), "0.3", str(tmp_path / "cut")]) == 2
    assert FILE in capsys.readouterr().err


def relative_block_errors(states: SampledStates, *, pairs: bool, kept: torch.Tensor) -> float:
    """What all heads lose to first order by removing the other blocks than ``kept``, over what they lose by all but the
    last: ``1_R^T M 1_R`` of the removed R, M summed over all states that were sampled.
    """
    M = sum(output_sensitivity(part, pairs=pairs) for part in (*states.fit, *states.held))
    size = M.shape[-1]
    M = M.unflatten(0, (len(states.C_K), -1)).sum(dim=1)
    lost = everything = 0.0
    for of_head, dims in zip(M, kept, strict=True):
        gone = torch.ones(size, dtype=torch.bool)
        gone[dims[: len(dims) // (2 if pairs else 1)]] = False
        lost += float(of_head[gone][:, gone].sum())
        everything += float(of_head.sum())
    return lost / everything


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_each_cut_is_the_optimum_for_its_dims_and_lower_ones_lie_within(name: str) -> None:
    model, task = dense_model(name), task_of(dense_model(name), 0.3, num_samples=30)
    family, calibration, layer = task.family, task.calibration, decoder_layers(model)[0]
    hidden, split = calibration.embed(), Split.of(calibration.tokens.ids, batch_size=calibration.batch_size)
    states = sample(
        family,
        layer,
        0,
        hidden,
        split,
        num_windows=30,
        queries_per_window=32,
        precision=torch.float64,
        generator=task.generator(),
    )
    statistics = calibration.observe(hidden, 0, frozenset({"mlp.C", "value_output.G"}))
    orders, kept = nest(family, layer, statistics, states), None
    mlp, query_key, value_output = (read(family, layer) for read in (read_mlp, read_query_key, read_value_output))
    for width, dims in (
        (mlp.inner_size - 3, query_key.inner_size - 2),
        (mlp.inner_size // 2, query_key.inner_size // 2),
    ):
        reduced = cut(family, layer, orders, {"mlp": width, "query_key": dims, "value_output": dims})
        own = MLPElimination()(mlp, statistics, width, torch.Generator())
        assert sorted(reduced["mlp"].kept.tolist()) == own.kept.tolist()
        assert reduced["mlp"].relative_error == pytest.approx(own.relative_error, rel=1e-3, abs=1e-7)
        torch.testing.assert_close(
            reduced["mlp"].weights.W_D[reduced["mlp"].kept.argsort()], own.weights.W_D, rtol=1e-3, atol=1e-4
        )
        svd = ValueOutputSVD()(value_output, statistics, dims, torch.Generator())
        assert reduced["value_output"].relative_error == pytest.approx(svd.relative_error, rel=1e-4, abs=1e-8)
        shares = relative_block_errors(states, pairs=query_key.rope, kept=reduced["query_key"].kept)
        assert reduced["query_key"].relative_error == pytest.approx(shares, rel=1e-3, abs=1e-7)
        sets = [set(head.tolist()) for head in reduced["query_key"].kept]
        assert kept is None or all(small <= large for small, large in zip(sets, kept, strict=True))
        kept = sets


def test_mixtures_have_no_orders() -> None:
    assert MoDeGPTPlus(**NESTED).applicable(FAMILIES["mixtral"]).startswith("method.nested=true does not know")
    assert MoDeGPTPlus(**NESTED).applicable(FAMILIES["llama"]) is None


def test_a_checkpoint_of_an_older_version_is_cut_as_ever(tmp_path: Path) -> None:
    """It names options that were taken out since; none of them decides a cut."""
    whole = MoDeGPTPlus(**NESTED).compress(task_of(dense_model("llama"), 0.0))
    save_checkpoint(whole.model, tokenizer(), tmp_path / "whole", {}, files=whole.files)
    assert main([str(tmp_path / "whole"), "0.3", str(tmp_path / "cut")]) == 0
    layers, costs, options = read_orders(tmp_path / "whole" / FILE)
    older = options | {"query_key": "rescaled", "centred": True, "fisher": [], "bias": "added"}
    files = {FILE: partial(write_orders, layers=layers, costs=costs, method=older)}
    save_checkpoint(whole.model, tokenizer(), tmp_path / "older", {}, files=files)
    assert main([str(tmp_path / "older"), "0.3", str(tmp_path / "again")]) == 0
    cut_then, cut_now = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "cut"))
    assert cut_then == cut_now


@pytest.mark.parametrize("changes", [{"sequential": True}, {"allocation": "entropic"}])
def test_options_that_depend_on_the_rate_are_refused(changes: dict) -> None:
    with pytest.raises(UserError, match=r"method\.nested"):
        MoDeGPTPlus(**NESTED | changes)
