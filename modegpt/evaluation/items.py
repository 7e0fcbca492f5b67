"""Which items of a task were answered right, and the error of a difference between models that answered the same items.

A standard error of one accuracy is mostly that of the items: some are easy, some are hard, for every model alike.
Between models that answer the same items it cancels, so a difference is known better than either accuracy.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ACCURACIES = ("acc", "acc_norm")
"""The metrics of lm-evaluation-harness that are a share of right answers whatever a task makes of them."""


def is_accuracy(score: Mapping[str, Any]) -> bool:
    """Whether a task's score is a share of right answers: by its metric, or because its items are right or wrong."""
    return score.get("metric", "acc") in ACCURACIES or score.get("right") is not None


def share_right(values: Sequence[Any], whole: float) -> bool:
    """Whether each of ``values`` is 0 or 1 and ``whole`` is their mean."""
    plain = all(isinstance(value, bool | int | float) and value in (0, 1) for value in values)
    return plain and bool(values) and math.isclose(math.fsum(values) / len(values), whole, abs_tol=1e-9)


def pack(right: Sequence[float]) -> str | None:
    """Hexadecimal digits of one bit an item, the first item the highest of the first byte.

    None where a value is neither 0 nor 1.
    """
    return np.packbits(np.asarray(right, dtype=bool)).tobytes().hex() if set(right) <= {0, 1} else None


def unpack(score: Mapping[str, Any]) -> np.ndarray | None:
    """What ``pack`` stored in a task's score, (num_items,) of 0.0 and 1.0; None where the score has no such field."""
    if score.get("right") is None:
        return None
    bits = np.frombuffer(bytes.fromhex(score["right"]), dtype=np.uint8)
    return np.unpackbits(bits, count=score["num_items"]).astype(np.float64)


def least_stderr(num_items: int) -> float:
    """The standard error of what came out alike on every one of ``num_items``: that of one item in two more.

    The sample says zero there, however few they are. Agresti and Min (2005) add half an item to each of the four
    outcomes of a pair, which gives this. Wilson's interval (1927) of one share of 1, at one standard error, reaches as
    far: to n / (n + 1). As soon as one item differs the sample's own error is larger.
    """
    return 1 / (num_items + 2)


def difference_stderr(own: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> float | None:
    """Standard error of the mean accuracy over tasks of ``own`` minus that of ``other``, as shares.

    Both are the scores of the same tasks in the same order. A task's error is the sample standard deviation of the
    differences between its items over the root of their number; errors of tasks add up as squares. None where it
    cannot be known: an item's answer is missing, or a task has a single item.
    """
    return _paired_stderr(own, other, weight=1.0)


def retention_stderr(dense: Sequence[Mapping[str, Any]], compressed: Sequence[Mapping[str, Any]]) -> float | None:
    """Standard error of ``compressed`` accuracy / ``dense`` accuracy, means over tasks; None where it cannot be known.

    To first order (the ratio estimator of survey sampling) it is the standard error of the mean of
    ``compressed - ratio * dense`` over the items, divided by the dense accuracy.
    """
    whole, left = (math.fsum(score["value"] for score in scores) / len(scores) for scores in (dense, compressed))
    if not whole:
        return None
    stderr = _paired_stderr(compressed, dense, weight=left / whole)
    return None if stderr is None else stderr / whole


def _paired_stderr(
    own: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], *, weight: float
) -> float | None:
    variances = []
    for mine, theirs in zip(own, other, strict=True):
        right, reference = unpack(mine), unpack(theirs)
        if right is None or reference is None or len(right) != len(reference) or len(right) < 2:
            return None
        variance = float(np.var(right - weight * reference, ddof=1)) / len(right)
        variances.append(max(variance, least_stderr(len(right)) ** 2))
    return math.sqrt(math.fsum(variances)) / len(variances)
