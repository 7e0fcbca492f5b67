import pytest
import torch

from modegpt.allocation.influence import BlockInfluence
from modegpt.errors import UserError


def test_streaming_mean_of_cosines():
    g = torch.Generator().manual_seed(0)
    x_in, x_out = (torch.randn(6, 5, 16, generator=g, dtype=torch.float64) for _ in range(2))
    x_out = x_in + 0.5 * x_out
    influence = BlockInfluence()
    for batch in (slice(0, 1), slice(1, 6)):  # unequal batches must weigh by tokens
        influence.update(x_in[batch], x_out[batch])
    cosines = (x_in * x_out).sum(dim=-1) / x_in.norm(dim=-1) / x_out.norm(dim=-1)
    assert influence.value() == pytest.approx(float(1 - cosines.mean()), rel=1e-12)


def test_identity_has_none_and_reversal_has_two():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for x_out, expected in ((3 * x, 0.0), (-x, 2.0)):
        influence = BlockInfluence()
        influence.update(x, x_out)
        assert influence.value() == pytest.approx(expected, abs=1e-7)


def test_half_precision_states_are_compared_in_float64():
    g = torch.Generator().manual_seed(0)
    x_in = (300 * torch.randn(4, 4096, generator=g)).half()  # squared norms overflow float16
    x_out = x_in + torch.randn(4, 4096, generator=g).half()
    influence = BlockInfluence()
    influence.update(x_in, x_out)
    exact_in, exact_out = x_in.double(), x_out.double()
    cosines = (exact_in * exact_out).sum(dim=-1) / exact_in.norm(dim=-1) / exact_out.norm(dim=-1)
    assert influence.value() == pytest.approx(float(1 - cosines.mean()), rel=1e-8)


def test_refusals():
    with pytest.raises(UserError, match="no calibration tokens"):
        BlockInfluence().value()
    influence = BlockInfluence()
    influence.update(torch.full((2, 3), torch.nan), torch.ones(2, 3))
    with pytest.raises(UserError, match="NaN"):
        influence.value()
