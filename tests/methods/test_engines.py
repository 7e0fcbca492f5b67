"""Ranks under what an engine can run: chosen so, exported without a zero, and another run to the records."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from modegpt.allocation.engines import ENGINES
from modegpt.allocation.policies import Entropic, Explicit, Uniform
from modegpt.decompositions import QueryKeyShared
from modegpt.errors import UserError
from modegpt.methods.base import Compressed
from modegpt.methods.modegpt import MoDeGPT
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.models.checkpoints import load_tokenizer
from modegpt.models.export import stock_model
from modegpt.models.gguf_file import write_gguf
from tests.methods.protocol_checks import achieved_sparsity
from tests.methods.task_of import task_of
from tests.methods.test_modegpt import paper
from tests.models.family_table import dense_model, tokens

WIDE = {"intermediate_size": 1024, "vocab_size": 1536}
SLOPE = Explicit(values=(0.1, 0.3, 0.5))


def compressed(method: MoDeGPT | MoDeGPTPlus, name: str = "llama", sparsity: float = 0.3) -> tuple[Compressed, Any]:
    """What the method makes, and the dense model."""
    model = dense_model(name, **WIDE)
    return method.compress(task_of(model, sparsity)), model


def test_stock_keeps_attention_and_one_width() -> None:
    for method in (paper(engine="stock"), MoDeGPTPlus(engine="stock", allocation="uniform", query_key_windows=2)):
        done, dense = compressed(method)
        config = done.model.config
        assert len(set(config.intermediate_sizes)) == 1 and config.intermediate_sizes[0] < 1024
        assert set(config.qk_head_dims) == set(config.v_head_dims) == {config.dense_head_dim}
        assert achieved_sparsity(done, dense) == pytest.approx(0.3, abs=5e-4)
        _, report = stock_model(done.model)
        assert report.padding == 0 and report.exported == report.compressed


def test_stock_with_one_set_of_frequencies_shrinks_heads_too() -> None:
    """Attention joins the budget; heads have one size, and the family's own class has the logits."""
    done, dense = compressed(paper(engine="stock", query_key=QueryKeyShared()), "llama-wide-heads")
    config = done.model.config
    assert len(set(config.intermediate_sizes)) == 1 and config.intermediate_sizes[0] < 1024
    assert achieved_sparsity(done, dense) == pytest.approx(0.3, abs=5e-4)
    (size,) = {*config.qk_head_dims, *config.v_head_dims}
    assert size % 2 == 0 and size < config.dense_head_dim == 16
    stock, report = stock_model(done.model)
    assert stock.config.head_dim == size and report.padding == 0 and report.exported == report.compressed
    torch.testing.assert_close(stock(tokens()).logits, done.model(tokens()).logits, rtol=1e-5, atol=1e-5)
    given = dict.fromkeys(("query_key", "value_output"), 0.5)
    halved, _ = compressed(paper(engine="stock", query_key=QueryKeyShared(), module_sparsity=given), "llama-wide-heads")
    assert {*halved.model.config.qk_head_dims, *halved.model.config.v_head_dims} == {8}


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        ({"value_output": None}, "llama", "one size"),
        ({"module_sparsity": {"query_key": 0.25}}, "llama", "one size"),
        ({}, "qwen2", "states no head size"),
        ({}, "qwen3", "norms of their own"),
    ],
)
def test_heads_of_one_size_or_none(changes: dict[str, Any], name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        paper(engine="stock", query_key=QueryKeyShared(), **changes).check(task_of(dense_model(name), 0.3))


@pytest.mark.parametrize(("engine", "multiple"), [("deci", 256), ("gguf", 32)])
def test_widths_by_layer_in_an_engines_multiples(engine: str, multiple: int, tmp_path: Path) -> None:
    done, dense = compressed(paper(SLOPE, engine=engine))
    widths = done.model.config.intermediate_sizes
    assert len(set(widths)) > 1 and all(width % multiple == 0 for width in widths), widths
    assert set(done.model.config.qk_head_dims) == {done.model.config.dense_head_dim}
    mlp_share = 1 - (2 * 32 * 32 + 2 * 32 * 16) / (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 1024)
    half_step = multiple / 1024 / 3 / 2
    assert achieved_sparsity(done, dense) == pytest.approx(0.3 * mlp_share, abs=half_step * mlp_share + 1e-9)
    report = write_gguf(done.model, load_tokenizer("embedded:tiny-llama"), tmp_path / "model.gguf", kind="q8_0")
    assert report.padding == 0 and "Nothing was filled up" in str(report)


def test_a_multiple_of_ones_own_counts_too() -> None:
    done, _ = compressed(paper(SLOPE, engine="gguf", rank_multiple={"mlp": 48}))
    assert all(width % 96 == 0 for width in done.model.config.intermediate_sizes)


def test_the_budget_is_found_in_what_may_shrink() -> None:
    """Attention keeps its weights, so that MLPs lose more than the target."""
    done, dense = compressed(paper(engine="gguf"), sparsity=0.5)
    assert achieved_sparsity(done, dense) == pytest.approx(0.5, abs=0.01)
    with pytest.raises(UserError, match="is out of reach"):
        model = dense_model("llama")
        paper(engine="stock").compress(task_of(model, 0.9))


@pytest.mark.parametrize(
    "method",
    [paper(Entropic(), engine="stock"), paper(engine="stock", skip_layers=(1,)), MoDeGPTPlus(engine="stock")],
)
def test_one_width_wants_layers_that_are_alike(method: MoDeGPT | MoDeGPTPlus) -> None:
    with pytest.raises(UserError, match="one width"):
        method.check(task_of(dense_model("llama"), 0.3))


@pytest.mark.parametrize("method", [paper(), MoDeGPTPlus()])
def test_what_every_run_did_keeps_its_identity(method: MoDeGPT | MoDeGPTPlus) -> None:
    before = method.identity(sparsity=0.3, seed=0)["compression"]
    assert "engine" not in before
    for engine in set(ENGINES) - {"any"}:
        now = dataclasses.replace(method, engine=engine).identity(sparsity=0.3, seed=0)["compression"]
        assert now == before | {"engine": engine}


def test_uniform_is_what_one_width_needs() -> None:
    paper(Uniform(), engine="stock").check(task_of(dense_model("llama"), 0.3))
