"""FLAP: what it scores, what it removes, and the bias that keeps the mean."""

import pytest
import torch

from modegpt.methods.flap import (
    FLAP,
    compensate_attention,
    compensate_mlp,
    fluctuation,
    group_scores,
    mlp_means,
    of_each,
    standardised,
    statistics_read,
    together,
    variance,
)
from modegpt.methods.structures import cheapest_within
from modegpt.models import block_linear_parameters, decoder_layers, read_mlp, read_value_output
from tests.methods.protocol_checks import (
    FORMS,
    check_compression,
    check_generating,
    check_saved_and_generating,
    check_zero_sparsity,
)
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model


def inputs_of(model, linear, ids: torch.Tensor) -> torch.Tensor:
    """What ``linear`` reads while ``model`` runs on ``ids``, (tokens, in)."""
    seen = []
    hook = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return torch.cat(seen)


def test_metric_is_the_variance_times_the_squared_norm():
    X, W = torch.randn(50, 6, dtype=torch.float64) + 3, torch.randn(6, 4, dtype=torch.float64)
    score = fluctuation(variance(X.mean(dim=0), X.square().mean(dim=0)), W)
    # The metric is the expected squared change of the output when a channel is frozen at its mean.
    frozen = [((X[:, [i]] - X[:, [i]].mean()) @ W[[i]]).square().sum().item() / len(X) for i in range(6)]
    torch.testing.assert_close(score, torch.tensor(frozen, dtype=torch.float64), rtol=1e-9, atol=0)


def test_standardised_scores_have_no_mean_and_unit_deviation():
    scores = standardised(torch.rand(30, dtype=torch.float64) * 7 + 2)
    assert scores.mean().abs() < 1e-12 and scores.std().item() == pytest.approx(1)
    assert torch.equal(standardised(torch.full((3,), 2.0)), torch.zeros(3))


def test_a_group_scores_the_mean_of_its_standardised_squares():
    # Two heads of two channels. Squares 1, 4, 9, 16: mean 7.5, sum of squared deviations 42.25 + 12.25 + 2.25 + 72.25
    # = 129, deviation sqrt(129 / 3); the first head's mean is (-6.5 - 3.5) / 2, the second's (1.5 + 8.5) / 2.
    scores = group_scores(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64), num_groups=2)
    torch.testing.assert_close(scores, torch.tensor([-5.0, 5.0], dtype=torch.float64) / 43**0.5)
    # Of one group with both heads: the mean of all, 0.
    torch.testing.assert_close(group_scores(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), num_groups=1), torch.zeros(1))
    # Squares 0, 0, 0, 0, 9, 9 of three groups, a head each: mean 3, deviation sqrt((4 * 9 + 2 * 36) / 5).
    scores = group_scores(torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 3.0]], dtype=torch.float64), num_groups=3)
    torch.testing.assert_close(scores, torch.tensor([-3.0, -3.0, 6.0], dtype=torch.float64) / 21.6**0.5)


def test_alike_groups_of_unlike_channels_all_score_zero():
    """A group is set beside the layer's channels, not beside the few other groups: no one of them has to go."""
    metric = torch.tensor([[0.5, 1.0, 2.0, 4.0]]) * torch.tensor([[1.0], [1.001], [0.999]])
    assert group_scores(metric, num_groups=3).abs().max() < 0.01


