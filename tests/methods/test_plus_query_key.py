"""The states that the query-key selection looks at are the layer's own, and each key head takes what is best for it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modegpt.data.tokens import CalibrationTokens
from modegpt.decompositions import QueryKeyCR
from modegpt.decompositions.attention import AttentionStates, elimination_order
from modegpt.decompositions.modules import QueryKeyWeights
from modegpt.methods.base import CompressionTask
from modegpt.methods.plus import query_key
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.methods.plus.query_key import Candidate, SampledStates, candidates, choose, sample
from modegpt.methods.plus.streams import Split
from modegpt.models import decoder_layers, read_query_key
from tests.methods.protocol_checks import Seen, seen
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model

LENGTH = 20


def sampled(task: CompressionTask, *, num_windows: int = 8, queries: int = LENGTH - 1, seed: int = 0) -> SampledStates:
    """Of the first layer, on the dense stream."""
    split = Split.of(task.calibration.tokens.ids, batch_size=task.calibration.batch_size)
    return sample(
        task.family,
        decoder_layers(task.model)[0],
        0,
        task.calibration.embed(),
        split,
        num_windows=num_windows,
        queries_per_window=queries,
        precision=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )


def head_outputs(task: CompressionTask, layer: Seen) -> Tensor:
    """(windows, H, T, d_h): what every query head of the first layer adds, value bias included."""
    W_O = task.family.output(decoder_layers(task.model)[0]).weight.T
    num_heads = task.model.config.num_attention_heads
    states = layer.inputs["output"].reshape(*task.calibration.tokens.ids.shape, num_heads, -1)
    return torch.einsum("bthd,hdm->bhtm", states, W_O.unflatten(0, (num_heads, -1)))


FAMILIES = ["llama", "llama-multihead-biased", "mistral-window", "qwen2-windows", "qwen3", "opt", "gemma"]


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_of_the_sampled_states_is_the_layers_own(name: str) -> None:
    """Softmax scale, mask, window, norms and rotation included: the outputs of the states have the norms and inner
    products of what the layer adds, at all positions but the first.
    """
    task = task_of(dense_model(name), 0.3)
    states = sampled(task)
    [layer, *_] = seen(task.model, task.family, task.calibration.tokens.ids)
    added = head_outputs(task, layer)[:, :, 1:]
    held = torch.cat(Split.of(task.calibration.tokens.ids, batch_size=3).held).all(dim=1)
    for part, windows in ((states.fit, ~held), (states.held, held)):
        outputs = torch.cat([each.output() for each in part])
        expected = added[windows]
        torch.testing.assert_close(outputs @ outputs.mT, expected @ expected.mT, rtol=1e-3, atol=1e-4)


def test_the_grams_are_of_all_tokens_and_of_the_batches_with_enough_windows_to_fit_on() -> None:
    task = task_of(dense_model("llama"), 0.3)
    [whole, *_] = task.calibration.statistics(frozenset({"query_key.C_Q", "query_key.C_K"}))
    states = sampled(task, queries=3)
    torch.testing.assert_close(states.C_Q, whole["query_key.C_Q"])
    torch.testing.assert_close(states.C_K, whole["query_key.C_K"])
    two, first = sampled(task, num_windows=2, queries=3), task.calibration.tokens.ids[:3]
    fewer = replace(task.calibration, tokens=CalibrationTokens(first, sha256="", stream_tokens=0))
    [of_batch, *_] = fewer.statistics(frozenset({"query_key.C_K"}))
    torch.testing.assert_close(two.C_K, of_batch["query_key.C_K"])
    assert sum(len(part.q) for part in two.fit) == 2
    one = sampled(task, num_windows=1, queries=3)
    assert sum(len(part.q) for part in one.fit) == 1 and one.held == []


def test_positions_are_drawn_from_the_whole_window_by_the_seed_and_anew_for_each_batch() -> None:
    task = task_of(dense_model("llama"), 0.3)
    everywhere = sampled(task)

    def positions(states: SampledStates) -> list[list[int]]:
        """Which of all queries those of the first window of each batch are."""
        pairs = [(all_.q[0, 0], some.q[0, 0]) for all_, some in zip(everywhere.fit, states.fit, strict=True)]
        return [[1 + int((q - of).norm(dim=1).argmin()) for of in some] for q, some in pairs]

    drawn = [positions(sampled(task, queries=5, seed=seed)) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for of_batches in drawn:
        assert all(each == sorted(set(each)) and len(each) == 5 for each in of_batches)
        assert len(set(map(tuple, of_batches))) == len(of_batches)
    assert {place for draw in drawn for each in draw for place in each} > {LENGTH - 1, LENGTH // 2}


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_candidates_are_the_papers_dims_those_of_the_logits_and_those_of_the_output(name: str) -> None:
    """All keep dims, the latter two of the singular basis, as they are; each choice is worked out head by head."""
    task = task_of(dense_model(name), 0.3)
    weights, states = read_query_key(task.family, decoder_layers(task.model)[0]), sampled(task)
    found = candidates(weights, states, 4, improved=True)
    assert [each.name for each in found] == ["paper", "logits", "output"]
    statistics = {"query_key.C_Q": states.C_Q, "query_key.C_K": states.C_K}
    paper = QueryKeyCR()(weights, statistics, 4, torch.Generator())
    size, groups = weights.inner_size, len(states.C_K)
    chosen = torch.eye(size, dtype=torch.float64)[paper.kept].mT
    assert torch.equal(found[0].T_K, chosen) and torch.equal(found[0].T_Q, chosen.repeat_interleave(4 // groups, dim=0))
    assert torch.equal(paper.kept, found[0].kept)
    T_Q, T_K = full_basis(weights, states)
    C_Q, C_K = T_Q.mT @ states.C_Q @ T_Q, T_K.mT @ states.C_K @ T_K
    pairs = name == "llama"
    M = (C_Q.unflatten(0, (groups, -1)).sum(dim=1) * C_K).unflatten(2, (-1, size // 2) if pairs else (1, -1)).sum(dim=2)
    M = M.unflatten(1, (-1, size // 2) if pairs else (1, -1)).sum(dim=1)
    for head in range(groups):
        gone = list(elimination_order(M[head], len(M[head]) - (2 if pairs else 4))[0])
        blocks = sorted({*range(len(M[head]))} - {int(each) for each in gone})
        assert found[1].kept[head].tolist() == blocks + [block + size // 2 for block in blocks] * pairs
    for improved in found[1:]:
        torch.testing.assert_close(improved.T_K, T_K.gather(2, improved.kept.unsqueeze(1).expand(-1, size, -1)))
        of_heads = improved.kept.repeat_interleave(4 // groups, dim=0)
        torch.testing.assert_close(improved.T_Q, T_Q.gather(2, of_heads.unsqueeze(1).expand(-1, size, -1)))
    assert [each.name for each in candidates(weights, states, 4, improved=False)] == ["paper"]


def full_basis(weights: QueryKeyWeights, states: SampledStates) -> tuple[Tensor, Tensor]:
    """The basis that improved candidates without RoPE work in: what QueryKeySVD makes of identity maps at full rank."""
    if weights.rope:
        identity = torch.eye(weights.inner_size, dtype=torch.float64)
        return identity.expand_as(states.C_Q), identity.expand_as(states.C_K)
    return query_key._singular_basis(states.C_Q, states.C_K)


def random_states(generator: torch.Generator, *, windows: int = 3) -> AttentionStates:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return AttentionStates(normal(windows, 4, 5, 8), normal(windows, 2, 9, 8), normal(windows, 4, 9, 3), torch.zeros(1))


def test_each_key_head_takes_the_candidate_that_errs_least_for_its_own_query_heads() -> None:
    """On all held-out states together, of random ones that each keep other dims."""
    generator = torch.Generator().manual_seed(4)
    held = [random_states(generator), random_states(generator, windows=1)]
    weights = QueryKeyWeights(
        W_Q=torch.randn(4, 6, 8, generator=generator), W_K=torch.randn(2, 6, 8, generator=generator), rope=False
    )
    found = []
    for number in range(6):
        kept = torch.stack([torch.randperm(8, generator=generator)[:5] for _ in range(2)])
        T_K = torch.eye(8, dtype=torch.float64)[kept].mT
        found.append(Candidate(str(number), kept, (1 + 0.1 * number) * T_K.repeat_interleave(2, dim=0), T_K))
    lost, energy = torch.zeros(6, 2, dtype=torch.float64), 0.0
    for states in held:
        dense = states.output()
        energy += float(dense.square().sum())
        for number, candidate in enumerate(found):
            changed = (states.output(candidate.T_Q, candidate.T_K) - dense).square().sum(dim=(0, 2, 3))
            lost[number] += torch.stack([changed[:2].sum(), changed[2:].sum()])
    best = lost.argmin(dim=0).tolist()
    assert best[0] != best[1], "the heads disagree"
    sampled = SampledStates(torch.zeros(4, 8, 8), torch.zeros(2, 8, 8), fit=[], held=held)
    choice = choose(weights, found, sampled)
    assert choice.names == [str(number) for number in best]
    assert choice.relative_error == pytest.approx(
        float(sum(lost[number, head] for head, number in enumerate(best))) / energy
    )
    assert choice.held_out == pytest.approx(
        {str(number): float(each.sum()) / energy for number, each in enumerate(lost)}
    )
    for head in range(4):
        T_Q, T_K = found[best[head // 2]].T_Q[head], found[best[head // 2]].T_K[head // 2]
        torch.testing.assert_close(choice.weights.W_Q[head], (weights.W_Q[head].double() @ T_Q).float())
        torch.testing.assert_close(choice.weights.W_K[head // 2], (weights.W_K[head // 2].double() @ T_K).float())
    tied = choose(weights, [found[2], replace(found[2], name="same")], sampled)
    assert tied.names == ["2", "2"], "ties go to the earlier"


@pytest.mark.parametrize("name", ["llama", "mistral-window", "opt"])
def test_the_weights_give_the_error_that_is_reported(name: str) -> None:
    """Of the first layer, which has nothing reduced before it: what its attention adds on the held-out windows."""
    own = {"mlp": 0.0, "value_output": 0.0, "query_key": 0.5}
    task = task_of(dense_model(name), 0.1)
    method = MoDeGPTPlus(
        module_sparsity=own, allocation="uniform", align=False, refit=False, queries_per_window=LENGTH - 1
    )
    compressed, ids = method.compress(task), task.calibration.tokens.ids
    held = torch.cat(Split.of(ids, batch_size=3).held).all(dim=1)
    dense, small = (
        head_outputs(task, seen(model, task.family, ids)[0])[held][:, :, 1:].double()
        for model in (task.model, compressed.model)
    )
    reported = compressed.layers[0]["relative_error"]["query_key"]
    assert reported == pytest.approx(float((small - dense).square().sum() / dense.square().sum()), rel=1e-2)


def test_the_positions_of_a_run_are_those_of_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[int]] = []
    original = query_key._positions

    def noted(length: int, num_queries: int, generator: torch.Generator) -> Tensor:
        drawn.append(original(length, num_queries, generator).tolist())
        return torch.tensor(drawn[-1])

    monkeypatch.setattr(query_key, "_positions", noted)
    runs = []
    for seed in (0, 0, 1):
        drawn.clear()
        method = MoDeGPTPlus(allocation="uniform", queries_per_window=4, query_key_windows=5)
        method.compress(replace(task_of(dense_model("llama"), 0.3), seed=seed))
        runs.append(list(drawn))
    assert runs[0] == runs[1] != runs[2] and all(len(each) == 4 for each in runs[0])
    assert len(set(map(tuple, runs[0]))) > 3, "another draw for each layer and batch"
