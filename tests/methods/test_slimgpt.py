"""SlimGPT: rates rise with the logarithm of depth, batches shrink to the greedy order, layers see pruned inputs."""

import math

import pytest
import torch

from modegpt.decompositions.elimination import eliminate
from modegpt.errors import UserError
from modegpt.methods.obc import BLOCK, damped, eliminate_blocks, refitted, statistics_read
from modegpt.methods.slimgpt import LARGEST_RATE, SlimGPT, eliminate_batches, rising_rates
from modegpt.methods.structures import StructureSizes
from modegpt.models import decoder_layers, dense_shape, read_mlp, read_value_output
from tests.methods.protocol_checks import FORMS, check_compression, check_saved_and_generating, check_zero_sparsity
from tests.methods.task_of import task_of
from tests.methods.test_obc import hessian
from tests.models.family_table import dense_model


@pytest.mark.parametrize(
    ("sparsity", "first"), [(0.2, 0.5), (0.5, 0.5), (0.3, 0.0), (0.3, 1.0), (0.8, 0.1), (0.97, 0.5)]
)
def test_rates_rise_with_the_logarithm_of_depth_about_the_target(sparsity: float, first: float):
    rates = rising_rates(sparsity, 12, first)
    assert sum(rates) / 12 == pytest.approx(sparsity)
    steps = [(rates[i] - rates[0]) / math.log(i + 1) for i in range(1, 12)]
    assert steps == pytest.approx([steps[0]] * 11) and steps[0] >= -1e-12
    assert max(rates) <= max(LARGEST_RATE, sparsity) + 1e-12
    if sparsity <= 0.5:
        assert rates[0] == pytest.approx(first * sparsity)
    assert rising_rates(sparsity, 1, first) == [sparsity]


def test_batches_of_one_are_the_greedy_order():
    H, W = hessian(14), torch.randn(14, 5, dtype=torch.float64)
    assert torch.equal(eliminate_batches(H, W, 9, first=1, last=1), eliminate(H, W, 5, ridge=0.0, block=BLOCK)[0])


def test_batches_halve_and_each_sees_the_ones_before():
    H, W = hessian(30), torch.randn(30, 5, dtype=torch.float64)
    removed = eliminate_batches(H, W, 17, first=8, last=2)
    assert len(removed.unique()) == 17
    alive = torch.ones(30, dtype=torch.bool)
    for batch in removed.split([8, 4, 2, 2, 1]):
        left = alive.nonzero().squeeze(1)
        B, P = refitted(H, W, alive)[left], torch.linalg.inv(H[left][:, left])
        cost = B.square().sum(dim=1) / P.diagonal()
        assert left[cost.argsort()[: len(batch)]].tolist() == batch.tolist()
        alive[batch] = False


def test_layers_are_pruned_behind_pruned_layers_and_refitted_on_what_they_read():
    model = dense_model("llama").double()
    compressed = SlimGPT(first=0.8).compress(task_of(model, 0.4))
    assert compressed.details["rates"] == rising_rates(0.4, 3, 0.8)
    task = task_of(model, 0.4)
    hidden = task.calibration.embed()
    for index, (layer, small) in enumerate(zip(decoder_layers(model), decoder_layers(compressed.model), strict=True)):
        inputs = type(hidden)(list(hidden.batches), hidden.arguments)
        statistics = task.calibration.observe(inputs, index, statistics_read(task.family))
        H_o, H = damped(statistics["value_output.C_o"], 0.01), damped(statistics["mlp.C"], 0.01)
        up, down, W_D = task.family.up(layer).weight, task.family.down(small).weight.T, read_mlp(task.family, layer).W_D
        kept = (up.unsqueeze(1) == task.family.up(small).weight.unsqueeze(0)).all(dim=2).any(dim=1)
        assert kept.sum() == len(down) < len(kept)
        removed = eliminate_batches(H, W_D, int((~kept).sum()), first=max(round(len(kept) * 1024 / 11008), 8), last=8)
        assert sorted(removed.tolist()) == (~kept).nonzero().squeeze(1).tolist()
        torch.testing.assert_close(down, refitted(H, W_D, kept)[kept])
        W_O = read_value_output(task.family, layer).W_O.flatten(0, 1)
        order, _ = eliminate_blocks(H_o, W_O, 2)
        if compressed.layers[index]["ranks"]["num_kv_heads"] == 1:
            heads = (torch.arange(2) != order[0]).repeat_interleave(len(W_O) // 2)
            torch.testing.assert_close(task.family.output(small).weight.T, refitted(H_o, W_O, heads)[heads])
        with torch.no_grad():
            hidden.batches = [small(x, **hidden.layer_arguments(index, x)) for x in hidden.batches]
    assert any(layer["ranks"]["num_kv_heads"] == 1 for layer in compressed.layers), "no group went where the test looks"


def test_every_expert_of_the_first_layer_is_pruned_on_the_tokens_that_it_sees():
    model = dense_model("mixtral").double()
    task = task_of(model, 0.4, num_samples=30)
    small = decoder_layers(SlimGPT().compress(task).model)[0]
    [statistics, *_] = task.calibration.statistics(statistics_read(task.family))
    for index, (whole, cut) in enumerate(zip(decoder_layers(model)[0].mlp.experts, small.mlp.experts, strict=True)):
        H, W_D = damped(statistics["experts.C"][index], 0.01), whole.down_proj.weight.T
        removed = eliminate_batches(H, W_D, 40 - cut.down_proj.in_features, first=8, last=8)
        kept = torch.ones(40, dtype=torch.bool).index_fill(0, removed, False)
        assert 0 < len(removed) < 40 and torch.equal(cut.up_proj.weight, whole.up_proj.weight[kept])
        torch.testing.assert_close(cut.down_proj.weight.T, refitted(H, W_D, kept)[kept])


def test_later_layers_lose_more():
    model = dense_model("llama")
    task = task_of(model, 0.2)
    size, dense = StructureSizes.of(task.family, decoder_layers(model)[0], dense_shape(model.config)), (40, 2)
    ranks = [(layer["ranks"]["mlp"], layer["ranks"]["num_kv_heads"]) for layer in SlimGPT(0.1).compress(task).layers]
    lost = [size.channel * (dense[0] - width) + size.group * (dense[1] - groups) for width, groups in ranks]
    assert lost == sorted(lost) and lost[0] < lost[-1] / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": 1.5}, r"method.first=1\.5 is outside"),
        ({"batch": 0.0}, r"method.batch=0\.0 is outside"),
        ({"last_batch": 0}, "method.last_batch=0 is too small"),
        ({"damping": 0.0}, r"method.damping=0\.0 must be positive"),
    ],
)
def test_options_out_of_range(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        SlimGPT(**options)


@pytest.mark.parametrize("form", FORMS)
def test_protocol(form: str):
    check_zero_sparsity(SlimGPT(), form)
    check_compression(SlimGPT(), form, 0.3, tolerance=0.02)


def test_passes_are_counted():
    task = task_of(dense_model("llama"), 0.4)
    SlimGPT().compress(task)
    assert task.calibration.meter.forward_passes == pytest.approx(2)
    assert task.calibration.meter.calibration_tokens == task.calibration.tokens.num_tokens


def test_saved_and_generating(tmp_path):
    check_saved_and_generating(SlimGPT(), "llama", 0.4, tmp_path)


def test_by_default_batches_are_a_share_of_the_channels() -> None:
    assert SlimGPT().batch * 11008 == 1024, "of the authors' largest layer"
