"""LoRA recovery: adapters where they belong, training that helps and repeats, weights that hold what was learnt."""

import copy

import peft
import pytest
import torch
from torch import nn

from modegpt.errors import UserError
from modegpt.progress import Progress
from modegpt.recovery.lora import Lora, adapted_linears
from tests.recovery.cases import COMPRESSED, compressed, windows

QUIET = Progress(quiet=True)
QUICK = Lora(targets="all", rank=2, learning_rate=1e-2, num_samples=16, batch_size=4, epochs=4)


@pytest.mark.parametrize("case", COMPRESSED)
@pytest.mark.parametrize("targets", ["mlp", "all"])
def test_adapters_reach_exactly_the_linears_asked_for(case: str, targets: str) -> None:
    _, model = compressed(case)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    names = adapted_linears(model, targets)
    attention = [name for name in names if ".self_attn." in name]
    assert names and bool(attention) == (targets == "all")
    inside = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and "shortcut" not in name and module.weight.numel()
    }
    assert set(names) == {name for name in inside if targets == "all" or ".self_attn." not in name}
    adapted = Lora(targets=targets, rank=3).adapt(model)
    carriers = {
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert carriers == set(names)
    learning = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(learning) == 2 * len(names) and all("lora_" in name for name in learning)

    loss = adapted(windows(model), labels=windows(model)).loss
    loss.backward()
    with_gradient = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(learning)
    frozen = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in adapted.named_parameters()
        if "lora_" not in name
    }
    assert frozen.keys() == before.keys() and all(torch.equal(frozen[name], before[name]) for name in before)


def test_factored_linears_are_adapted_in_both_factors() -> None:
    _, model = compressed("low-rank")
    names = adapted_linears(model, "mlp")
    assert {name.rpartition(".")[2] for name in names} == {"A", "B"} and len(
        names
    ) == 2 * 3 * model.config.num_hidden_layers


@pytest.mark.parametrize("case", COMPRESSED)
def test_merged_is_what_was_trained(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model = compressed(case)
    original = copy.deepcopy(dense.state_dict())
    ids, seen = windows(model), []
    merge = peft.tuners.lora.LoraModel.merge_and_unload

    def watched(tuner, *args, **kwargs):
        with torch.no_grad():
            seen.append(tuner.model.eval()(ids).logits)
        return merge(tuner, *args, **kwargs)

    monkeypatch.setattr(peft.tuners.lora.LoraModel, "merge_and_unload", watched)
    classes = {name: type(module) for name, module in model.named_modules()}
    with torch.no_grad():
        before = model(ids).logits
    merged, report = QUICK.recover(model, ids, seed=0, progress=QUIET)
    with torch.no_grad():
        after = merged(ids).logits
    torch.testing.assert_close(after, seen[0], rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 1e-2, "training changed nothing"
    assert {name: type(module) for name, module in merged.named_modules()} == classes, "nothing of peft is left in it"
    assert all(torch.equal(tensor, original[name]) for name, tensor in dense.state_dict().items()), (
        "the dense model was trained"
    )
    assert not merged.training and not any(parameter.requires_grad for parameter in merged.parameters())
    assert report["num_adapted_linears"] == len(adapted_linears(merged, "all")) and report["num_steps"] == 16


def test_the_loss_goes_down_and_repeats() -> None:
    models = [compressed("llama")[1] for _ in range(3)]  # before the state is read: making one seeds it
    state = torch.get_rng_state()
    runs = [
        QUICK.recover(model, windows(model), seed=seed, progress=QUIET)
        for model, seed in zip(models, (0, 0, 1), strict=True)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    losses = [report["losses"] for _, report in runs]
    assert len(losses[0]) == 16 and losses[0][-1] < 0.9 * losses[0][0]
    assert losses[0] == losses[1] != losses[2]
    first, again, other = (model.state_dict() for model, _ in runs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_micro_batches_change_rounding_only() -> None:
    whole, parts = (
        Lora(rank=2, learning_rate=1e-3, num_samples=16, batch_size=4, micro_batch_size=size).recover(
            compressed("llama")[1], windows(compressed("llama")[1]), seed=0, progress=QUIET
        )
        for size in (None, 1)
    )
    assert parts[1]["losses"] == pytest.approx(whole[1]["losses"], rel=1e-5)
    trained = parts[0].state_dict()
    for name, tensor in whole[0].state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-3, atol=1e-4)


def test_losses_are_means_of_what_was_seen() -> None:
    many = Lora(rank=1, num_samples=16, batch_size=1, epochs=3)
    _, report = many.recover(compressed("llama")[1], windows(compressed("llama")[1])[:, :8], seed=0, progress=QUIET)
    assert report["num_steps"] == 48 and len(report["losses"]) == 20


def test_the_learning_rate_rises_and_falls() -> None:
    shares = [Lora(warmup=0.2).learning_rate_share(step, 10) for step in range(10)]
    assert (
        shares[:3] == [0.5, 1.0, 1.0]
        and shares[-1] == 1 / 8
        and shares == [0.5, 1.0, *sorted(shares[2:], reverse=True)]
    )
    assert Lora(warmup=0.0).learning_rate_share(0, 1) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "recovery.rank=0 is too small"),
        ({"micro_batch_size": 0}, "recovery.micro_batch_size=0"),
        ({"learning_rate": 0.0}, "recovery.learning_rate=0.0 must be positive"),
        ({"dropout": 1.0}, "recovery.dropout=1.0 is outside"),
        ({"sequence_length": "long"}, "neither a number of tokens nor auto"),
        ({"sequence_length": 1}, "at least 2"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Lora(**options)


def test_a_window_must_fit_the_context() -> None:
    assert Lora().window(256) == 256 and Lora().window(4096) == 1024 and Lora(sequence_length=64).window(256) == 64
    with pytest.raises(UserError, match=r"recovery.sequence_length=512 is longer than the model's context of 256"):
        Lora(sequence_length=512).window(256)


def test_a_diverging_loss_is_an_error() -> None:
    _, model = compressed("llama")
    model.lm_head.weight.data[0] = torch.nan
    with pytest.raises(UserError, match=r"recovery diverged: the loss is nan; lower recovery.learning_rate"):
        QUICK.recover(model, windows(model), seed=0, progress=QUIET)
