"""The sums of one module's solve: which tokens they are of, and what an error of a token counts."""

import torch

from modegpt.methods.plus.streams import Split
from modegpt.methods.plus.sums import Sums

WINDOWS, LENGTH, FEATURES, TARGETS = 4, 6, 5, 3


def test_rows_of_some_tokens_count_as_if_the_others_were_zero() -> None:
    """Held out or not as their windows are."""
    generator = torch.Generator().manual_seed(0)
    z, t = (
        torch.randn(WINDOWS, LENGTH, size, generator=generator, dtype=torch.float64) for size in (FEATURES, TARGETS)
    )
    tokens = torch.tensor([1, 5, 6, 11, 12, 22])
    split = Split.of(torch.zeros(WINDOWS, LENGTH), batch_size=WINDOWS)
    some, padded = (Sums.zeros(split, FEATURES, TARGETS, device=torch.device("cpu")) for _ in range(2))
    some.update(0, *(states.flatten(0, 1)[tokens] for states in (z, t)), tokens=tokens)
    there = torch.zeros(WINDOWS * LENGTH, 1, dtype=z.dtype).index_fill(0, tokens, 1.0).view(WINDOWS, LENGTH, 1)
    padded.update(0, z * there, t * there)
    for held in (False, True):
        torch.testing.assert_close(some.parts[held].G, padded.parts[held].G)
        torch.testing.assert_close(some.parts[held].X, padded.parts[held].X)
    assert [some.parts[held].num_rows for held in (False, True)] == [5, 1], "the last window is held out"
    rows = (z * there).flatten(0, 1)
    torch.testing.assert_close(some.whole.G, rows.mT @ rows)


def test_behind_a_norm_an_error_counts_as_what_it_moves_the_norms_output_by() -> None:
    """Tokens shorter than the window's median count as if they were as long."""
    generator = torch.Generator().manual_seed(0)
    z, t, e = (
        torch.randn(WINDOWS, LENGTH, size, generator=generator, dtype=torch.float64)
        for size in (FEATURES, TARGETS, TARGETS)
    )
    t *= torch.logspace(-2, 2, LENGTH, dtype=t.dtype).unsqueeze(-1)  # tokens of very different length
    e -= (e * t).sum(-1, keepdim=True) / (t * t).sum(-1, keepdim=True) * t  # along t the norm takes it away
    gain = torch.tensor([0.1, 1.0, 30.0], dtype=t.dtype)

    def normed(x: torch.Tensor) -> torch.Tensor:
        return gain * x / x.square().mean(-1, keepdim=True).sqrt()

    split = Split.of(torch.zeros(WINDOWS, LENGTH), batch_size=WINDOWS)
    plain, erring = (Sums.zeros(split, FEATURES, TARGETS, device=torch.device("cpu"), gain=gain) for _ in range(2))
    plain.update(0, z, t)
    length = t.square().mean(-1, keepdim=True).sqrt()
    median = length.sort(dim=1).values[:, (LENGTH - 1) // 2].unsqueeze(1)
    step = 1e-6 * length
    erring.update(0, z, t + step * e)
    moved = (normed(t + step * e) - normed(t)) * torch.clamp(length / median, max=1.0)
    rows = (z / torch.maximum(length, median)).flatten(0, 1)
    torch.testing.assert_close(plain.whole.G, rows.mT @ rows)
    change = erring.whole.X - plain.whole.X
    torch.testing.assert_close(change, rows.mT @ moved.flatten(0, 1), rtol=1e-3, atol=1e-7 * float(change.abs().max()))
