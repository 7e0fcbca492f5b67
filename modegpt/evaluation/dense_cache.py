"""The dense model's scores, computed once for each (model, evaluation) and reused by every run that compares with them."""

import hashlib
import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modegpt.evaluation.evaluate import PreparedEvaluation

SCORE_VERSION = 2  # raise when the meaning of a score changes
PACKAGES = ("lm_eval", "torch", "transformers")


def default_cache_directory() -> Path:
    """``$MODEGPT_CACHE``, or ``~/.cache/modegpt``."""
    return Path(os.environ.get("MODEGPT_CACHE") or Path.home() / ".cache" / "modegpt")


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


def cached_scores(
    key: dict[str, Any], compute: Callable[[], dict[str, dict]], *, directory: Path
) -> tuple[dict[str, dict], bool]:
    """The scores stored under ``key``, else those of ``compute()``, which are then stored.

    A file that cannot be read as what was written is computed anew with a warning; a directory that cannot be
    written costs the reuse, with a warning, not the result.

    Returns the scores and whether they were reused.
    """
    path = directory / "dense" / f"{hashlib.sha256(_canonical(key)).hexdigest()}.json"
    stored = _read(path, key)
    if stored is not None:
        return stored, True
    scores = compute()
    try:
        _write_atomically(path, {"key": key, "scores": scores})
    except OSError as error:
        warnings.warn(f"dense scores are not kept for reuse: cannot write {path}: {error.strerror}", stacklevel=2)
    return scores, False


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False).encode()


def _read(path: Path, key: dict[str, Any]) -> dict[str, dict] | None:
    try:
        content = json.loads(path.read_bytes())
        if _canonical(content["key"]) == _canonical(key):
            return {kind: content["scores"][kind] for kind in ("perplexity", "zeroshot")}
        reason = "it holds another evaluation"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error) or type(error).__name__
    warnings.warn(f"stored dense scores are unreadable and computed anew: {path}: {reason}", stacklevel=3)
    return None


def _write_atomically(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=".", suffix=".tmp", delete=False, encoding="utf-8"
    ) as file:
        json.dump(content, file, indent=1, allow_nan=False)
    os.replace(file.name, path)
