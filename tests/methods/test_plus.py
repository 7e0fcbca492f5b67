"""The improved method on every family: exact at zero, on budget, its refits those of explicit activations."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from modegpt.allocation.policies import Uniform
from modegpt.decompositions import MLPNystrom, QueryKeyCR, ValueOutputSVD
from modegpt.decompositions.head_norm import fit_head_norm
from modegpt.decompositions.modules import HEAD_NORM_FIT
from modegpt.decompositions.regression import Moments, Refit, held_out_refit, ridge_towards
from modegpt.errors import UserError
from modegpt.methods.modegpt import MoDeGPT
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.methods.plus.sensitivity import SMALLEST, expected
from modegpt.methods.plus.streams import Split
from modegpt.models import (
    FAMILIES,
    block_linear_parameters,
    decoder_layers,
    family_of,
    layer_shapes,
    output_gain,
    read_query_key,
)
from modegpt.models.modeling_modegpt import Experts
from modegpt.progress import Progress
from tests.methods.protocol_checks import (
    achieved_sparsity,
    check_compression,
    check_saved_and_generating,
    check_what_decides,
    check_zero_sparsity,
)
from tests.methods.task_of import task_of
from tests.models.family_table import CONFIGS, dense_model, tokens

OFF = {
    "sequential": False,
    "refit": False,
    "align": False,
    "beta": 0.0,
    "mlp": "leverage",
    "query_key": "paper",
    "value_output": "values",
    "bias": "none",
    "allocation": "uniform",
}


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3"])
def test_zero_sparsity_is_the_dense_model_to_the_bit(name: str) -> None:
    check_zero_sparsity(MoDeGPTPlus(), name)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_budget_is_met_within_half_a_step(name: str) -> None:
    model = dense_model(name)
    width, family = model.config.hidden_size, family_of(model.config)
    matrices = (2 if family.gate_path is None else 3) * len(family.downs(decoder_layers(model)[0]))
    half_step = width * matrices / 2 / block_linear_parameters(model)
    check_compression(MoDeGPTPlus(), name, 0.3, tolerance=half_step * 1.0001)


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_compressed_models_save_and_generate(name: str, tmp_path: Path) -> None:
    check_saved_and_generating(MoDeGPTPlus(), name, 0.3, tmp_path / "model")


@pytest.fixture(scope="module")
def with_all() -> Callable[[str], dict[str, Tensor]]:
    """The weights of a family's model compressed with every ingredient."""
    return functools.cache(lambda name: MoDeGPTPlus().compress(task_of(dense_model(name), 0.3)).model.state_dict())


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("llama", {"allocation": "entropic"}),
        ("opt", {"allocation": "uniform"}),
        ("opt", {"query_key": "paper"}),
        ("opt", {"bias": "none"}),
        ("llama", {"mlp": "leverage"}),
        ("opt", {"value_output": "values"}),
        ("llama", {"beta": 0.5}),
        ("llama", {"align": False}),
        ("llama", {"refit": False}),
        ("llama", {"sequential": False, "refit": False, "align": False}),
        ("opt", {"temperature": False}),
        ("llama", {"shares": (0.1,)}),
        ("llama", {"cap": 0.35}),
        ("llama", {"queries_per_window": 3}),
        ("opt", {"query_key_windows": 2}),
    ],
    ids=str,
)
def test_every_switch_makes_another_model(name: str, switch: dict, with_all: Callable) -> None:
    compressed, whole = check_compression(MoDeGPTPlus(**switch), name, 0.3, tolerance=0.02), with_all(name)
    weights = compressed.model.state_dict()
    assert weights.keys() != whole.keys() or not all(
        whole[each].shape == weight.shape and torch.equal(whole[each], weight) for each, weight in weights.items()
    )


