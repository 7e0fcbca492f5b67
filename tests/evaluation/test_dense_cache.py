"""Dense scores are computed once for a key, and never trusted when the file is not what was written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modegpt.cache import cache_directory
from modegpt.evaluation.begun import Begun
from modegpt.evaluation.dense_cache import begun_scores, cached_scores, dense_key, dense_scores
from modegpt.files import json_sha256
from modegpt.progress import Progress

BOUND = 10**6
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
    assert cached_scores(KEY, compute, directory=tmp_path / "new", max_bytes=BOUND) == (SCORES, False)
    assert cached_scores(dict(reversed(KEY.items())), compute, directory=tmp_path / "new", max_bytes=BOUND) == (
        SCORES,
        True,
    )
    assert compute.calls == 1
    (file,) = (path for path in (tmp_path / "new").rglob("*") if path.is_file())  # and no temporary file is left
    stored = json.loads(file.read_text())
    assert stored.keys() == {"sha256", "value"} and stored["value"] == {"key": KEY, "scores": SCORES}


def test_another_key_is_another_score(tmp_path):
    compute = Compute()
    cached_scores(KEY, compute, directory=tmp_path, max_bytes=BOUND)
    cached_scores(KEY | {"weights_sha256": "cd"}, compute, directory=tmp_path, max_bytes=BOUND)
    assert compute.calls == 2


WHOLE = {"key": KEY, "scores": SCORES}
OTHER = [
    {"key": KEY, "scores": {"perplexity": {}}},
    {"key": {}, "scores": SCORES},
    {"sha256": json_sha256(WHOLE), "value": {"key": {}, "scores": SCORES}},
]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"key": 1}', b"\xff\xfe", *(json.dumps(other).encode() for other in OTHER)]
)
def test_damaged_file_is_computed_anew(tmp_path, damage):
    compute = Compute()
    cached_scores(KEY, compute, directory=tmp_path, max_bytes=BOUND)
    (file,) = tmp_path.glob("objects/*/dense.json")
    file.write_bytes(damage)
    with pytest.warns(UserWarning, match="computed anew"):
        assert cached_scores(KEY, compute, directory=tmp_path, max_bytes=BOUND) == (SCORES, False)
    assert cached_scores(KEY, compute, directory=tmp_path, max_bytes=BOUND) == (SCORES, True)


def test_a_changed_value_or_another_models_scores_are_not_used(tmp_path):
    compute = Compute()
    for key in (KEY, KEY | {"weights_sha256": "cd"}):
        cached_scores(key, compute, directory=tmp_path, max_bytes=BOUND)
    one, other = sorted(tmp_path.glob("objects/*/dense.json"))
    contents = one.read_text(), other.read_text()
    one.write_text(contents[1])
    other.write_text(contents[1].replace("1.1234567890123457", "1.1234567890123459"))
    for key in (KEY, KEY | {"weights_sha256": "cd"}):
        with pytest.warns(UserWarning, match="computed anew"):
            assert cached_scores(key, compute, directory=tmp_path, max_bytes=BOUND) == (SCORES, False)
    assert compute.calls == 4 and sorted(file.read_text() for file in (one, other)) == sorted(contents)


def test_a_sealed_value_under_a_plain_checksum_is_not_used(tmp_path):
    """Whoever changes a score can hash what he wrote; the checksum also covers the place."""
    cached_scores(KEY, Compute(), directory=tmp_path, max_bytes=BOUND)
    (file,) = tmp_path.glob("objects/*/dense.json")
    changed = {"key": KEY, "scores": {"perplexity": {}}}
    file.write_text(json.dumps({"sha256": json_sha256(changed), "value": changed}))
    with pytest.warns(UserWarning, match="computed anew"):
        assert cached_scores(KEY, Compute(), directory=tmp_path, max_bytes=BOUND) == (SCORES, False)


def test_unwritable_directory_costs_only_the_reuse(tmp_path):
    (tmp_path / "objects").write_text("a file where a directory should be")
    with pytest.warns(UserWarning) as warned:
        assert cached_scores(KEY, Compute(), directory=tmp_path, max_bytes=BOUND)[0] == SCORES
    assert "not kept for reuse" in str(warned[-1].message)


def test_failed_computation_stores_nothing(tmp_path):
    def fail() -> dict:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached_scores(KEY, fail, directory=tmp_path, max_bytes=BOUND)
    assert not os.listdir(tmp_path)


def test_default_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("MODEGPT_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path and cache_directory("elsewhere") == Path("elsewhere")
    monkeypatch.delenv("MODEGPT_CACHE")
    assert cache_directory().parts[-2:] == (".cache", "modegpt")


def test_a_cache_that_keeps_nothing_takes_nothing_from_others(tmp_path):
    compute = Compute()
    cached_scores(KEY, compute, directory=tmp_path, max_bytes=BOUND)
    other = KEY | {"weights_sha256": "cd"}
    assert [cached_scores(other, compute, directory=tmp_path, max_bytes=0)[1] for _ in range(2)] == [False, False]
    assert cached_scores(KEY, compute, directory=tmp_path, max_bytes=BOUND)[1]


def test_what_an_interrupted_start_scored_is_handed_on_once_and_then_forgotten(tmp_path: Path, capsys) -> None:
    """Under a key of all that the scores depend on, each part of which makes another start."""
    prepared: Any = SimpleNamespace(
        fingerprint=lambda: {"text": "t"},
        text=SimpleNamespace(batch_tokens=64),
        zeroshot=SimpleNamespace(batch_size=4),
    )
    given = {"weights_sha256": "w", "tokenizer_sha256": "t", "dtype": "float32", "device": "cpu"}
    scores = {"perplexity": {"ppl_text_64": {"value": 4.0, "num_predicted_tokens": 63}}, "zeroshot": {}}

    def started(compute: Callable[[Begun], dict], **changes: str) -> dict:
        options = {"directory": tmp_path, "max_bytes": BOUND, "progress": Progress()}
        return dense_scores(prepared, compute, **(given | changes), **options)

    def interrupted(begun: Begun) -> dict:
        with begun:
            begun.note("part", 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        started(interrupted)
    seen: list[dict] = []

    def noticed(begun: Begun) -> dict:
        seen.append({**begun.parts})
        return interrupted(begun)

    for other in given:
        with pytest.raises(KeyboardInterrupt):
            started(noticed, **{other: "other"})
    assert seen == [{}] * len(given)
    prepared.text.batch_tokens = 32
    assert begun_scores(prepared, dense_key(prepared, **given), directory=tmp_path, max_bytes=BOUND).parts == {}
    prepared.text.batch_tokens = 64
    assert started(lambda begun: scores if begun.parts == {"part": 1} else {}) == scores
    assert "scored before" not in "".join(capsys.readouterr())
    assert begun_scores(prepared, dense_key(prepared, **given), directory=tmp_path, max_bytes=BOUND).parts == {}
    assert started(lambda _: pytest.fail("they are known")) == scores
    assert "dense: ppl_text_64 = 4.0000 over 63 tokens (scored before)" in "".join(capsys.readouterr())
    assert started(lambda _: {"perplexity": {}}, dtype="bfloat16") == {"perplexity": {}}
