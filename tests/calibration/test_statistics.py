"""What it takes to add a statistic and a decomposition that reads it: one entry, and one class."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from modegpt.allocation.policies import Uniform
from modegpt.calibration.statistics import STATISTICS, Statistic
from modegpt.decompositions.modules import MLPVariant, MLPWeights, Reduction, Sizes, Statistics
from modegpt.decompositions.selection import keep_mlp, largest
from modegpt.methods.modegpt import MoDeGPT
from modegpt.models import decoder_layers, dense_shape, read_mlp, read_mlps
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model


@dataclass(frozen=True)
class Loudest(MLPVariant):
    """The channels whose inputs to the gate are largest on average."""

    label: ClassVar[str] = "Loudest"
    required: ClassVar[frozenset[str]] = frozenset({"mlp.loudness"})

    def reduce(
        self, weights: MLPWeights[Tensor], statistics: Statistics, rank: int, generator: torch.Generator
    ) -> Reduction[MLPWeights[Tensor]]:
        kept = largest(statistics["mlp.loudness"], rank)
        return Reduction(keep_mlp(weights, kept), relative_error=0.0, kept=kept)

    def solver_elements(self, sizes: Sizes, rank: int) -> int:
        return rank


def test_a_new_statistic_is_one_entry_and_a_new_decomposition_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    statistic = Statistic(("n",), "gate", "output", lambda observer, states: states.abs())
    monkeypatch.setitem(STATISTICS, "mlp.loudness", statistic)
    model = dense_model("llama")
    task = task_of(model, 0.3)
    gates: list[Tensor] = []
    layer = decoder_layers(model)[0]
    handle = task.family.gate(layer).register_forward_hook(lambda _, __, out: gates.append(out.abs().flatten(0, 1)))
    with torch.no_grad():
        model(task.calibration.tokens.ids, use_cache=False)
    handle.remove()
    method = MoDeGPT(mlp=Loudest(), query_key=None, value_output=None, allocation=Uniform())
    compressed = method.compress(task)
    width = compressed.layers[0]["ranks"]["mlp"]
    kept = torch.cat(gates).double().mean(dim=0).topk(width).indices.sort().values
    smaller = read_mlp(task.family, decoder_layers(compressed.model)[0])
    assert 0 < width < read_mlp(task.family, layer).inner_size
    assert torch.equal(smaller.W_U, read_mlp(task.family, layer).W_U[:, kept])
    assert statistic.num_elements(Sizes(d_h=2, n=5, H=3, H_kv=1, d=4)) == 5


def test_tokens_are_counted_and_means_are_over_them() -> None:
    """Not windows, nor batches: 8 windows of 20 tokens in batches of 3."""
    calibration = task_of(dense_model("llama"), 0.0).calibration
    for statistics in calibration.statistics(frozenset({"layer.num_tokens", "mlp.mean", "mlp.C"})):
        num_tokens, mean, C = (statistics[name] for name in ("layer.num_tokens", "mlp.mean", "mlp.C"))
        assert num_tokens == 160
        spread = torch.linalg.eigvalsh(C / num_tokens - torch.outer(mean, mean))
        assert spread.min() > -1e-9 and 0.1 < spread.sum() / (C.trace() / num_tokens) < 1, "a covariance"


def test_sizes_follow_from_shapes() -> None:
    sizes = Sizes(d_h=2, n=5, H=3, H_kv=1, d=4)
    counts = {name: statistic.num_elements(sizes) for name, statistic in STATISTICS.items()}
    assert counts["mlp.C"] == 25 and counts["query_key.C_K"] == 16 and counts["query_key.C_Q"] == 48
    assert counts["value_output.C_o"] == 144 and counts["layer.num_tokens"] == 1
    assert {name for name, statistic in STATISTICS.items() if statistic.is_gram} == {
        name
        for name in STATISTICS
        if name.rpartition(".")[2] in ("C", "C_x", "C_Q", "C_K", "C_o", "G", "A", "S", "N_Q", "N_K")
    }


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "olmo2"])
def test_shares_of_head_norms_are_those_of_the_states_in_front_of_them(name: str) -> None:
    model = dense_model(name)
    task = task_of(model, 0.3)
    layer, config = decoder_layers(model)[1], model.config
    shape = dense_shape(config)
    H, d = config.num_attention_heads, shape.qk_head_dim
    sizes = Sizes(d_h=32, n=40, H=H, H_kv=shape.num_kv_heads, d=d, joint_norms=task.family.joint_norms)
    seen: dict[str, list[Tensor]] = {"N_Q": [], "N_K": []}
    handles = [
        linear(layer).register_forward_hook(lambda _, __, out, states=seen[role]: states.append(out.flatten(0, 1)))
        for role, linear in (("N_Q", task.family.query), ("N_K", task.family.key))
    ]
    with torch.no_grad():
        model(task.calibration.tokens.ids, use_cache=False)
    for handle in handles:
        handle.remove()
    found = list(task.calibration.statistics(frozenset({"query_key.N_Q", "query_key.N_K"})))[1]
    for role, states in seen.items():
        x = torch.cat(states).double()
        x = x.unsqueeze(1) if task.family.joint_norms else x.unflatten(1, (-1, d))  # tokens, norms, dims
        n = x.square().mean(dim=-1, keepdim=True) + config.rms_norm_eps
        by_head = (x.square() / x.shape[-1] / n).unflatten(-1, (-1, 2, d // 2)).sum(dim=-2).flatten(-2)
        shares = torch.cat([by_head, 1 / n], dim=-1)
        expected = torch.einsum("tgi,tgj->gij", shares, shares)
        N = found[f"query_key.{role}"]
        torch.testing.assert_close(N, expected, rtol=1e-4, atol=1e-6)
        assert N.numel() == STATISTICS[f"query_key.{role}"].num_elements(sizes)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_experts_are_seen_on_their_tokens_as_these_enter_the_sum(name: str) -> None:
    model = dense_model(name)
    task = task_of(model, 0.3)
    layer = decoder_layers(model)[1]
    block: Any = layer.mlp
    seen: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(task.calibration.tokens.ids, use_cache=False)
        handle.remove()
        x = torch.cat(seen)
        _, shares, chosen = block.gate(x)
    means = {"experts.mean", "experts.mean_square"}
    names = frozenset({"experts.C", "experts.C_x", "experts.share", "layer.num_tokens", *means})
    found = list(task.calibration.statistics(names))[1]
    for index, expert in enumerate(read_mlps(task.family, layer).experts):
        token, place = torch.where(chosen == index)
        with torch.no_grad():
            h = torch.nn.functional.silu(x[token] @ expert.W_G) * (x[token] @ expert.W_U)
        h = (h * shares[token, place].unsqueeze(1)).double()
        torch.testing.assert_close(found["experts.C"][index], h.mT @ h, rtol=1e-4, atol=1e-5)
        for mean, rows in (("experts.mean", h), ("experts.mean_square", h.square())):
            torch.testing.assert_close(found[mean][index], rows.sum(dim=0) / len(x), rtol=1e-4, atol=1e-6)
        read = x[token].double()
        torch.testing.assert_close(found["experts.C_x"][index], read.mT @ read, rtol=1e-4, atol=1e-5)
        assert float(found["experts.share"][index]) * int(found["layer.num_tokens"]) == pytest.approx(len(token))
    assert float(found["experts.share"].sum()) == pytest.approx(2), "each token sees two experts"
    sizes = Sizes(d_h=32, n=40, H=4, H_kv=2, d=8, E=4)
    for name in ("experts.C", "experts.C_x", *means):
        assert STATISTICS[name].num_elements(sizes) == found[name].numel()
    [alone, *_] = task.calibration.statistics(frozenset({"experts.C_x"}))
    assert alone["experts.C_x"].shape == (4, 32, 32) and "experts.C" not in alone
