"""SVD-LLM: the truncation loss is the dropped singular values; the update is a least-squares optimum."""

import itertools
from dataclasses import replace

import pytest
import torch

from modegpt.decompositions.linalg import psd_cholesky
from modegpt.errors import UserError
from modegpt.methods.asvd import channel_scale, scaled_truncation
from modegpt.methods.low_rank import (
    INPUT_GRAM,
    INPUT_GRAMS,
    Truncation,
    block_linears,
    input_grams,
    input_statistics,
    paths,
)
from modegpt.methods.svd_llm import SVDLLM, refit_output_factor, whitened_truncation
from modegpt.models import decoder_layers
from tests.methods.protocol_checks import (
    FORMS,
    check_compression,
    check_saved_and_generating,
    check_what_decides,
    check_zero_sparsity,
    linear_errors,
)
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model


def correlated(channels: int, num_rows: int = 300) -> torch.Tensor:
    return torch.randn(num_rows, channels, dtype=torch.float64) @ torch.randn(channels, channels, dtype=torch.float64)


@pytest.mark.parametrize(("rows", "columns"), [(12, 7), (7, 12)])
def test_loss_of_truncation_is_the_dropped_singular_values(rows: int, columns: int):
    X, W = correlated(rows), torch.randn(rows, columns, dtype=torch.float64)
    factor = psd_cholesky(X.T @ X)
    S = torch.linalg.svdvals(factor.root().T @ W)
    for rank in range(1, min(rows, columns)):
        result = whitened_truncation(W, factor, rank)
        loss = (X @ (W - result.factors.A @ result.factors.B)).norm().item()
        assert loss == pytest.approx(S[rank:].norm().item(), rel=1e-8)
    # Dropping the last singular value alone costs exactly that value: section 3.1's claim.
    assert loss == pytest.approx(S[-1].item(), rel=1e-8)


def test_no_low_rank_weight_does_better_on_the_data():
    X, W = correlated(10), torch.randn(10, 8, dtype=torch.float64)
    C = X.T @ X

    def loss(A, B):
        return (X @ (W - A @ B)).square().sum().item()

    ours = whitened_truncation(W, psd_cholesky(C), 3).factors
    best = loss(ours.A, ours.B)
    assert best < loss(*vars(scaled_truncation(W, channel_scale(C, alpha=1.0), 3).factors).values())
    S = torch.linalg.svdvals(X @ W)  # the best rank-3 outputs, weights aside
    assert best == pytest.approx(S[3:].square().sum().item(), rel=1e-8)


def test_rank_deficient_inputs_are_reported_and_lose_nothing():
    X, W = correlated(10, num_rows=6), torch.randn(10, 8, dtype=torch.float64)
    result = whitened_truncation(W, psd_cholesky(X.T @ X), 6)
    assert result.numerics["jitter"] > 0
    assert (X @ (W - result.factors.A @ result.factors.B)).norm() < 1e-3 * (X @ W).norm()


def test_update_is_the_least_squares_optimum_on_the_new_inputs():
    W = torch.randn(10, 8, dtype=torch.float64)
    X, X_new = correlated(10), correlated(10)
    whitened = whitened_truncation(W, psd_cholesky(X.T @ X), 4)
    updated = refit_output_factor(W, whitened, X_new.T @ X_new)
    A = whitened.factors.A
    assert torch.equal(updated.factors.A, A)
    torch.testing.assert_close(
        updated.factors.B, torch.linalg.lstsq(X_new @ A, X_new @ W).solution, rtol=1e-7, atol=1e-9
    )
    error = (X_new @ (W - A @ updated.factors.B)).square().sum() / (X_new @ W).square().sum()
    assert updated.relative_error == pytest.approx(error.item(), rel=1e-8)


def test_update_on_the_same_inputs_changes_nothing():
    X, W = correlated(10), torch.randn(10, 8, dtype=torch.float64)
    whitened = whitened_truncation(W, psd_cholesky(X.T @ X), 4)
    torch.testing.assert_close(
        refit_output_factor(W, whitened, X.T @ X).factors.B, whitened.factors.B, rtol=1e-7, atol=1e-9
    )


def test_update_sees_the_compressed_stream():
    """Layer 0 has the dense model's inputs; later layers solve least squares on the compressed model's activations."""
    model = dense_model("llama").double()
    plain, updated = (SVDLLM(update=update).compress(task_of(model, 0.4)) for update in (False, True))
    task = task_of(model, 0.4)
    layers = list(zip(decoder_layers(model), decoder_layers(plain.model), decoder_layers(updated.model), strict=True))
    hidden = task.calibration.embed()
    for index, (dense, before, after) in enumerate(layers):
        inputs = {}
        hooks = [
            linear.register_forward_pre_hook(
                lambda _, args, role=role, inputs=inputs: inputs.setdefault(role, []).append(args[0].flatten(0, 1))
            )
            for role, linear in block_linears(task.family, dense).items()
        ]
        with torch.no_grad():
            for x in hidden.batches:
                dense(x, **hidden.layer_arguments(index, x))
            hidden.batches = [after(x, **hidden.layer_arguments(index, x)) for x in hidden.batches]
        for hook in hooks:
            hook.remove()
        for role, linear in block_linears(task.family, dense).items():
            B_before, refitted = getattr(task.family, role)(before).B.weight.T, getattr(task.family, role)(after)
            A, B = refitted.A.weight.T, refitted.B.weight.T
            X = torch.cat(inputs[role])
            torch.testing.assert_close(B, torch.linalg.lstsq(X @ A, X @ linear.weight.T).solution, rtol=1e-4, atol=1e-5)
            assert torch.allclose(B, B_before, rtol=1e-4, atol=1e-5) == (index == 0), (index, role)