def test_what_decides_it() -> None:
    check_what_decides(MoDeGPTPlus(queries_per_window=4), "llama", seed=True)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_every_solve_is_fitted_on_three_quarters_of_the_windows_and_checked_on_the_rest(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 windows of 20 tokens: each regression, aligned inputs and outputs alike, has 120 rows to fit and 40 held out,
    other ones, and starts from what is solved on the same rows.
    """
    solves = []

    def noted(fit: Moments, held: Moments, start: tuple[Tensor, Tensor]) -> Refit:
        solves.append((fit.num_rows, held.num_rows, len(fit.G), fit.X.shape[1]))
        assert not torch.equal(fit.G * 40, held.G * 120)
        refit = held_out_refit(fit, held, start)
        if refit.ridge == 0.0:
            assert (fit + held).error(refit.W) <= (fit + held).error(start[1]) * (1 + 1e-9)
            assert fit.error(refit.fitted) <= fit.error(start[0]) * (1 + 1e-9)
        return refit

    monkeypatch.setattr("modegpt.methods.plus.sequential.held_out_refit", noted)
    compressed = MoDeGPTPlus(allocation="uniform").compress(task_of(dense_model(name), 0.3))
    assert {solve[:2] for solve in solves} == {(120, 40)} and {solve[3] for solve in solves} == {32}
    for layer in compressed.layers:
        assert all({"ridge", "held_out"} <= layer["numerics"][module].keys() for module in ("mlp", "value_output"))
    inputs = [solve for solve in solves if solve[2] == 32]
    assert len(inputs) >= 5, "two alignments a layer, but for the first layer's attention"
    constant, shapes = int(name == "opt"), layer_shapes(compressed.model.config)
    sizes = [size for solve in solves if (size := solve[2]) not in (32, 32 + constant)]
    assert sizes == [
        size
        for shape in shapes
        for size in (4 * shape.v_head_dim + constant, shape.intermediate_size + constant)
        for _ in ("local", "target")
    ]


def test_all_off_is_the_paper_but_for_the_ridge() -> None:
    ours = MoDeGPTPlus(**OFF).compress(task_of(dense_model("llama"), 0.3, num_samples=24))
    paper = MoDeGPT(
        mlp=MLPNystrom(), query_key=QueryKeyCR(), value_output=ValueOutputSVD(), allocation=Uniform()
    ).compress(task_of(dense_model("llama"), 0.3, num_samples=24))
    for one, other in zip(decoder_layers(ours.model), decoder_layers(paper.model), strict=True):
        assert torch.equal(one.mlp.up_proj.weight, other.mlp.up_proj.weight)
        torch.testing.assert_close(one.self_attn.q_proj.weight, other.self_attn.q_proj.weight)
        product, expected = (
            layer.self_attn.o_proj.weight[:, : layer.self_attn.v_dim]
            @ layer.self_attn.v_proj.weight[: layer.self_attn.v_dim]
            for layer in (one, other)
        )
        torch.testing.assert_close(product, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_compressed_stream_is_what_the_reduced_layers_make_of_it(name: str) -> None:
    """What is known of attention and MLP, and does not run again, is what they would return."""
    task, method = task_of(dense_model(name), 0.3, num_samples=8), MoDeGPTPlus(allocation="uniform", temperature=False)
    begun = method.begin(task)
    streams = method.walk(task, begun).done
    x = list(streams.compressed.batches)
    for index, layer in enumerate(decoder_layers(task.model)):
        reduced = streams.layer(index, layer, begun.plan.ranks[index]).reduced
        with torch.no_grad():
            x = [reduced(states, **streams.compressed.layer_arguments(index, states)) for states in x]
        for ours, alone in zip(streams.compressed.batches, x, strict=True):
            torch.testing.assert_close(ours, alone, rtol=0, atol=2e-5 * float(alone.abs().max()))
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(x, streams.dense.batches, strict=True))


def unridged(fit: Moments, held: Moments, start: tuple[Tensor, Tensor]) -> Refit:
    W, _ = ridge_towards(fit + held, start[1])(0.0)
    return Refit(W, W, 0.0, (0.0, 0.0), {})


@pytest.mark.parametrize(
    ("name", "bias"),
    [("llama", "none"), ("llama-multihead-biased", "none"), ("opt", "own"), ("opt-post-norm-projected", "none")],
)
def test_refits_are_least_squares_on_explicit_activations(
    name: str, bias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ridge, the last layer's two output maps solve for the dense stream plus beta times the error so far; with
    their biases, where these take up a constant.
    """
    monkeypatch.setattr("modegpt.methods.plus.sequential.held_out_refit", unridged)
    beta = 0.5
    model, task = dense_model(name), task_of(dense_model(name), 0.3, num_samples=30)
    done = MoDeGPTPlus(beta=beta, allocation="uniform", bias=bias).compress(task)
    compressed, report = done.model, done.layers[-1]
    family, ids = task.family, task.calibration.tokens.ids
    last = [decoder_layers(m)[-1] for m in (model, compressed)]
    seen: list[dict] = [{}, {}]
    for layer, store in zip(last, seen, strict=True):
        layer.register_forward_pre_hook(lambda _, args, store=store: store.update(x=args[0]))
        family.output(layer).register_forward_hook(
            lambda _, args, out, store=store: store.update(z=args[0], attention=out)
        )
        family.up(layer).register_forward_pre_hook(
            lambda _, args, store=store: store.update(u=args[0].reshape(store["x"].shape))
        )
        family.down(layer).register_forward_hook(lambda _, args, out, store=store: store.update(h=args[0], mlp=out))
    with torch.no_grad():
        model(ids), compressed(ids)
    dense, ours = ({key: value.reshape(-1, value.shape[-1]).double() for key, value in store.items()} for store in seen)
    for store in (dense, ours):
        store["middle"] = store["u"] if "post-norm" in name else store["x"] + store["attention"]

    def check(features: str, output: str, before: str, linear: torch.nn.Linear, module: str) -> None:
        target = dense[output] + beta * (dense[before] - ours[before])
        z, W_got = ours[features], linear.weight.detach().double().T
        if bias == "none":
            target = target if linear.bias is None else target - linear.bias.detach().double()
        else:
            z = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], dim=1)
            W_got = torch.cat([W_got, linear.bias.detach().double().unsqueeze(0)])
        W = torch.linalg.lstsq(z, target).solution
        best, got = ((z @ M - target).square().sum() for M in (W, W_got))
        assert got <= best * (1 + 1e-5)
        if bias != "own":  # there it is over the target without the dense bias
            assert report["relative_error"][module] == pytest.approx(float(got / target.square().sum()), rel=1e-3)

    check("z", "attention", "x", family.output(last[1]), "value_output")
    check("h", "mlp", "middle", family.down(last[1]), "mlp")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_each_expert_is_refitted_to_its_share_of_what_all_leave(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ridge and alignment: on the tokens that reach an expert behind all that was reduced before, to its own
    dense output and its share of what whole experts would leave of the target.
    """
    monkeypatch.setattr("modegpt.methods.plus.sequential.held_out_refit", unridged)
    model, task = dense_model(name), task_of(dense_model(name), 0.3, num_samples=30)
    done = MoDeGPTPlus(allocation="uniform", align=False, temperature=False).compress(task)
    family, seen = task.family, []
    for one in (model, done.model):
        store: dict[str, Tensor] = {}
        layer = decoder_layers(one)[-1]
        layer.register_forward_pre_hook(lambda _, args, store=store: store.update(x=args[0].flatten(0, 1)))
        family.output(layer).register_forward_hook(
            lambda _, __, out, store=store: store.update(attention=out.flatten(0, 1))
        )
        family.experts(layer).register_forward_hook(
            lambda _, args, out, store=store: store.update(u=args[0], chosen=args[1], shares=args[2], mlp=out)
        )
        with torch.no_grad():
            one(task.calibration.tokens.ids)
        seen.append({key: value if key == "chosen" else value.double() for key, value in store.items()})
    dense, ours = seen
    left = dense["mlp"] + dense["x"] + dense["attention"] - ours["x"] - ours["attention"]
    whole, reduced = (family.experts(decoder_layers(one)[-1]).double() for one in (model, done.model))
    routed = list(whole.routed(ours["chosen"], ours["shares"]))
    with torch.no_grad():
        left -= whole(ours["u"], ours["chosen"], ours["shares"])
    lost = energy = 0.0
    for index, token, share in routed:
        u = ours["u"][token]
        with torch.no_grad():
            target = whole[index](u, share) + share * (left / ours["shares"].sum(dim=1, keepdim=True))[token]
            h, out = reduced[index].hidden(u, share), reduced[index](u, share)
        best = (h @ torch.linalg.lstsq(h, target).solution - target).square().sum()
        assert (out - target).square().sum() <= best * (1 + 1e-5)
        lost, energy = lost + float((out - target).square().sum()), energy + float(target.square().sum())
    report = done.layers[-1]
    assert report["relative_error"]["mlp"] == pytest.approx(lost / energy, rel=1e-3)
    counts = [len(token) for _, token, _ in routed]
    numerics = report["numerics"]["mlp"]
    assert (numerics["fewest_tokens"], numerics["most_tokens"]) == (min(counts), max(counts))


def test_an_expert_that_no_token_reaches_is_cut_by_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    routed = Experts.routed
    monkeypatch.setattr(
        Experts, "routed", lambda self, *routing: (each for each in routed(self, *routing) if each[0] != 3)
    )
    model = dense_model("mixtral")
    done = MoDeGPTPlus(allocation="uniform", align=False).compress(task_of(model, 0.3, num_samples=12))
    numerics = done.layers[0]["numerics"]["mlp"]
    assert numerics["unseen"] == numerics["few"] == [3] and numerics["fewest_tokens"] == 0
    dense, cut = (decoder_layers(each)[0].mlp.experts for each in (model, done.model))
    for index in range(4):
        rows = cut[index].down_proj.weight.T
        plain = [bool((row == dense[index].down_proj.weight.T).all(dim=1).any()) for row in rows]
        assert all(plain) if index == 3 else not any(plain), "the others are refitted"


@pytest.mark.parametrize("name", ["llama", "opt", "opt-post-norm-projected"])
def test_aligned_inputs_are_least_squares_on_explicit_activations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ridge, no linear map of the last layer's inputs comes nearer to the dense stream's projections than the
    aligned ones.
    """
    monkeypatch.setattr("modegpt.methods.plus.sequential.held_out_refit", unridged)
    model, task = dense_model(name), task_of(dense_model(name), 0.1, num_samples=30)
    own = {"mlp": 0.0, "value_output": 0.4, "query_key": 0.0}
    compressed = MoDeGPTPlus(module_sparsity=own, allocation="uniform").compress(task).model
    family, ids = task.family, task.calibration.tokens.ids
    last = [decoder_layers(m)[-1] for m in (model, compressed)]
    for linear in (family.query, family.key, family.up):
        seen: list[list[Tensor]] = []
        hooks = [
            linear(layer).register_forward_hook(
                lambda _, args, out, seen=seen: seen.append(
                    (args[0].flatten(0, -2).double(), out.flatten(0, -2).double())
                )
            )
            for layer in last
        ]
        with torch.no_grad():
            model(ids), compressed(ids)
        for hook in hooks:
            hook.remove()
        (_, target), (x, out) = seen
        bias_of_layer = linear(last[0]).bias
        bias = 0.0 if bias_of_layer is None else bias_of_layer.detach().double()
        best = (x @ torch.linalg.lstsq(x, target - bias).solution + bias - target).square().sum()
        assert (out - target).square().sum() <= best * (1 + 1e-5) + 1e-9
        assert not torch.equal(linear(last[0]).weight, linear(last[1]).weight)


def test_without_two_streams_every_module_is_reduced_on_the_dense_activations() -> None:
    """``sequential=False``: the reduced MLP is the closed form on the dense model's own hidden states, whatever
    happened before it.
    """
    model = dense_model("llama")
    off = {"sequential": False, "refit": False, "align": False, "allocation": "uniform"}
    all_modules, mlp_alone = (
        MoDeGPTPlus(**off, module_sparsity={"mlp": 0.3, "query_key": share, "value_output": share})
        .compress(task_of(model, 0.3, num_samples=30))
        .model
        for share in (0.5, 0.0)
    )
    for one, other, dense in zip(
        decoder_layers(all_modules), decoder_layers(mlp_alone), decoder_layers(model), strict=True
    ):
        assert torch.equal(one.mlp.down_proj.weight, other.mlp.down_proj.weight)
        assert (
            torch.equal(other.self_attn.o_proj.weight, dense.self_attn.o_proj.weight)
            and one.self_attn.o_proj.weight.shape != dense.self_attn.o_proj.weight.shape
        )


def test_selection_is_never_worse_than_the_papers_on_held_out_windows() -> None:
    for name in ("llama", "opt", "qwen2-windows"):
        compressed = MoDeGPTPlus(allocation="uniform").compress(task_of(dense_model(name), 0.4))
        for layer in compressed.layers:
            errors = layer["numerics"]["query_key"]["held_out"]
            assert layer["relative_error"]["query_key"] <= min(errors.values()) * (1 + 1e-9)
            assert set(errors) == {"paper", "logits", "output"}


def test_ranks_follow_the_measured_costs_but_for_what_the_options_fix() -> None:
    """Where one layer's MLP costs nothing, it goes as far as the cap; a skipped layer and a module with its own
    sparsity keep theirs.
    """
    task = task_of(dense_model("llama"), 0.2)
    sizes = {"mlp": 40, "query_key": 8, "value_output": 8}
    costs = [{module: [k**2 / 100 for k in range(size + 1)] for module, size in sizes.items()} for _ in range(3)]
    costs[2]["mlp"] = [1e-9 * k for k in range(41)]
    plan = MoDeGPTPlus(cap=0.6).plan(task, costs=costs)
    assert plan.ranks[2]["mlp"] == 16 and plan.ranks[0]["mlp"] > 16
    assert plan.achieved == pytest.approx(0.2, abs=0.003) and plan.target == pytest.approx(0.2)
    skipped = MoDeGPTPlus(cap=0.6, skip_layers=(2,)).plan(task, costs=[*costs[:2], {}])
    assert skipped.ranks[2] == sizes and skipped.achieved == pytest.approx(0.2, abs=0.003)
    own = MoDeGPTPlus(cap=0.6, module_sparsity={"query_key": 0.5}, rank_multiple={"mlp": 8}).plan(task, costs=costs)
    assert all(ranks["query_key"] == 4 and ranks["mlp"] % 8 == 0 for ranks in own.ranks)
    uniform = MoDeGPTPlus(allocation="uniform").plan(task, costs=None)
    assert len({tuple(ranks.values()) for ranks in uniform.ranks}) <= 2, "each layer alike"


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_a_target_that_no_allocation_meets_is_said_before_the_start(
    sparsity: float, capsys: pytest.CaptureFixture
) -> None:
    task = task_of(dense_model("llama"), sparsity)
    task.calibration.progress = Progress(quiet=False)
    capped = MoDeGPTPlus(cap=0.5)
    capped.check(task)
    said = "".join(capsys.readouterr())
    achieved = f"{capped.compress(task).details['planned_sparsity']:.2%} of the block-linear weights removed"
    warning = f"warning: with method.cap=0.5, the target is missed: {achieved}, {100 * sparsity:g} % asked"
    assert (warning in said) == (sparsity > 0.5)
    MoDeGPTPlus(cap=0.5, allocation="uniform").check(task)
    assert "cap" not in "".join(capsys.readouterr())


def test_heads_with_norms_lose_pairs_and_their_norms_are_fitted_on_the_compressed_stream() -> None:
    """The states of a later layer are those behind compressed ones, so the fit there differs from the dense one's."""
    model = dense_model("qwen3")
    task = task_of(model, 0.3)
    compressed = MoDeGPTPlus(align=False, allocation="uniform").compress(task)
    assert achieved_sparsity(compressed, model) == pytest.approx(0.3, abs=0.02)
    assert {layer["ranks"]["query_key"] for layer in compressed.layers} == {12}
    family, dense = task.family, list(task.calibration.statistics(frozenset({"query_key.N_K"})))
    for index in range(3):
        weights, smaller = read_query_key(family, decoder_layers(model)[index]), decoder_layers(compressed.model)[index]
        fitted, _ = fit_head_norm(
            weights.norm_K, dense[index]["query_key.N_K"], smaller.self_attn.rope_index, HEAD_NORM_FIT
        )
        same = torch.allclose(smaller.self_attn.k_norm.energy.double(), fitted.c, rtol=1e-3)
        assert same == (index == 0), "layer 0 has the dense stream"


@pytest.mark.parametrize(("name", "same"), [("gemma3_text", True), ("olmo2", True), ("llama", False)])
def test_blocks_behind_a_norm_do_not_make_up_for_the_stream(name: str, same: bool) -> None:
    """What such a norm is given has no common scale with the stream, so its target is the dense block's own output."""
    model = dense_model(name)
    one, none = (
        MoDeGPTPlus(allocation="uniform", beta=beta, temperature=False).compress(task_of(model, 0.3)).model
        for beta in (1.0, 0.0)
    )
    assert torch.equal(one(tokens()).logits, none(tokens()).logits) is same


def test_skipped_layers_stay_dense_and_module_sparsities_are_followed() -> None:
    model = dense_model("llama")
    compressed = MoDeGPTPlus(skip_layers=(1,)).compress(task_of(model, 0.3))
    assert layer_shapes(compressed.model.config)[1] == layer_shapes(model.config)[1]
    skipped, dense = (decoder_layers(each)[1].state_dict() for each in (compressed.model, model))
    assert all(torch.equal(skipped[name], weight) for name, weight in dense.items()), "it corrects nothing either"
    assert achieved_sparsity(compressed, model) == pytest.approx(0.3, abs=0.02)
    own = MoDeGPTPlus(module_sparsity={"query_key": 0.5}, rank_multiple={"mlp": 4}).compress(task_of(model, 0.3))
    assert all(layer["ranks"]["query_key"] == 4 and layer["ranks"]["mlp"] % 4 == 0 for layer in own.layers)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 1.01},
        {"beta": -0.01},
        {"mlp": "best"},
        {"query_key": "best"},
        {"value_output": "best"},
        {"bias": "best"},
        {"allocation": "best"},
        {"cap": 1.0},
        {"cap": 1.5},
        {"cap": 0.0},
        {"shares": ()},
        {"shares": (0.0,)},
        {"shares": (0.5, 1.0)},
        {"queries_per_window": 0},
        {"sequential": False},
        {"sequential": False, "refit": False},
        {"query_key_windows": 0},
    ],
)
def test_wrong_options_are_refused(changes: dict) -> None:
    with pytest.raises(UserError, match=f"method.{next(iter(changes))}|method.(refit|align)"):
        MoDeGPTPlus(**changes)


