"""What removing a module's dims does to the predictions, measured: the same for half-precision weights as for their float32 copies."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from modegpt.compression.plus.sensitivity import SMALLEST, Costs, float32_forward, kl_divergence, rank_costs
from modegpt.modeling.checkpoints import load_model
from tests.baselines.task_of import task_of


STATISTICS = {"mlp": frozenset({"mlp.C"}), "query_key": frozenset({"query_key.C_Q", "query_key.C_K"}), "value_output": frozenset({"value_output.A"})}
SHARES = (0.25, 0.5)


def costs(model: PreTrainedModel) -> Costs:
    return rank_costs(task_of(model, 0.3, num_samples=48).calibration, STATISTICS, SHARES, ())


@pytest.mark.parametrize("name", ["tiny-opt", "tiny-llama"])
def test_half_precision_does_not_drown_small_divergences(name: str) -> None:
    half = load_model(f"embedded:{name}", dtype=torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in half.state_dict().items()}
    single = copy.deepcopy(half).float()
    for of_half, of_single in zip(costs(half), costs(single), strict=True):
        for module, curve in of_single.items():
            for share in SHARES:
                k = round(share * (len(curve) - 1))
                assert of_half[module][k] == pytest.approx(curve[k], rel=0.2), (module, share)
    after = half.state_dict()
    assert all(after[key].dtype == tensor.dtype and torch.equal(after[key], tensor) for key, tensor in before.items())


def test_weights_are_narrow_again_after_a_failure() -> None:
    model = load_model("embedded:tiny-llama", dtype=torch.bfloat16)
    with pytest.raises(IndexError), float32_forward(model):
        model(torch.tensor([[10**6]]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_wide_model_runs_as_it_is() -> None:
    model = load_model("embedded:tiny-llama")
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad(), float32_forward(model):
        inside = model(ids).logits
        assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(inside, model(ids).logits)


@pytest.mark.parametrize("distance", [1e-6, 1e-4, 1e-2, 1.0])
def test_divergence_of_predictions_is_exact_however_small(distance: float) -> None:
    """From float32 log probabilities as from float64 ones, down to what the rounding of the former is itself."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(50, 300, generator=generator, dtype=torch.float64)
    moved = logits + distance * torch.randn(50, 300, generator=generator, dtype=torch.float64)
    log_p, log_q = logits.log_softmax(-1), moved.log_softmax(-1)
    truth = float((log_p.exp() * (log_p - log_q)).sum())
    assert kl_divergence(log_p, log_q) == pytest.approx(truth, rel=1e-4)
    single = kl_divergence(log_p.float(), log_q.float())
    assert single == pytest.approx(truth, rel=1e-2, abs=50 * SMALLEST)


def test_divergence_of_equal_predictions_is_nothing() -> None:
    log_p = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert kl_divergence(log_p, log_p) == 0.0
