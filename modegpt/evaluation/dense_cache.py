"""The dense model's scores, computed once for each (model, evaluation) and reused by every run that needs them."""

import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modegpt.cache import Cache
from modegpt.evaluation.begun import Begun
from modegpt.evaluation.evaluate import PreparedEvaluation
from modegpt.files import json_sha256
from modegpt.progress import Progress

SCORE_VERSION = 2  # raise when the meaning of a score changes
PACKAGES = ("lm_eval", "torch", "transformers")


def dense_scores(
    prepared: PreparedEvaluation,
    compute: Callable[[Begun], dict[str, dict]],
    *,
    weights_sha256: str,
    tokenizer_sha256: str,
    dtype: str,
    device: str,
    directory: Path,
    max_bytes: int,
    progress: Progress,
) -> dict[str, dict]:
    """The dense model's scores from the cache in ``directory``, else ``compute(begun)``, which is then kept.

    ``begun`` is what an interrupted start scored. ``compute`` says the perplexities that it finds, and this function
    those that were found before. See ``dense_key``.
    """
    key = dense_key(
        prepared, weights_sha256=weights_sha256, tokenizer_sha256=tokenizer_sha256, dtype=dtype, device=device
    )
    begun = begun_scores(prepared, key, directory=directory, max_bytes=max_bytes)
    scores, reused = cached_scores(key, lambda: compute(begun), directory=directory, max_bytes=max_bytes)
    begun.forget()
    for name, score in scores["perplexity"].items() if reused else ():
        progress.say(
            f"dense: {name} = {score['value']:.4f} over {score['num_predicted_tokens']} tokens (scored before)"
        )
    return scores


def dense_key(
    prepared: PreparedEvaluation, *, weights_sha256: str, tokenizer_sha256: str, dtype: str, device: str
) -> dict[str, Any]:
    """All that the dense scores depend on. ``device`` is a type such as ``"cpu"``: rounding differs between types."""
    return {
        "score_version": SCORE_VERSION,
        "weights_sha256": weights_sha256,
        "tokenizer_sha256": tokenizer_sha256,
        "dtype": dtype,
        "device": device,
        "evaluation": prepared.fingerprint(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def begun_scores(prepared: PreparedEvaluation, key: Mapping[str, Any], *, directory: Path, max_bytes: int) -> Begun:
    """What an interrupted start scored of the model that ``key`` identifies; batch sizes count, as they round."""
    if max_bytes == 0:
        return Begun()
    batches = [prepared.text and prepared.text.batch_tokens, prepared.zeroshot and prepared.zeroshot.batch_size]
    return Begun(Cache(root=directory, key=json_sha256({"of": key, "batches": batches}), max_bytes=max_bytes))


def cached_scores(
    key: dict[str, Any], compute: Callable[[], dict[str, dict]], *, directory: Path, max_bytes: int
) -> tuple[dict[str, dict], bool]:
    """The scores kept under ``key``, else ``compute()``, which is then kept; and whether they were reused."""
    cache = Cache(root=directory, key=json_sha256(key), max_bytes=max_bytes)
    stored = cache.load_json("dense")
    if stored is not None:
        return stored["scores"], True
    scores = compute()
    cache.store_json("dense", {"key": key, "scores": scores})
    return scores, False
