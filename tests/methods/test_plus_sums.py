"""Plain and Fisher-weighted moments of one module, and the choice between their blends."""

import pytest
import torch

from modegpt.decompositions.regression import Moments, held_out_refit
from modegpt.errors import UserError
from modegpt.methods.plus.method import MoDeGPTPlus
from modegpt.methods.plus.streams import Split
from modegpt.methods.plus.sums import Solution, Sums, best
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model

WINDOWS, LENGTH, FEATURES, TARGETS = 8, 6, 5, 3


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, t, w = (
        torch.randn(WINDOWS, LENGTH, size, generator=generator, dtype=torch.float64) for size in (FEATURES, TARGETS, 1)
    )
    return z, t + z[..., :TARGETS] ** 2 + z[..., :TARGETS], w.squeeze(-1).square()


def summed(z: torch.Tensor, t: torch.Tensor, w: torch.Tensor) -> Sums:
    split = Split.of(torch.zeros(WINDOWS, LENGTH), batch_size=4)
    sums = Sums.zeros(split, FEATURES, TARGETS, device=torch.device("cpu"), precision=torch.float64, fisher=w.split(4))
    for batch, (z_b, t_b) in enumerate(zip(z.split(4), t.split(4), strict=True)):
        sums.update(batch, z_b, t_b)
    return sums


def test_blends_keep_the_trace_and_weight_the_rows(rows) -> None:
    z, t, w = rows
    sums = summed(z, t, w)
    G, G_F = torch.einsum("bti,btj->ij", z, z), torch.einsum("bt,bti,btj->ij", w, z, z)
    X_F = torch.einsum("bt,bti,btj->ij", w, z, t)
    for gamma in (0.0, 0.5, 1.0):
        parts = sums.blended(gamma)
        whole = parts[False] + parts[True]
        scale = gamma * G.trace() / G_F.trace()
        torch.testing.assert_close(whole.G, (1 - gamma) * G + scale * G_F)
        torch.testing.assert_close(whole.G.trace(), G.trace())
        torch.testing.assert_close(whole.X, (1 - gamma) * torch.einsum("bti,btj->ij", z, t) + scale * X_F)


def test_rows_of_some_tokens_count_as_if_the_others_were_zero(rows) -> None:
    """Held out or not as their windows are, and with their own Fisher weights."""
    z, t, w = rows
    tokens = torch.tensor([1, 5, 6, 11, 12, 22])
    split = Split.of(torch.zeros(4, LENGTH), batch_size=4)
    some, padded = (
        Sums.zeros(split, FEATURES, TARGETS, device=torch.device("cpu"), precision=torch.float64, fisher=[w[:4]])
        for _ in range(2)
    )
    some.update(0, *(states[:4].flatten(0, 1)[tokens] for states in (z, t)), tokens=tokens)
    there = torch.zeros(4 * LENGTH, 1, dtype=z.dtype).index_fill(0, tokens, 1.0).view(4, LENGTH, 1)
    padded.update(0, z[:4] * there, t[:4] * there)
    for own, others in ((some.plain, padded.plain), (some.weighted, padded.weighted)):
        for held in (False, True):
            torch.testing.assert_close(own[held].G, others[held].G)
            torch.testing.assert_close(own[held].X, others[held].X)
    assert [some.plain[held].num_rows for held in (False, True)] == [5, 1], "the last window is held out"


def test_of_several_blends_the_one_that_errs_least_where_the_loss_feels_it(rows) -> None:
    sums = summed(*rows)
    start = torch.zeros(FEATURES, TARGETS, dtype=torch.float64)

    def solve(parts: dict[bool, Moments]) -> Solution:
        return Solution(None, lambda moments: moments, held_out_refit(parts[False], parts[True], (start, start)))

    gammas = (0.0, 0.5, 1.0)
    errors = {gamma: sums.weighted[True].error(best(sums, (gamma,), solve).refit.fitted) for gamma in gammas}
    assert len(set(errors.values())) == len(gammas)
    assert best(sums, gammas, solve).gamma == min(errors, key=errors.get)


def test_no_share_of_the_weighted_moments_is_as_without_them() -> None:
    plain, zero = (
        MoDeGPTPlus(fisher=fisher).compress(task_of(dense_model("llama"), 0.3, num_samples=12)).model
        for fisher in ((), (0.0,))
    )
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, zero.state_dict()[name]), name


def test_weights_change_the_result_and_are_recorded() -> None:
    task = task_of(dense_model("llama"), 0.3, num_samples=12)
    compressed = MoDeGPTPlus(fisher=(0.75,)).compress(task)
    plain = MoDeGPTPlus().compress(task_of(dense_model("llama"), 0.3, num_samples=12))
    assert {
        layer["numerics"][module]["fisher"]
        for layer in compressed.layers
        for module in ("mlp", "value_output")
        if module in layer["numerics"]
    } == {0.75}
    one, other = (each.model.model.layers[-1].mlp.down_proj.weight for each in (compressed, plain))
    assert one.shape != other.shape or not torch.equal(one, other)
    assert task.calibration.meter.backward_passes == 1


@pytest.mark.parametrize(
    ("switches", "named"),
    [
        ({"fisher": (1.5,)}, "method.fisher"),
        (
            {
                "fisher": (0.5,),
                "nested": True,
                "sequential": False,
                "refit": False,
                "align": False,
                "temperature": False,
            },
            "nested",
        ),
    ],
)
def test_what_cannot_be_is_refused(switches: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        MoDeGPTPlus(**switches)


def test_tokens_that_the_loss_does_not_feel_leave_the_plain_moments(rows) -> None:
    z, t, w = rows
    sums = summed(z, t, torch.zeros_like(w))
    for gamma in (0.5, 1.0):
        parts = sums.blended(gamma)
        torch.testing.assert_close((parts[False] + parts[True]).G, (1 - gamma) * torch.einsum("bti,btj->ij", z, z))
