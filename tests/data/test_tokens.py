"""Calibration windows: distinct, seeded, and refused when the text is too short."""

from types import SimpleNamespace

import pytest
import torch

from modegpt.data.tokens import BOS_IN_EACH_WINDOW, cut_windows, draw_windows, resolve_sequence_length, window_bos
from modegpt.errors import UserError


def test_windows_are_distinct_pieces_of_the_stream() -> None:
    stream = torch.arange(1003)
    tokens = draw_windows(stream, num_samples=20, sequence_length=50, seed=0)
    assert tokens.ids.shape == (20, 50)
    assert tokens.ids.unique().numel() == 1000
    assert (tokens.ids[:, 1:] - tokens.ids[:, :-1] == 1).all()
    assert (tokens.ids[:, 0] % 50 == 0).all()


def test_the_seed_decides_and_the_global_generator_is_untouched() -> None:
    stream = torch.arange(5000)
    state = torch.get_rng_state()
    first, again, other = (draw_windows(stream, num_samples=8, sequence_length=16, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.sha256 == again.sha256 and torch.equal(first.ids, again.ids)
    assert first.sha256 != other.sha256


def test_too_little_text_is_refused_with_what_would_fit() -> None:
    with pytest.raises(UserError, match="num_samples to 3"):
        draw_windows(torch.arange(100), num_samples=4, sequence_length=30, seed=0)


def test_sequence_length() -> None:
    assert resolve_sequence_length("auto", 131072) == 2048
    assert resolve_sequence_length("auto", 256) == 256
    assert resolve_sequence_length(128, 256) == 128
    with pytest.raises(UserError, match="at most 256"):
        resolve_sequence_length(512, 256)


def test_a_bos_stands_in_front_of_each_window_and_no_token_is_lost_by_it() -> None:
    stream = torch.arange(100, 203)
    windows = cut_windows(stream, 10, bos=7)
    assert windows.shape == (11, 10) and (windows[:, 0] == 7).all()
    assert windows[:, 1:].flatten().tolist() == list(range(100, 199)), "in order, the tail dropped"
    assert cut_windows(stream, 10, bos=None).flatten().tolist() == list(range(100, 200))
    tokens = draw_windows(stream, num_samples=11, sequence_length=10, seed=0, bos=7)
    assert tokens.bos == 7 and sorted(tokens.ids[:, 1].tolist()) == list(range(100, 199, 9))
    assert draw_windows(stream, num_samples=10, sequence_length=10, seed=0).bos is None


def test_a_family_has_its_habit_and_may_be_given_another() -> None:
    tokenizer, without = SimpleNamespace(bos_token_id=2), SimpleNamespace(bos_token_id=None)
    for family in BOS_IN_EACH_WINDOW:
        assert window_bos("auto", family=family, tokenizer=tokenizer) == 2
        assert window_bos("stream_start", family=family, tokenizer=tokenizer) is None
    for family in ("llama", "opt", "qwen3"):
        assert window_bos("auto", family=family, tokenizer=without) is None
        assert window_bos("each_window", family=family, tokenizer=tokenizer) == 2
    with pytest.raises(UserError, match="which the tokenizer has not; set bos=stream_start"):
        window_bos("each_window", family="llama", tokenizer=without)