def test_options_at_their_limits_are_allowed() -> None:
    for changes in ({"beta": 0.0}, {"beta": 1.0}, {"queries_per_window": 1}):
        MoDeGPTPlus(**changes)


def test_divergence_follows_the_closed_form_through_what_was_measured() -> None:
    curve = [0.0, 1.0, 2.0, 4.0, 8.0]
    assert expected(curve, {2: 0.1}) == pytest.approx([0.0, 0.05, 0.1, 0.2, 0.4])
    assert expected(curve, {2: 0.1, 3: 0.4}) == pytest.approx([0.0, 0.05, 0.1, 0.4, 1.6])
    assert expected(curve, {1: 0.5, 3: 0.1})[3:] == pytest.approx([0.5, 0.5])
    assert expected([0.0] * 3, {1: 0.3}) == [0.0] * 3


def test_divergences_too_small_to_measure_do_not_make_dims_free() -> None:
    """Where nothing was measured, a million times the error is expected to cost a million times as much."""
    curve = [0.0, 1e-6, 2e-6, 1.0, 2.0]
    assert expected(curve, {1: 0.0, 2: 0.0}) == pytest.approx(
        [0.0, SMALLEST / 2, SMALLEST, 5e5 * SMALLEST, 1e6 * SMALLEST]
    )
    assert expected(curve, {1: 0.0, 3: 0.1}) == pytest.approx([0.0, 1e-7, 2e-7, 0.1, 0.2])


