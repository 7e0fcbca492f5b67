"""LEMS: the error model is the measured divergence scaled by lost energy, and its integer program is solved exactly."""

import itertools

import pytest
import torch

from modegpt.decompositions.linalg import psd_cholesky
from modegpt.errors import UserError
from modegpt.methods.divergence import Predictions, kl_divergence
from modegpt.methods.lems import (
    LEMS,
    SMALLEST_KEPT,
    TEMPERATURE,
    Spectrum,
    clipped,
    compared_positions,
    equal_rank,
    propagation_bias,
    shrunk,
)
from modegpt.methods.low_rank import INPUT_GRAM, INPUT_GRAMS, block_linears
from modegpt.methods.svd_llm import whitened_truncation
from modegpt.models import FAMILIES, block_linear_parameters, decoder_layers
from tests.methods.protocol_checks import (
    FORMS,
    check_compression,
    check_saved_and_generating,
    check_what_decides,
    check_zero_sparsity,
)
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_lower_ranks_are_the_truncations_themselves_and_lose_their_singular_values(shape: tuple[int, int]) -> None:
    linear = torch.nn.Linear(*shape, dtype=torch.float64)
    X = torch.randn(300, shape[0], dtype=torch.float64) @ torch.randn(shape[0], shape[0], dtype=torch.float64)
    W, C = linear.weight.detach().T, X.T @ X
    spectrum = Spectrum.of(linear, C, 0.1)
    assert spectrum.measured == 1 == equal_rank(linear) // 10
    S = torch.linalg.svdvals(X @ W).square()
    for rank in range(1, len(spectrum.lost)):
        truncation = spectrum.at(rank)
        assert truncation.relative_error == pytest.approx(float(S[rank:].sum() / S.sum()), rel=1e-6)
        same = whitened_truncation(W, psd_cholesky(C), rank).factors
        torch.testing.assert_close(truncation.factors.A @ truncation.factors.B, same.A @ same.B)
    assert spectrum.lost[0] == 1 and (spectrum.lost.diff() <= 0).all()


def test_with_kfac_no_factors_do_better_in_the_metric_of_inputs_and_gradients() -> None:
    """The truncation is the best of its rank: the error is the dropped singular values of ``X W R``."""
    linear = torch.nn.Linear(20, 30, dtype=torch.float64)
    X, D = (
        torch.randn(200, size, dtype=torch.float64) @ torch.randn(size, size, dtype=torch.float64) for size in (20, 30)
    )
    W, C, G = linear.weight.detach().T, X.T @ X, D.T @ D
    spectrum = Spectrum.of(linear, C, 0.1, G)
    S = torch.linalg.svdvals(X @ W @ torch.linalg.cholesky(G)).square()
    for rank in (1, 5, len(spectrum.lost) - 1):
        factors = spectrum.at(rank).factors
        E = W - factors.A @ factors.B
        assert float(torch.trace(E.T @ C @ E @ G)) == pytest.approx(float(S[rank:].sum()), rel=1e-6)
        assert float(spectrum.lost[rank]) == pytest.approx(float(S[rank:].sum() / S.sum()), rel=1e-6)


def test_gradients_are_those_of_the_middle_and_clipped() -> None:
    gradient = torch.ones(2, 16, 4)
    gradient[0, 5] *= 1000.0
    gradient[0, 6] *= 1e-3
    gradient[1, 7] = 0.0
    rows = clipped(gradient.flatten(0, 1), length=16)
    assert rows.shape == (2, 12, 4), "the first and the last two of 16 are left out"
    mean = (1000 + 1e-3 + 10) * 2 / 12
    assert rows[0, 3].norm() == pytest.approx(min(2000, 10 * mean), rel=1e-5)
    assert rows[0, 4].norm() == pytest.approx(mean / 10, rel=1e-5)
    assert rows[0, 0].norm() == pytest.approx(mean / 10, rel=1e-5), "what is small beside the mean is raised"
    assert rows[1, 5].norm() == 0 and rows[1, 0].norm() == 2
    assert shrunk(torch.diag(torch.tensor([1.0, 3.0])), 0.5).tolist() == [[1.5, 0.0], [0.0, 2.5]]


