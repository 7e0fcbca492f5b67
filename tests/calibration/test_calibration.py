"""Layer-by-layer statistics against the model's own forward in one go, for every family."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from modegpt.calibration.cache import StatisticsCache
from modegpt.calibration.calibration import Calibration
from modegpt.calibration.statistics import STATISTICS, sizes_of
from modegpt.errors import UserError
from modegpt.models import decoder_layers, dense_shape, family_of
from tests.methods.task_of import task_of
from tests.models.family_table import ONE_MLP, dense_model, statistics_of


def calibration_of(name: str, cache: StatisticsCache | None = None) -> Calibration:
    calibration = task_of(dense_model(name), 0.0).calibration
    calibration.cache = cache
    return calibration


def inputs_and_outputs(calibration: Calibration) -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
    """Every linear's (input, output) over all tokens, float64, from one ordinary forward; and the residual stream."""
    model = calibration.model
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    family = family_of(model.config)

    def keep(key: str):
        return lambda _, args, out: seen.__setitem__(
            key, (args[0].reshape(-1, args[0].shape[-1]).double(), out.reshape(-1, out.shape[-1]).double())
        )

    handles = []
    for index, layer in enumerate(decoder_layers(model)):
        for role in ("query", "key", "value", "output", "up", "down"):
            handles.append(getattr(family, role)(layer).register_forward_hook(keep(f"{index}.{role}")))
    residual: dict[int, Tensor] = {}
    for index, layer in enumerate(decoder_layers(model)):
        handles.append(
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, i=index: residual.__setitem__(i, args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        )
    handles.append(
        decoder_layers(model)[-1].register_forward_hook(
            lambda _, __, out: residual.__setitem__(len(decoder_layers(model)), out)
        )
    )
    with torch.no_grad():
        model(calibration.tokens.ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen, tuple(residual[i] for i in range(len(residual)))


def gram(rows: Tensor) -> Tensor:
    return rows.mT @ rows


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ONE_MLP)
def test_statistics_equal_brute_force(name: str) -> None:
    calibration = calibration_of(name)
    d = dense_shape(calibration.model.config).qk_head_dim
    names = statistics_of(calibration.family)
    seen, residual = inputs_and_outputs(calibration)
    for index, (layer, statistics) in enumerate(
        zip(decoder_layers(calibration.model), calibration.statistics(names), strict=True)
    ):
        assert statistics.keys() == names
        heads = {
            role: seen[f"{index}.{role}"][1].unflatten(-1, (-1, d)).transpose(0, 1)
            for role in ("query", "key", "value")
        }
        b_V = calibration.family.value(layer).bias
        bias = torch.zeros(len(heads["value"]), d) if b_V is None else b_V.detach().view(-1, d)
        group = len(heads["query"]) // len(heads["value"])
        attended = seen[f"{index}.output"][0]
        mixed = attended.unflatten(-1, (-1, d)).transpose(0, 1) - bias.double().repeat_interleave(group, 0).unsqueeze(1)
        hidden = seen[f"{index}.down"][0]
        close(statistics["attention.C_x"], gram(seen[f"{index}.query"][0]))
        close(statistics["value_output.G"], gram(heads["value"] - bias.double().unsqueeze(1)))
        close(statistics["value_output.C_o"], gram(attended))
        close(statistics["value_output.A"], gram(mixed))
        close(statistics["value_output.mean"], mixed.mean(dim=1))
        close(statistics["mlp.C_x"], gram(seen[f"{index}.up"][0]))
        close(statistics["mlp.C"], gram(hidden))
        close(statistics["mlp.mean"], hidden.mean(dim=0))
        for role, key in (("query", "query_key.C_Q"), ("key", "query_key.C_K")):
            states = heads[role]
            if not calibration.family.head_norms:  # without a head norm, rotation keeps each pair's energy
                close(pair_energy(statistics[key]), pair_energy(gram(states)))
        assert statistics["layer.num_tokens"] == len(hidden)
        influence = 1 - cosine_similarity(residual[index].double(), residual[index + 1].double(), dim=-1).mean()
        assert float(statistics["layer.influence"]) == pytest.approx(float(influence), abs=1e-5)


def pair_energy(C: Tensor) -> Tensor:
    first, second = C.diagonal(dim1=-2, dim2=-1).chunk(2, dim=-1)
    return first + second


@pytest.mark.parametrize(
    "name", ["llama", "llama3-rope-tied", "qwen3", "gemma3_text", "olmo2", "smollm3", "mistral-window", "opt"]
)
def test_query_key_states_are_those_the_attention_multiplies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the queries and keys that reach the attention function itself: after bias, head norm and rotation."""
    calibration = calibration_of(name)
    received: list[tuple[Tensor, Tensor]] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, *args, **kwargs) -> Tensor:
        received.append((query.double(), key.double()))
        return attention(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        calibration.model(calibration.tokens.ids, use_cache=False)
    monkeypatch.undo()
    config = calibration.model.config
    num_heads, num_kv_heads = config.num_attention_heads, dense_shape(config).num_kv_heads
    scale = dense_shape(config).qk_head_dim ** 0.5 if name == "opt" else 1.0  # OPT scales its queries beforehand
    for (query, key), statistics in zip(
        received, calibration.statistics(frozenset({f"query_key.{of}" for of in ("C_Q", "C_K", "mean_K")})), strict=True
    ):
        key = key if key.shape[1] == num_kv_heads else key[:, :: num_heads // num_kv_heads]
        close(statistics["query_key.C_Q"], torch.einsum("bhti,bhtj->hij", query * scale, query * scale))
        close(statistics["query_key.C_K"], torch.einsum("bhti,bhtj->hij", key, key))
        close(statistics["query_key.mean_K"], key.mean(dim=(0, 2)))


def test_influence_alone_collects_nothing_else() -> None:
    calibration = calibration_of("llama")
    influence = calibration.block_influence(also=frozenset({"mlp.C"}))
    assert influence.shape == (3,) and (influence > 0).all()
    assert calibration.meter.forward_passes == pytest.approx(1.0)
    assert calibration.meter.calibration_tokens == calibration.tokens.num_tokens
    assert calibration.meter.stages["influence"].of("forward") > 0 == calibration.meter.stages["influence"].of("gram")


def test_the_cache_replaces_the_forward(tmp_path: Path) -> None:
    names = frozenset({"mlp.C", "value_output.G"})
    plain = list(calibration_of("llama").statistics(names))
    cache = StatisticsCache(root=tmp_path, key="k", max_bytes=10**8)
    first = calibration_of("llama", cache)
    first.block_influence(also=names)
    again = calibration_of("llama", cache)
    cached = list(again.statistics(names))
    assert again.meter.forward_passes == 0
    assert all(torch.equal(one[name], other[name]) for one, other in zip(plain, cached, strict=True) for name in names)


def test_a_cache_with_a_gap_is_completed(tmp_path: Path) -> None:
    """A layer or a statistic that is missing (a killed run, another variant) is collected; the rest is read."""
    cache = StatisticsCache(root=tmp_path, key="k", max_bytes=10**8)
    whole = list(calibration_of("llama", cache).statistics(frozenset({"mlp.C"})))
    (cache.directory / "layer001.mlp.C.safetensors").unlink()
    repaired = calibration_of("llama", cache)
    assert all(
        torch.equal(one["mlp.C"], other["mlp.C"])
        for one, other in zip(whole, repaired.statistics(frozenset({"mlp.C"})), strict=True)
    )
    assert repaired.meter.forward_passes == pytest.approx(2 / 3)
    wider = list(calibration_of("llama", cache).statistics(frozenset({"mlp.C", "mlp.mean"})))
    reference = list(calibration_of("llama").statistics(frozenset({"mlp.mean"})))
    assert all(torch.equal(one["mlp.mean"], other["mlp.mean"]) for one, other in zip(wider, reference, strict=True))


def test_activations_that_overflow_name_their_layer() -> None:
    calibration = calibration_of("llama")
    with torch.no_grad():
        decoder_layers(calibration.model)[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(UserError, match="decoder layer 1"):
        list(calibration.statistics(frozenset({"mlp.C"})))


def test_the_model_is_left_as_it_was() -> None:
    calibration = calibration_of("opt")
    before = {name: tensor.clone() for name, tensor in calibration.model.state_dict().items()}
    list(calibration.statistics(statistics_of(calibration.family)))
    assert all("forward" not in vars(layer) for layer in decoder_layers(calibration.model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in calibration.model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in calibration.model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_products_are_formed_in_the_precision_asked_for(name: str) -> None:
    """float32 rounds what float64 does not, of every Gram matrix; the sums are float64 either way."""
    found = []
    for precision in (torch.float64, torch.float32):
        calibration = calibration_of(name)
        calibration.precision = precision
        grams = frozenset(each for each in statistics_of(calibration.family) if STATISTICS[each].is_gram)
        grams |= {"experts.C"} if name == "mixtral" else set()
        statistics = next(calibration.statistics(grams))
        found.append({each: statistics[each] for each in grams})
    for each, exact in found[0].items():
        rounded = found[1][each]
        assert exact.dtype == rounded.dtype == torch.float64 and not torch.equal(exact, rounded), each
        torch.testing.assert_close(exact, rounded, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def test_the_letters_of_a_layer_are_those_of_its_model() -> None:
    sizes = sizes_of(dense_model("mixtral").config)
    assert (sizes.d_h, sizes.n, sizes.H, sizes.H_kv, sizes.d, sizes.E) == (32, 40, 4, 2, 8, 4)
    assert sizes_of(dense_model("llama").config).E == 1 and not sizes.joint_norms
    assert sizes_of(dense_model("olmo2").config).joint_norms