@pytest.mark.parametrize("form", ["llama", "llama-multihead-biased", "opt"])
def test_bias_makes_the_mean_output_exact(form: str):
    model = dense_model(form).double()
    task = task_of(model, 0.4)
    family, ids = task.family, task.calibration.tokens.ids
    for layer, statistics in zip(
        decoder_layers(model), task.calibration.statistics(statistics_read(family)), strict=True
    ):
        mlp, value_output = read_mlp(family, layer), read_value_output(family, layer)
        channels = torch.rand(len(mlp.W_D)) > 0.5
        h = inputs_of(model, family.down(layer), ids)
        biased = compensate_mlp(mlp, statistics["mlp.mean"], channels)
        dense_mean = family.down(layer)(h).mean(dim=0)
        torch.testing.assert_close((h[:, channels] @ mlp.W_D[channels] + biased.b_D).mean(dim=0), dense_mean)
        groups = torch.arange(len(value_output.W_V)) % 2 == 0
        heads = groups.repeat_interleave(len(value_output.W_O) // len(groups))
        x = inputs_of(model, family.output(layer), ids)
        attended = compensate_attention(value_output, statistics["value_output.mean"], groups)
        dense_mean = family.output(layer)(x).mean(dim=0)
        kept_x = x.unflatten(1, (len(heads), -1))[:, heads].flatten(1)
        torch.testing.assert_close(
            (kept_x @ value_output.W_O[heads].flatten(0, 1) + attended.b_O).mean(dim=0), dense_mean
        )
        without = 0 if value_output.b_O is None else value_output.b_O
        assert not torch.allclose((kept_x @ value_output.W_O[heads].flatten(0, 1) + without).mean(dim=0), dense_mean)


def test_first_attention_of_the_compressed_model_keeps_its_mean_output():
    """End to end: layer 0's attention reads what the dense one reads, so its mean output must be the same."""
    model = dense_model("opt").double()
    task = task_of(model, 0.5)
    compressed = FLAP().compress(task)
    assert compressed.layers[0]["ranks"]["num_kv_heads"] < 4, "nothing removed where the test looks"
    means = []
    for each in (model, compressed.model):
        output = task.family.output(decoder_layers(each)[0])
        x = inputs_of(each, output, task.calibration.tokens.ids)
        means.append(output(x).mean(dim=0))
    torch.testing.assert_close(means[1], means[0])
    bare = FLAP(compensate=False).compress(task_of(model, 0.5)).model
    assert (
        task.family.output(decoder_layers(bare)[0]).bias - task.family.output(decoder_layers(model)[0]).bias
    ).abs().max() == 0


def test_removes_the_lowest_standardised_scores_of_the_whole_model():
    model = dense_model("llama").double()
    task = task_of(model, 0.35)
    compressed = FLAP().compress(task)
    units = []
    for index, layer in enumerate(decoder_layers(model)):
        o, down = task.family.output(layer), task.family.down(layer)
        ids = task.calibration.tokens.ids
        heads = standardised((inputs_of(model, o, ids).var(dim=0) * o.weight.square().sum(dim=0)).square())
        heads = heads.view(2, -1).mean(dim=1)
        channels = standardised(inputs_of(model, down, ids).var(dim=0) * down.weight.square().sum(dim=0))
        for kind, scores, size in (("num_kv_heads", heads, 2 * 3 * 8 * 32), ("mlp", channels, 3 * 32)):
            units += [(score, index, kind, size) for score in scores.tolist()]
    left = 0.35 * block_linear_parameters(model)
    expected = {
        (index, kind): {"num_kv_heads": 2, "mlp": 40}[kind] for index in range(3) for kind in ("num_kv_heads", "mlp")
    }
    for _, index, kind, size in sorted(units):
        if size <= left:
            left -= size
            expected[index, kind] -= 1
    assert {
        (layer["index"], kind): count for layer in compressed.layers for kind, count in layer["ranks"].items()
    } == expected
    assert len({layer["ranks"]["mlp"] for layer in compressed.layers}) > 1, "the search is global"


def test_the_least_of_each_expert_go_together():
    metric = torch.tensor([[3.0, 1.0, 2.0], [10.0, 30.0, 20.0]])
    assert together(metric).tolist() == [11.0, 22.0, 33.0]
    kept = of_each(torch.tensor([False, True, True]), metric)
    assert kept.tolist() == [[True, False, True], [False, True, True]]


def test_experts_lose_what_fluctuates_least_and_keep_their_means():
    model = dense_model("mixtral").double()
    task = task_of(model, 0.35)
    family, ids = task.family, task.calibration.tokens.ids
    compressed = FLAP().compress(task)
    observed = task.calibration.statistics(statistics_read(family))
    layers = zip(decoder_layers(model), decoder_layers(compressed.model), compressed.layers, observed, strict=True)
    for layer, small, report, statistics in layers:
        means, _ = mlp_means(statistics)
        for whole, cut, mean in zip(layer.mlp.experts, small.mlp.experts, means, strict=True):
            h, W = inputs_of(model, whole.down_proj, ids), whole.down_proj.weight
            torch.testing.assert_close(mean, h.mean(dim=0))
            gone = (h.var(dim=0) * W.square().sum(dim=0)).argsort()[: 40 - report["ranks"]["mlp"]]
            kept = torch.ones(40, dtype=torch.bool).index_fill(0, gone, False)
            assert 0 < len(gone) < 40 and torch.equal(cut.down_proj.weight, W[:, kept])
            torch.testing.assert_close(
                (h[:, kept] @ cut.down_proj.weight.T + cut.down_proj.bias).mean(dim=0), (h @ W.T).mean(dim=0)
            )


def test_an_expert_without_tokens_goes_by_its_weights():
    statistics = {
        "experts.share": torch.tensor([0.5, 0.0], dtype=torch.float64),
        "experts.mean": torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64),
        "experts.mean_square": torch.tensor([[4.0, 9.0], [0.0, 0.0]], dtype=torch.float64),
    }
    mean, deviation = mlp_means(statistics)
    assert mean.tolist() == [[2.0, 4.0], [0.0, 0.0]]
    # of a half of the tokens: 0.5 (4 / 0.5 - 2^2) and 0.5 (9 / 0.5 - 4^2)
    assert deviation[0].tolist() == pytest.approx([2.0, 1.0])
    metric = fluctuation(deviation, torch.tensor([[[1.0], [1.0]], [[3.0], [2.0]]]))
    assert metric[1, 0] > metric[1, 1] > 0
    assert together(metric).tolist() == pytest.approx([1.0, 2.0])


def test_budget_passes_over_what_does_not_fit():
    costs = [torch.tensor([1.0, 5.0]), torch.tensor([2.0, 3.0, 4.0])]
    removed = cheapest_within(costs, [10, 3], budget=14)
    assert [mask.tolist() for mask in removed] == [[True, False], [True, False, False]]
    removed = cheapest_within(
        costs, [10, 3], budget=9, removable=[torch.tensor([True, True]), torch.tensor([False, True, True])]
    )
    assert [mask.tolist() for mask in removed] == [[False, False], [False, True, True]]


@pytest.mark.parametrize("form", [*FORMS, "olmoe"])
def test_protocol(form: str):
    check_zero_sparsity(FLAP(), form)
    check_compression(FLAP(), form, 0.3, tolerance=0.01)


def test_nearly_everything_can_go():
    compressed = check_compression(FLAP(), "llama", 0.97, tolerance=0.01)
    assert any(layer["ranks"]["num_kv_heads"] == 0 for layer in compressed.layers)
    check_generating(compressed.model)


def test_saved_and_generating(tmp_path):
    check_saved_and_generating(FLAP(), "llama", 0.4, tmp_path / "llama")
    check_saved_and_generating(FLAP(), "opt", 0.4, tmp_path / "opt")
