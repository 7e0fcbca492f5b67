"""An interruption loses nothing that was scored: the next start computes the rest, to the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch

import modegpt.evaluation.begun
import modegpt.evaluation.harness_model
import modegpt.evaluation.perplexity
from modegpt.cache import Cache
from modegpt.data.embedded import TINY_MODELS
from modegpt.evaluation.begun import Begun
from modegpt.evaluation.dense_cache import begun_scores
from modegpt.evaluation.evaluate import PreparedEvaluation, evaluate, prepare_evaluation
from modegpt.evaluation.spec import EvaluationSpec, PerplexitySpec, ZeroShotSpec
from modegpt.models.checkpoints import load_model, load_tokenizer
from modegpt.progress import Progress

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def scored() -> tuple[Any, PreparedEvaluation, dict[str, Any]]:
    """A model, an evaluation of nine batches, and its scores."""
    model = load_model("embedded:tiny-llama", device="cpu")
    spec = EvaluationSpec(
        PerplexitySpec(source="tiny", windows=[128, 256], batch_tokens=1024, limit=5120),
        ZeroShotSpec(tasks=["tiny_pronoun", "tiny_story"], limit=8, batch_size=8),
    )
    prepared = prepare_evaluation(spec, tokenizer=load_tokenizer("embedded:tiny-llama"), model_config=model.config)
    assert TINY_MODELS and prepared.text is not None
    return model, prepared, evaluate(model, prepared, label="whole", progress=QUIET)


class Batches:
    """Counts the batches that are scored, and interrupts after ``limit``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int | None = None) -> None:
        self.count = 0
        for module in (modegpt.evaluation.harness_model, modegpt.evaluation.perplexity):
            score = module.token_log_likelihoods

            def counted(*args: Any, _score: Any = score, **kwargs: Any) -> torch.Tensor:
                if self.count == limit:
                    raise KeyboardInterrupt
                self.count += 1
                return _score(*args, **kwargs)

            monkeypatch.setattr(module, "token_log_likelihoods", counted)


def cache_in(folder: Path) -> Cache:
    return Cache(root=folder, key="k", max_bytes=10**9)


def test_what_was_scored_is_kept_to_the_bit(scored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prepared, scores = scored
    with monkeypatch.context() as counting:
        whole = Batches(counting)
        evaluate(model, prepared, label="whole", progress=QUIET)
    done = 0
    for share in (0.2, 0.5, 0.3):  # within the first windows, the second ones, the tasks
        with monkeypatch.context() as interrupted:
            batches = Batches(interrupted, limit=max(1, int(share * whole.count)))
            with pytest.raises(KeyboardInterrupt):
                evaluate(model, prepared, label="part", progress=QUIET, begun=Begun(cache_in(tmp_path)))
        done += batches.count
    with monkeypatch.context() as counting:
        rest = Batches(counting)
        begun = Begun(cache_in(tmp_path))
        assert evaluate(model, prepared, label="rest", progress=QUIET, begun=begun) == scores
    assert rest.count == whole.count - done > 0
    begun.forget()
    assert Begun(cache_in(tmp_path)).parts == {}


def test_a_kill_loses_what_came_after_the_last_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = Begun(cache_in(tmp_path))
    begun.note("early", [1])
    assert Begun(cache_in(tmp_path)).parts == {}
    monkeypatch.setattr(modegpt.evaluation.begun, "KEEP_SECONDS", 0.0)
    begun.note("later", [0.1, True])
    assert Begun(cache_in(tmp_path)).parts == {"early": [1], "later": [0.1, True]}
    begun.note("later", [0.1, True, 3])
    assert Begun(cache_in(tmp_path)).parts["later"] == [0.1, True, 3]


def test_another_model_or_other_batches_begin_anew(scored: Any, tmp_path: Path) -> None:
    _, prepared, _ = scored

    def key_of(prepared: PreparedEvaluation, **key: str) -> str:
        begun = begun_scores(prepared, key, directory=tmp_path, max_bytes=10**9)
        assert begun.cache is not None
        return begun.cache.key

    text = prepared.text
    other = PreparedEvaluation(
        tokenizer=prepared.tokenizer,
        context=prepared.context,
        text=type(text)(**{**vars(text), "batch_tokens": 1}),
        zeroshot=prepared.zeroshot,
        tasks=prepared.tasks,
    )
    assert len({key_of(prepared, weights="a"), key_of(prepared, weights="b"), key_of(other, weights="a")}) == 3
    assert begun_scores(prepared, {}, directory=tmp_path, max_bytes=0).cache is None