def test_relative_error_is_that_of_each_linears_output():
    model = dense_model("qwen2")
    task = task_of(model, 0.4)
    compressed = SVDLLM().compress(task)
    grams = list(task_of(model, 0.4).calibration.statistics(INPUT_GRAMS))
    layers = zip(decoder_layers(model), decoder_layers(compressed.model), compressed.layers, grams, strict=True)
    for dense, layer, report, statistics in layers:
        for role, linear in block_linears(task.family, dense).items():
            factored, C = getattr(task.family, role)(layer), statistics[INPUT_GRAM[role]]
            W = linear.weight.T.double()
            E = W - factored.A.weight.T.double() @ factored.B.weight.T.double()
            assert report["relative_error"][role] == pytest.approx(
                ((E * (C @ E)).sum() / (W * (C @ W)).sum()).item(), rel=1e-3
            )


@pytest.mark.parametrize("update", [False, True])
def test_maps_of_experts_are_truncated_on_the_tokens_that_reach_them(update: bool) -> None:
    """Each by its own inputs: those of the dense layer, in the dense stream or behind the compressed layers."""
    model = dense_model("mixtral")
    task = task_of(model, 0.4, num_samples=30)
    compressed = SVDLLM(update=update).compress(task)
    index = 1
    layer, cut = (decoder_layers(each)[index] for each in (model, compressed.model))
    report = compressed.layers[index]
    linears, own = block_linears(task.family, layer), paths(task.family, 4)
    seen: dict[str, list[torch.Tensor]] = {role: [] for role in linears}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, role=role: seen[role].append(args[0].flatten(0, -2)))
        for role, linear in linears.items()
    ]
    hidden = task.calibration.embed()
    with torch.no_grad():
        for x in hidden.batches:
            for before in decoder_layers(compressed.model if update else model)[:index]:
                x = before(x, **hidden.layer_arguments(index, x))
            layer(x, **hidden.layer_arguments(index, x))
    for hook in hooks:
        hook.remove()
    assert {"up.0", "gate.1", "down.3", "query"} <= report["relative_error"].keys() == linears.keys()
    for role, linear in linears.items():
        X, W = torch.cat(seen[role]).double(), linear.weight.detach().double().T
        factored = cut.get_submodule(own[role])
        A, B = (factor.weight.detach().double().T for factor in (factored.A, factored.B))
        lost = float((X @ (W - A @ B)).square().sum() / (X @ W).square().sum())
        assert report["relative_error"][role] == pytest.approx(lost, rel=1e-3)
        if not update:
            S = torch.linalg.svdvals(X @ W)
            assert lost == pytest.approx(float(S[A.shape[1] :].square().sum() / S.square().sum()), rel=1e-3)


def test_an_expert_that_no_token_reaches_is_truncated_by_its_weights() -> None:
    model = dense_model("mixtral")
    layer, task = decoder_layers(model)[0], task_of(model, 0.4, num_samples=30)
    [statistics, *_] = task.calibration.statistics(input_statistics(task.family))
    statistics["experts.share"][2] = 0
    for name in ("experts.C", "experts.C_x"):
        statistics[name][2] = 0
    grams = input_grams(task.family, layer, statistics)
    torch.testing.assert_close(grams["experts.C_x.2"], torch.eye(32, dtype=torch.float64))
    assert torch.equal(grams["experts.C_x.1"], statistics["experts.C_x"][1])
    assert grams["experts.C.2"].diagonal().min() > 0
    assert grams["attention.C_x"] is statistics["attention.C_x"]


@pytest.mark.parametrize(("form", "update"), [*((form, False) for form in FORMS), ("llama", True), ("opt", True)])
def test_protocol(form: str, update: bool):
    method = SVDLLM(update=update)
    check_zero_sparsity(method, form)
    outputs = None if update else linear_errors(lambda C: C)
    check_compression(method, form, 0.4, tolerance=0.01, errors=outputs)


def test_the_calibration_text_decides() -> None:
    check_what_decides(SVDLLM(), "llama")
    check_what_decides(SVDLLM(update=True), "opt")


def test_passes_are_counted():
    for update, passes in ((False, 1), (True, 3)):
        task = task_of(dense_model("llama"), 0.4)
        SVDLLM(update=update).compress(task)
        assert task.calibration.meter.forward_passes == pytest.approx(passes)
        assert task.calibration.meter.calibration_tokens == task.calibration.tokens.num_tokens


def test_saved_and_generating(tmp_path):
    check_saved_and_generating(SVDLLM(update=True), "llama", 0.4, tmp_path)


@pytest.mark.parametrize("broken", [0, 1])
def test_an_update_from_too_few_tokens_says_which_model_and_why(broken: int, monkeypatch: pytest.MonkeyPatch):
    """The dense model is well on these tokens; the compressed one is not, from the layer on whose update overflows."""
    task, layers = task_of(dense_model("opt"), 0.3, num_samples=1, sequence_length=4), itertools.count()
    SVDLLM().compress(task)

    def refitted(family: object, layer: object, truncations: dict[str, Truncation], inputs: object):
        factor = torch.inf if next(layers) == broken else 1
        return {
            role: replace(each, factors=replace(each.factors, B=each.factors.B * factor))
            for role, each in truncations.items()
        }

    monkeypatch.setattr(SVDLLM, "_refit", staticmethod(refitted))
    with pytest.raises(UserError) as raised:
        SVDLLM(update=True).compress(task)
    said = str(raised.value)
    assert f"the compressed model gives NaN or inf at layer {broken}" in said and "method.update=false" in said
    assert "4 calibration tokens do not determine the update of 40 input features" in said
