"""The sums of one module's solve: which tokens they are of."""

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
