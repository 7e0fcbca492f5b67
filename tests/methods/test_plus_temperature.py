"""The inverse temperature is the minimum of the divergence, scales the logits and nothing else, and leaves what was not
compressed alone.
"""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from modegpt.calibration.stream import Storage
from modegpt.calibration.world import World
from modegpt.errors import UserError
from modegpt.methods.plus import temperature
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.methods.plus.switches import Switches
from modegpt.methods.plus.temperature import Compared, inverse_temperature, sharpened_norm
from modegpt.models import decoder_layers, family_of
from tests.models.family_table import CONFIGS, dense_model, sliced_model, tokens
from tests.streaming.streamed_task import task_on


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


def states(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.get_decoder()(tokens(), use_cache=False).last_hidden_state.flatten(0, 1)


def fitted(dense: PreTrainedModel, compressed: PreTrainedModel) -> float:
    """From what each model's own head reads."""
    return inverse_temperature(
        states(dense),
        states(compressed),
        dense_head=dense.get_output_embeddings(),
        head=compressed.get_output_embeddings(),
    )


def sharpen(model: PreTrainedModel, s: float) -> None:
    model.load_state_dict(sharpened_norm(model, family_of(model.config), s), strict=False, assign=True)


def divergence(dense: Tensor, compressed: Tensor, s: float) -> float:
    log_p, log_q = dense.double().log_softmax(-1), (s * compressed.double()).log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_it_is_where_the_divergence_is_least(sharpness: float) -> None:
    dense = dense_model("llama")
    compressed, _ = sliced_model(dense)
    sharpen(compressed, sharpness)
    s = fitted(dense, compressed)
    ours, theirs = logits(dense), logits(compressed)
    least = divergence(ours, theirs, s)
    assert all(least < divergence(ours, theirs, other) for other in (0.9 * s, 0.99 * s, 1.01 * s, 1.1 * s))
    again = sharpness * s
    sharpen(compressed, s)
    assert fitted(dense, compressed) == pytest.approx(1.0, abs=1e-3)
    assert again == pytest.approx(fitted(dense, sliced_model(dense)[0]), rel=1e-3), "whatever it started from"


def test_logits_that_are_kept_give_the_same_and_are_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = dense_model("llama")
    compressed, _ = sliced_model(dense)
    monkeypatch.setattr(temperature, "CHUNK_TOKENS", 10)
    found, made = [], []
    chunk = 10 * dense.config.vocab_size
    for most in (0, chunk, 100 * chunk):
        monkeypatch.setattr(temperature, "MOST_LOGITS", most)
        calls: list[int] = []
        hook = compressed.get_output_embeddings().register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found.append(fitted(dense, compressed))
        hook.remove()
        made.append(len(calls))
    assert found[0] == found[1] == found[2]
    num_chunks, steps = 3, made[0] // 3 - 1
    assert steps > 1 and made == [num_chunks * (1 + steps), 1 + (num_chunks - 1) * (1 + steps), num_chunks]


def test_of_the_dense_model_itself_it_is_one() -> None:
    dense = dense_model("opt")
    assert fitted(dense, dense) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("name", ["llama", "opt", "gemma3_text"])
def test_streams_that_go_layer_by_layer_are_the_models(name: str, batch_size: int) -> None:
    dense = dense_model(name)
    compressed, _ = sliced_model(dense)
    compared = Compared.of(Storage(dense), tokens(), batch_size=batch_size)
    for index, layers in enumerate(zip(decoder_layers(dense), decoder_layers(compressed), strict=True)):
        compared.advance(index, *layers)
    assert compared.inverse_temperature() == pytest.approx(fitted(dense, compressed), rel=1e-5)


def test_a_process_without_a_batch_goes_along() -> None:
    dense = dense_model("llama")
    first, second = (
        Compared.of(Storage(dense), tokens(), batch_size=2, world=World(rank=rank, size=2)) for rank in range(2)
    )
    for index, layer in enumerate(decoder_layers(dense)):
        second.advance(index, layer, layer)
    assert (
        [len(each.ids) for each in (first, second)] == [1, 0] == [len(each.dense.batches) for each in (first, second)]
    )


@pytest.mark.parametrize("name", [name for name in CONFIGS if "post-norm" not in name])
def test_logits_are_scaled_and_the_dense_model_is_left_alone(name: str) -> None:
    dense = dense_model(name)
    compressed, _ = sliced_model(dense)
    before, dense_before = logits(compressed), logits(dense)
    sharpen(compressed, 0.7)
    torch.testing.assert_close(logits(compressed), 0.7 * before, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(dense), dense_before)


def test_compression_ends_with_it_and_a_whole_model_stays_as_it_is() -> None:
    sharp, found = (MoDeGPTPlus(temperature=wanted).compress(task_on(dense_model("llama"))) for wanted in (False, True))
    s = found.details["inverse_temperature"]
    assert "inverse_temperature" not in sharp.details and s != 1.0
    theirs, ours = sharp.model.state_dict(), found.model.state_dict()
    assert [name for name in theirs if not torch.equal(theirs[name], ours[name])] == ["model.norm.weight"]
    torch.testing.assert_close(ours["model.norm.weight"], s * theirs["model.norm.weight"])
    dense = dense_model("llama")
    whole = MoDeGPTPlus().compress(task_on(dense, 0.0))
    assert "inverse_temperature" not in whole.details and torch.equal(logits(whole.model), logits(dense))


def test_a_model_without_a_final_norm_goes_without_it() -> None:
    found = MoDeGPTPlus().compress(task_on(dense_model("opt-post-norm-projected")))
    assert "inverse_temperature" not in found.details


def test_a_cut_has_no_text_to_scale_by() -> None:
    with pytest.raises(UserError, match=r"method\.temperature=false"):
        Switches(nested=True, sequential=False, refit=False, align=False)
