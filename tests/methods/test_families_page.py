"""The table of families, cell by cell: each module of each family is reduced as the page says, saved, run, exported."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from modegpt.allocation.policies import Uniform
from modegpt.config import PAPER, CompressionConfig, DecompositionConfig, RankMultiple
from modegpt.decompositions import MLPNystrom, QueryKeyCR, ValueOutputSVD
from modegpt.errors import UserError
from modegpt.methods.base import Method
from modegpt.methods.flap import FLAP
from modegpt.methods.llm_pruner import LLMPruner
from modegpt.methods.modegpt import MODULES, MoDeGPT
from modegpt.methods.registry import METHODS
from modegpt.methods.svd_llm import SVDLLM
from modegpt.models import FAMILIES, decoder_layers, dense_shape, layer_shapes
from modegpt.models.export import stock_model
from tests.methods.protocol_checks import check_generating, check_saved_and_generating
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model, tokens

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
ROWS = {
    cells[0].strip("`"): dict(zip(("mlp", "query_key", "value_output", "export"), cells[2:], strict=True))
    for line in PAGE.read_text("utf-8").splitlines()
    if line.startswith("| `")
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
    if cells[0] != "`model_type`"
}
MIXTURES = {
    answer: re.findall(r"`(\w+)`", " ".join(re.findall(rf"^\| {answer} \|.*", PAGE.read_text("utf-8"), re.M)))
    for answer in ("yes", "no")
}
SHORT = {"tyr": {"rounds": 1, "generations": 2, "offspring": 4}, "asvd": {"search_windows": 2}}
"""Options of methods that search, so that it is soon over."""
SPARSITY = {"mlp": 0.3, "query_key": 0.25, "value_output": 0.375}
SIZES = {"mlp": "intermediate_size", "query_key": "qk_head_dim", "value_output": "v_head_dim"}


def reduced(name: str, *modules: str):
    """The tiny model of a family, and what the paper's method makes of these ``modules`` alone."""
    model = dense_model(name)
    own = {module: SPARSITY[module] if module in modules else 0.0 for module in MODULES}
    method = MoDeGPT(
        mlp=MLPNystrom(),
        query_key=QueryKeyCR(),
        value_output=ValueOutputSVD(),
        allocation=Uniform(),
        module_sparsity=own,
    )
    return model, method.compress(task_of(model, 0.3))


def kind(name: str, module: str, model) -> str:
    """What the layers of a reduced model are, in the words of the page."""
    family, attentions = FAMILIES[name], [layer.self_attn for layer in decoder_layers(model)]
    if module == "mlp":
        said = "gated" if family.gate_path else "plain"
        return said if family.experts_path is None else f"experts, {said}"
    if module == "value_output":
        return "heads"
    rotated = [hasattr(attention, "rope_index") for attention in attentions]
    said = "pairs" if any(rotated) else "dims"
    if any(rotated) and not all(rotated):
        said += "; logits by SVD in layers without rotation"
    if hasattr(attentions[0], "q_norm"):
        norm = attentions[0].q_norm
        assert norm.energy.shape == (4, attentions[0].qk_dim)
        said += ", a norm of all heads" if norm.eps.shape == (1,) else ", a norm of each head"
    return said


def test_the_page_has_every_family() -> None:
    assert list(ROWS) == list(FAMILIES)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_module_is_reduced_as_the_page_says(name: str, module: str, tmp_path: Path) -> None:
    model, compressed = reduced(name, module)
    dense, size = dense_shape(model.config), SIZES[module]
    smaller = replace(dense, **{size: round(getattr(dense, size) * (1 - SPARSITY[module]))})
    assert [replace(shape, extra_biases=()) for shape in layer_shapes(compressed.model.config)] == [
        replace(smaller, extra_biases=())
    ] * 3
    for layer in compressed.layers:
        assert {of for of, error in layer["relative_error"].items() if error > 0} == {module}
    assert kind(name, module, compressed.model) == ROWS[name][module]
    compressed.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, compressed.model(tokens()).logits)
    check_generating(loaded)


@pytest.mark.parametrize("name", FAMILIES)
def test_exports_are_as_the_page_says(name: str) -> None:
    whole = ROWS[name]["export"] == "whole"
    assert whole or ROWS[name]["export"] == "queries and keys dense"
    _, everything = reduced(name, *MODULES)
    if not whole:
        with pytest.raises(UserError, match="query_key=none"):
            stock_model(everything.model)
        _, everything = reduced(name, "mlp", "value_output")
    stock, _ = stock_model(everything.model)
    with torch.no_grad():
        expected = everything.model(tokens()).logits
        torch.testing.assert_close(stock(tokens()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [SVDLLM(), FLAP(), LLMPruner()], ids=lambda method: method.name)
@pytest.mark.parametrize("name", ["gemma3_text", "olmo2", "smollm3"])
def test_baselines_compress_the_newer_families(name: str, method: Method, tmp_path: Path) -> None:
    check_saved_and_generating(method, name, 0.3, tmp_path)


def test_a_norm_of_all_heads_that_lost_some_is_one_of_those_that_stay() -> None:
    model = dense_model("olmo2")
    compressed = LLMPruner().compress(task_of(model, 0.3)).model
    cut = [layer.self_attn for layer in decoder_layers(compressed) if layer.self_attn.num_kv_heads == 1]
    assert cut, "the budget takes a group of heads somewhere"
    for attention in cut:
        states = torch.randn(5, 2, 8)
        rms = states * (states.square().mean(dim=(1, 2), keepdim=True) + model.config.rms_norm_eps).rsqrt()
        torch.testing.assert_close(attention.q_norm(states), attention.q_norm.weight * rms)


@pytest.mark.parametrize("key", METHODS)
def test_methods_take_or_refuse_mixtures_as_the_page_says(key: str, tmp_path: Path) -> None:
    assert sorted(METHODS) == sorted([*MIXTURES["yes"], *MIXTURES["no"]])
    multiples = RankMultiple(1, 1, 1) if "rank_multiple" in METHODS[key].reads else RankMultiple()
    paper = DecompositionConfig(**{module: {"name": name} for module, name in PAPER.items()})
    method = METHODS[key].configured(
        {"name": key} | SHORT.get(key, {}),
        compression=CompressionConfig(rank_multiple=multiples),
        decomposition=paper,
        allocation={"name": "uniform"},
    )
    for name in ("mixtral", "qwen3_moe", "olmoe"):
        if key in MIXTURES["yes"]:
            check_saved_and_generating(method, name, 0.4, tmp_path / name)
        else:
            reason = method.applicable(FAMILIES[name])
            assert reason == f"{key} does not know mixtures of experts; docs/families.md lists the methods that do"