def test_modules_at_full_rank_correct_what_came_before() -> None:
    """With queries and keys reduced alone, later output matrices still move; before the first change nothing does."""
    own = {"mlp": 0.0, "value_output": 0.0, "query_key": 0.5}
    model = dense_model("llama")
    compressed = (
        MoDeGPTPlus(module_sparsity=own, allocation="uniform", align=False)
        .compress(task_of(model, 0.1, num_samples=60))
        .model
    )
    dense = (
        MoDeGPTPlus(module_sparsity=own, allocation="uniform", refit=False, align=False)
        .compress(task_of(model, 0.1, num_samples=60))
        .model
    )
    for m, moved in ((compressed, True), (dense, False)):
        layer, reference = decoder_layers(m)[1], decoder_layers(model)[1]
        assert torch.equal(layer.mlp.up_proj.weight, reference.mlp.up_proj.weight)
        assert torch.equal(layer.mlp.down_proj.weight, reference.mlp.down_proj.weight) != moved


def test_held_out_windows_are_whole_and_a_quarter() -> None:
    held = torch.cat(Split.of(torch.zeros(32, 5), batch_size=3).held)
    assert held.all(dim=1).sum() == 8 and held.any(dim=1).sum() == 8
    assert torch.cat(Split.of(torch.zeros(2, 5), batch_size=3).held).all(dim=1).tolist() == [False, True]
    assert Split.of(torch.zeros(1, 8), batch_size=3).held[0].sum() == 2


