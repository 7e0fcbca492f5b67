"""The paper's method on every family: exact at zero, on budget, better with more rank, the same from a cache."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modegpt.allocation.policies import POLICIES, Entropic, EntropicCap, Explicit, Policy, Uniform
from modegpt.backend import InMemory
from modegpt.calibration.cache import StatisticsCache
from modegpt.decompositions import (
    VARIANTS,
    MLPMagnitude,
    MLPNystrom,
    MLPRandom,
    QueryKeyCR,
    QueryKeyMagnitude,
    QueryKeyRandom,
    ValueOutputMagnitude,
    ValueOutputRandom,
    ValueOutputSVD,
)
from modegpt.errors import UserError
from modegpt.methods.base import CompressionTask
from modegpt.methods.modegpt import MODULES, MoDeGPT
from modegpt.models import block_linear_parameters, decoder_layers, family_of, layer_shapes
from modegpt.progress import Progress
from modegpt.records.recording import compression_facts
from tests.methods.protocol_checks import (
    achieved_sparsity,
    check_compression,
    check_saved_and_generating,
    check_what_decides,
    check_zero_sparsity,
    module_errors,
)
from tests.methods.task_of import task_of
from tests.models.family_table import CONFIGS, dense_model, tokens

UNIFORM = Uniform()


def paper(allocation: Policy = UNIFORM, **changes) -> MoDeGPT:
    return MoDeGPT(
        **{
            "mlp": MLPNystrom(),
            "query_key": QueryKeyCR(),
            "value_output": ValueOutputSVD(),
            "allocation": allocation,
            **changes,
        }
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_zero_sparsity_is_the_dense_model_to_the_bit(name: str) -> None:
    check_zero_sparsity(paper(), name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("allocation", [Uniform(), Entropic()], ids=["uniform", "entropic"])
def test_the_budget_is_met_within_half_a_step(name: str, allocation: Policy) -> None:
    model = dense_model(name)
    family, width = family_of(model.config), model.config.hidden_size
    channel = (3 if family.gate_path else 2) * len(family.downs(decoder_layers(model)[0]))
    half_step = width * min(channel, 6) / 2 / block_linear_parameters(model)  # a dim of all values is 6 columns
    check_compression(paper(allocation), name, 0.3, tolerance=half_step * 1.0001, errors=module_errors)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2", "opt"])
def test_compressed_models_save_and_generate(name: str, tmp_path: Path) -> None:
    check_saved_and_generating(paper(Entropic()), name, 0.3, tmp_path / "model")


def test_the_calibration_text_decides_the_paper_and_the_seed_the_control() -> None:
    controls = (
        {"mlp": MLPRandom(), "query_key": QueryKeyRandom(), "value_output": ValueOutputRandom()},
        {"mlp": MLPMagnitude(), "query_key": QueryKeyMagnitude(), "value_output": ValueOutputMagnitude()},
    )
    check_what_decides(paper(Entropic()), "llama")
    for variants, seed in zip(controls, (True, False), strict=True):
        check_what_decides(paper(**variants), "llama", data=False, seed=seed)


def test_heads_with_norms_lose_pairs_and_the_record_says_what_that_costs() -> None:
    """The norm of what is left is fitted on the states that the projections of this layer give."""
    model = dense_model("qwen3")
    task = task_of(model, 0.3)
    compressed = paper().compress(task)
    assert {layer["ranks"]["query_key"] for layer in compressed.layers} == {12}
    cost = compressed.details["query_key_cost"]
    assert cost["logits"] == pytest.approx(sum(layer["relative_error"]["query_key"] for layer in compressed.layers) / 3)
    norm_errors = [layer["numerics"]["query_key"]["norm_error"] for layer in compressed.layers]
    assert cost["key"] == pytest.approx(sum(error["key"] for error in norm_errors) / 3)
    assert "query_key_cost" not in paper().compress(task_of(dense_model("llama"), 0.3)).details
    assert achieved_sparsity(compressed, model) == pytest.approx(0.3, abs=0.02)
    seen: list[Tensor] = []
    dense, smaller = (decoder_layers(each)[1].self_attn for each in (model, compressed.model))
    handle = dense.q_proj.register_forward_hook(lambda _, __, out: seen.append(out.flatten(0, 1)))
    with torch.no_grad():
        model(task.calibration.tokens.ids, use_cache=False)
    handle.remove()
    states, pairs = torch.cat(seen).double().unflatten(-1, (4, 16)), smaller.rope_index.repeat_interleave(2, dim=0)
    whole = states.square().mean(dim=-1) + model.config.rms_norm_eps
    kept = states.gather(-1, torch.cat([pairs, pairs + 8], dim=1).expand(len(states), -1, -1))
    estimated = (kept.square() * smaller.q_norm.energy).sum(dim=-1) + smaller.q_norm.eps
    error = float((estimated / whole - 1).square().mean())
    assert compressed.layers[1]["numerics"]["query_key"]["norm_error"]["query"] == pytest.approx(error, rel=1e-3)
    assert 0 < error < float((kept.square().mean(dim=-1) / whole - 1).square().mean())


@pytest.mark.parametrize("module", MODULES)
def test_any_module_can_be_left_alone(module: str) -> None:
    model = dense_model("llama")
    compressed = paper(**{module: None}).compress(task_of(model, 0.2))
    assert all(layer["relative_error"][module] == 0.0 for layer in compressed.layers)
    assert achieved_sparsity(compressed, model) == pytest.approx(0.2, abs=0.02)


def test_each_module_can_have_its_own_sparsity() -> None:
    model = dense_model("llama")
    own = {"mlp": 0.5, "query_key": 0.0, "value_output": 0.25}
    compressed = paper(module_sparsity=own).compress(task_of(model, 0.9))
    assert {tuple(layer["ranks"].values()) for layer in compressed.layers} == {(20, 8, 6)}


def test_skipped_layers_stay_dense_and_the_others_pay() -> None:
    model = dense_model("llama")
    compressed = paper(skip_layers=(1,)).compress(task_of(model, 0.3))
    dense = layer_shapes(model.config)[0]
    shapes = layer_shapes(compressed.model.config)
    assert (shapes[1].intermediate_size, shapes[1].qk_head_dim, shapes[1].v_head_dim) == (
        dense.intermediate_size,
        dense.qk_head_dim,
        dense.v_head_dim,
    )
    assert achieved_sparsity(compressed, model) == pytest.approx(0.3, abs=0.02)
    with pytest.raises(UserError, match="layer 7"):
        paper(skip_layers=(7,)).compress(task_of(model, 0.3))


def test_explicit_sparsities_are_followed() -> None:
    model = dense_model("opt")
    compressed = paper(Explicit([0.0, 0.25, 0.5])).compress(task_of(model, 0.25))
    assert [layer["ranks"]["mlp"] for layer in compressed.layers] == [40, 30, 20]
    with pytest.raises(UserError, match="3 layers"):
        paper(Explicit([0.1])).compress(task_of(model, 0.1))


def test_rank_multiples_are_kept() -> None:
    compressed = paper(rank_multiple={"mlp": 8, "query_key": 4, "value_output": 4}).compress(
        task_of(dense_model("llama"), 0.4)
    )
    for layer in compressed.layers:
        assert (
            layer["ranks"]["mlp"] % 8 == 0
            and layer["ranks"]["query_key"] % 4 == 0
            and layer["ranks"]["value_output"] % 4 == 0
        )


def test_a_rank_of_zero_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"layer 0, (query_key|value_output|mlp)"):
        paper().compress(task_of(dense_model("llama"), 0.97))


def without_forward(task: CompressionTask) -> CompressionTask:
    """The task with a model that must not run."""
    task.model.forward = lambda *_, **__: pytest.fail("the model ran")
    return task


@pytest.mark.parametrize(
    ("method", "sparsity", "message"),
    [
        (paper(Entropic()), 0.999, "allocation.cap=0.8, its default"),
        (paper(Entropic(cap=0.95)), 0.94, "leaves a rank of zero"),
        (paper(Entropic(), skip_layers=(0, 1)), 0.3, r"0.9 over the layers is out of reach: allocation.cap=0.8"),
        (paper(Entropic(), skip_layers=(0, 1)), 0.5, "out of reach"),
        (paper(EntropicCap(cap=0.25)), 0.3, "allocation.cap=0.25 lets none"),
    ],
)
def test_what_no_influence_makes_possible_is_refused_before_any_work(
    method: MoDeGPT, sparsity: float, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        method.check(without_forward(task_of(dense_model("llama"), sparsity)))


@pytest.mark.parametrize("allocation", [Uniform(), Entropic()], ids=["uniform", "entropic"])
@pytest.mark.parametrize("changes", [{"rank_multiple": {"mlp": 100_000}}, {"skip_layers": (0, 1, 2)}])
def test_targets_that_ranks_miss_are_said_before_and_recorded_after(
    allocation: Policy, changes: dict, capsys: pytest.CaptureFixture
) -> None:
    task, method = task_of(dense_model("llama"), 0.3), paper(allocation, **changes)
    task.calibration.progress = Progress(quiet=False)
    method.check(task)
    assert "30 % asked" in "".join(capsys.readouterr())
    compressed = method.compress(task)
    facts = compression_facts(task.model, compressed, method="modegpt", target_sparsity=0.3)
    assert facts["achieved_sparsity"] < 0.298
    [warning] = facts["warnings"]
    assert f"{facts['achieved_sparsity']:.2%} of the block-linear weights removed, 30 % asked" in warning


def test_a_lopsided_allocation_is_said_before_and_recorded_after(capsys: pytest.CaptureFixture) -> None:
    task = task_of(dense_model("llama"), 0.4)  # 1.2 of three layers: more than the one that is wanted whole
    task.calibration.progress = Progress(quiet=False)
    spread, calm = paper(Entropic(epsilon=1e-5)), paper(Entropic(epsilon=10.0))
    InMemory(task.model).check(calm, task, None)
    assert "warning" not in "".join(capsys.readouterr())
    InMemory(task.model).check(spread, task, None)
    assert "warning, by the first calibration window: allocation=entropic" in "".join(capsys.readouterr())
    assert calm.compress(task).warnings == []
    [warning] = spread.compress(task).warnings
    assert warning == spread.allocation.warning(task.calibration.block_influence().tolist(), 0.4)


NOT_APPLICABLE = {("query_key", "svd", "llama"), *(("query_key", name, "opt") for name in ("cr_pairs", "cr_shared"))}


@pytest.mark.parametrize("form", ["llama", "opt"])
def test_every_variant_runs_where_it_applies(form: str) -> None:
    for module, variants in VARIANTS.items():
        for name, variant in variants.items():
            method = paper(**{module: variant()})
            if (module, name, form) in NOT_APPLICABLE:
                with pytest.raises(UserError, match=f"decomposition/{module} does not apply to {form}"):
                    method.check(task_of(dense_model(form), 0.3))
            else:
                closed = None if name == "cr_shared" else module_errors  # whose error is of energies, not of logits
                check_compression(method, form, 0.3, tolerance=0.05, errors=closed)


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"explicit", "entropic_cap"}))
def test_every_allocation_meets_the_budget(policy: str) -> None:
    check_compression(paper(POLICIES[policy]()), "llama", 0.3, tolerance=0.02)


def test_module_errors_fall_as_ranks_grow() -> None:
    errors = [
        paper().compress(task_of(dense_model("llama"), sparsity)).layers[1]["relative_error"]
        for sparsity in (0.6, 0.4, 0.2)
    ]
    for module in ("mlp", "value_output"):
        series = [error[module] for error in errors]
        assert series == sorted(series, reverse=True) and series[0] > series[-1] > 0


def test_the_paper_beats_random_on_calibration_text() -> None:
    model = dense_model("llama")
    task = task_of(model, 0.3, num_samples=12)
    random = paper(mlp=MLPRandom(), query_key=QueryKeyRandom(), value_output=ValueOutputRandom())

    def divergence(method: MoDeGPT) -> float:
        with torch.no_grad():
            ours, dense = (
                m(task.calibration.tokens.ids).logits.log_softmax(-1) for m in (method.compress(task).model, model)
            )
        return float((dense.exp() * (dense - ours)).sum(-1).mean())

    assert divergence(paper()) < 0.7 * divergence(random)


def test_a_cached_calibration_gives_the_same_model(tmp_path: Path) -> None:
    plain = paper(Entropic()).compress(task_of(dense_model("llama"), 0.3)).model
    for _ in range(2):
        task = task_of(dense_model("llama"), 0.3)
        task.calibration.cache = StatisticsCache(root=tmp_path, key="k", max_bytes=10**8)
        cached = paper(Entropic()).compress(task).model
        assert all(
            torch.equal(one, other)
            for one, other in zip(plain.state_dict().values(), cached.state_dict().values(), strict=True)
        )
    assert task.calibration.meter.forward_passes == 0


def test_rank_deficient_statistics_are_reported() -> None:
    task = task_of(dense_model("llama"), 0.3, num_samples=1, sequence_length=10)
    compressed = paper().compress(task)
    assert any("jitter" in str(layer["numerics"]) for layer in compressed.layers)
    with torch.no_grad():
        assert math.isfinite(float(compressed.model(tokens()).logits.sum()))