def test_kfac_takes_another_metric_and_keeps_the_budget() -> None:
    plain, kfac = (check_compression(LEMS(trials=1, kfac=kfac), "llama", 0.4, tolerance=0.02) for kfac in (False, True))
    assert [report["ranks"] for report in plain.layers] != [report["ranks"] for report in kfac.layers]
    check_compression(LEMS(trials=1, kfac=True), "opt", 0.4, tolerance=0.02)


def test_bias_is_largest_at_the_first_layer_and_none_at_the_last() -> None:
    assert propagation_bias(5, depth=0.0, strength=4.0) == [5.0, 4.0, 3.0, 2.0, 1.0]
    steep = propagation_bias(5, depth=3.0, strength=4.0)
    assert steep[0] == 5.0 and steep[-1] == 1.0 and steep == sorted(steep, reverse=True)
    assert steep[1] < 4.0, "most of the sum is its first term"
    assert propagation_bias(1, depth=1.0, strength=4.0) == [1.0]


def test_positions_leave_out_the_beginning_of_every_window() -> None:
    assert compared_positions(2, 16).tolist() == list(range(2, 16))
    few = compared_positions(32, 2048)
    assert len(few) == 128 and few[0] >= 256 and few[-1] == 2047


def test_divergence_is_that_of_the_model_with_one_matrix_at_the_measured_rank() -> None:
    model = dense_model("llama")
    task = task_of(model, 0.3)
    spectra = LEMS(windows=5, measured=0.4, trials=0).spectra(task)[0]
    ids, positions = task.calibration.tokens.ids[:5], compared_positions(5, 20)

    def predictions() -> torch.Tensor:
        with torch.no_grad():
            return (model(ids).logits[:, positions] / TEMPERATURE).log_softmax(-1).flatten(0, 1)

    dense = Predictions.of(predictions())
    for layer, of_layer in zip(decoder_layers(model), spectra, strict=True):
        for role in ("query", "down"):
            spectrum, linear = of_layer[role], block_linears(task.family, layer)[role]
            assert spectrum.measured == int(0.4 * equal_rank(linear))
            factors, before = spectrum.at(spectrum.measured).factors, linear.weight.data.clone()
            linear.weight.data.copy_((factors.A @ factors.B).T)
            found = kl_divergence(dense, predictions()) / len(dense.p)
            linear.weight.data.copy_(before)
            assert spectrum.divergence == pytest.approx(found, rel=1e-3)
            ranks, sizes, expected = spectrum.options(0.3, multiple=2)
            least = SMALLEST_KEPT[True] * equal_rank(linear)
            assert ranks[0] is None and all(rank is None or (rank >= least and rank % 2 == 0) for rank in ranks)
            assert sizes[0] == linear.weight.numel() and sizes[1] == ranks[1] * sum(linear.weight.shape)
            assert expected[0] == 0
            share = spectrum.lost[ranks[-1]] / spectrum.lost[spectrum.measured]
            assert expected[-1] == pytest.approx(float(found * share), rel=1e-3)


def test_ranks_are_the_cheapest_of_all_that_keep_to_the_budget() -> None:
    """By brute force, over the first layer of a small model with few ranks to choose from."""
    model = dense_model("opt")
    task = task_of(model, 0.4)
    method = LEMS(trials=0, multiple=5)
    first = method.spectra(task)[0][0]
    budget = 0.6 * sum(spectrum.linear.weight.numel() for spectrum in first.values())
    options = [spectrum.options(0.4, 5) for spectrum in first.values()]
    least = min(
        sum(float(of[2][number]) for of, number in zip(options, numbers, strict=True))
        for numbers in itertools.product(*(range(len(of[0])) for of in options))
        if sum(int(of[1][number]) for of, number in zip(options, numbers, strict=True)) <= budget
    )
    [ranks] = method.ranks([first], budget=int(budget), sparsity=0.4, depth=0.0, strength=0.0)
    costs = [float(of[2][of[0].index(rank)]) for of, rank in zip(options, ranks.values(), strict=True)]
    assert sum(costs) == pytest.approx(least, rel=1e-12)
    sizes = [int(of[1][of[0].index(rank)]) for of, rank in zip(options, ranks.values(), strict=True)]
    assert sum(sizes) <= budget


