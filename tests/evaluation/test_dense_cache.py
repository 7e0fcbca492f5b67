"""Dense scores are computed once for a key, and never trusted when the file is not what was written."""

import json
import os

import pytest

from modegpt.evaluation.dense_cache import cached_scores, default_cache_directory

KEY = {"weights_sha256": "ab", "evaluation": {"text": {"windows": [64]}}}
SCORES = {"perplexity": {"ppl_text_64": {"value": 1.1234567890123457, "window": 64}}, "zeroshot": {}}


class Compute:
    """Counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self) -> dict:
        self.calls += 1
        return SCORES


def test_computed_once_and_read_back_exactly(tmp_path):
    compute = Compute()
    assert cached_scores(KEY, compute, directory=tmp_path / "new") == (SCORES, False)
    assert cached_scores(dict(reversed(KEY.items())), compute, directory=tmp_path / "new") == (SCORES, True)
    assert compute.calls == 1
    (file,) = (tmp_path / "new" / "dense").iterdir()  # and no temporary file is left
    assert json.loads(file.read_text()) == {"key": KEY, "scores": SCORES}


def test_another_key_is_another_score(tmp_path):
    compute = Compute()
    cached_scores(KEY, compute, directory=tmp_path)
    cached_scores(KEY | {"weights_sha256": "cd"}, compute, directory=tmp_path)
    assert compute.calls == 2


OTHER = [{"key": KEY, "scores": {"perplexity": {}}}, {"key": {}, "scores": SCORES}]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"key": 1}', b"\xff\xfe", *(json.dumps(other).encode() for other in OTHER)]
)
def test_damaged_file_is_computed_anew(tmp_path, damage):
    compute = Compute()
    cached_scores(KEY, compute, directory=tmp_path)
    (file,) = (tmp_path / "dense").iterdir()
    file.write_bytes(damage)
    with pytest.warns(UserWarning, match="computed anew"):
        assert cached_scores(KEY, compute, directory=tmp_path) == (SCORES, False)
    assert cached_scores(KEY, compute, directory=tmp_path) == (SCORES, True)


def test_unwritable_directory_costs_only_the_reuse(tmp_path):
    (tmp_path / "dense").write_text("a file where a directory should be")
    with pytest.warns(UserWarning) as warned:
        assert cached_scores(KEY, Compute(), directory=tmp_path)[0] == SCORES
    assert "not kept for reuse" in str(warned[-1].message)


def test_failed_computation_stores_nothing(tmp_path):
    def fail() -> dict:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached_scores(KEY, fail, directory=tmp_path)
    assert not os.listdir(tmp_path)


def test_default_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("MODEGPT_CACHE", str(tmp_path))
    assert default_cache_directory() == tmp_path
    monkeypatch.delenv("MODEGPT_CACHE")
    assert default_cache_directory().parts[-2:] == (".cache", "modegpt")