def test_one_window_is_enough_to_run() -> None:
    check = MoDeGPTPlus().compress(task_of(dense_model("llama"), 0.3, num_samples=1))
    assert achieved_sparsity(check, dense_model("llama")) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("name", ["gemma3_text", "olmo2"])
def test_what_a_norm_behind_a_block_makes_of_it_decides_what_goes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as a trained model has them, of whose outputs the norms make little of most and much of a few."""

    def uneven() -> PreTrainedModel:
        model, generator = dense_model(name), torch.Generator().manual_seed(1)
        family = family_of(model.config)
        for layer in decoder_layers(model):
            for path in family.branch_norms.values():
                weight = layer.get_submodule(path).weight
                weight.data = torch.randn(weight.shape, generator=generator).mul(1.5).exp()
                weight.data -= family.norm_offset
        return model

    def lost() -> float:
        model, task = uneven(), task_of(uneven(), 0.3, num_samples=48)
        small = MoDeGPTPlus(allocation="uniform", temperature=False).compress(task).model
        ids = task.calibration.tokens.ids
        with torch.no_grad():
            return float((small(ids).logits - model(ids).logits).square().mean())

    seen = lost()
    for module in ("sequential", "query_key"):
        monkeypatch.setattr(f"modegpt.methods.plus.{module}.output_gain", lambda *_: None)
    assert seen < lost()


def test_what_was_mended_for_families_with_norms_behind_their_blocks_is_another_method_there() -> None:
    method = MoDeGPTPlus()
    assert {name: method.revision_for(family) for name, family in FAMILIES.items() if family.branch_norms} == {
        "gemma3_text": 6,
        "olmo2": 6,
    }
    assert method.revision_for(FAMILIES["llama"]) == method.revision


def test_the_gain_of_a_norm_behind_a_block() -> None:
    for name, offset in (("gemma3_text", 1.0), ("olmo2", 0.0)):
        model = dense_model(name)
        layer = decoder_layers(model)[0]
        weight = layer.post_feedforward_layernorm.weight
        weight.data[:3] = torch.tensor([0.0, -7.0, 3.0]) - offset
        gain = output_gain(family_of(model.config), layer, "mlp")
        assert gain is not None and gain[:3].tolist() == pytest.approx([7e-3, 7.0, 3.0])
        torch.testing.assert_close(gain[3:], (weight[3:].detach().double() + offset).abs())
    assert output_gain(FAMILIES["llama"], decoder_layers(dense_model("llama"))[0], "mlp") is None