def test_the_budget_is_kept_to_the_last_rank_that_fits() -> None:
    model = dense_model("llama")
    task = task_of(model, 0.35)
    compressed = LEMS(trials=2).compress(task)
    total = block_linear_parameters(model)
    left = 0.65 * total - block_linear_parameters(compressed.model)
    assert left + 1e-6 >= 0
    layers = [block_linears(task.family, layer) for layer in decoder_layers(model)]
    for report, linears in zip(compressed.layers, layers, strict=True):
        assert set(report["relative_error"]) == set(report["ranks"])
        for role, linear in linears.items():
            rank = report["ranks"].get(role)
            if rank is not None and rank < int(0.95 * equal_rank(linear)):
                assert sum(linear.weight.shape) > left, "one more rank of this matrix would fit, and lose less"


def test_of_several_biases_the_best_on_the_calibration_windows_is_taken() -> None:
    few, many = (LEMS(trials=trials).compress(task_of(dense_model("llama"), 0.4)) for trials in (1, 5))
    assert many.details["divergence"] <= few.details["divergence"], "the first draw is the same"
    assert LEMS(trials=0).compress(task_of(dense_model("llama"), 0.4)).details["strength"] == 0


def test_factors_are_svd_llms() -> None:
    model = dense_model("qwen3")
    task = task_of(model, 0.4)
    compressed = LEMS(trials=1).compress(task)
    statistics = next(iter(task.calibration.statistics(INPUT_GRAMS)))
    small = block_linears(task.family, decoder_layers(compressed.model)[0])
    for role, rank in compressed.layers[0]["ranks"].items():
        W = block_linears(task.family, decoder_layers(model)[0])[role].weight.detach().T
        same = whitened_truncation(W, psd_cholesky(statistics[INPUT_GRAM[role]]), rank).factors
        factored: object = small[role]
        A, B = (getattr(factored, name).weight.T for name in "AB")
        torch.testing.assert_close(A @ B, same.A @ same.B, rtol=1e-4, atol=1e-5)


def test_more_than_the_lowest_ranks_free_is_refused() -> None:
    with pytest.raises(UserError, match=r"of the block-linear weights can go at most, 95 % asked"):
        LEMS(trials=0).compress(task_of(dense_model("llama"), 0.95))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 0}, r"method.windows=0 is too small"),
        ({"multiple": 0}, r"method.multiple=0 is too small"),
        ({"trials": -1}, r"method.trials=-1 is too small"),
        ({"measured": 1.0}, r"method.measured=1\.0 is outside"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LEMS(**options)


@pytest.mark.parametrize("form", FORMS)
def test_protocol(form: str) -> None:
    check_zero_sparsity(LEMS(trials=1), form)
    check_compression(LEMS(trials=1), form, 0.3, tolerance=0.02)


def test_what_decides() -> None:
    check_what_decides(LEMS(trials=3), "llama", seed=True)


def test_saved_and_generating(tmp_path) -> None:
    check_saved_and_generating(LEMS(trials=1), "llama", 0.4, tmp_path / "llama")
    check_saved_and_generating(LEMS(trials=1), "opt", 0.4, tmp_path / "opt")


def test_gradients_of_experts_are_not_taken() -> None:
    assert LEMS(kfac=True).applicable(FAMILIES["mixtral"]) == "method.kfac=true does not know mixtures of experts"
    assert LEMS().applicable(FAMILIES["mixtral"]) is None and LEMS(kfac=True).applicable(FAMILIES["llama"]) is None
