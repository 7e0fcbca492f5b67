"""Targets that people state, in bytes or in speed, as the share of the weights to remove that meets them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from modegpt.calibration.calibration import Calibration
from modegpt.config import CompressionConfig, RunConfig, read_bytes
from modegpt.data.tokens import CalibrationTokens
from modegpt.errors import UserError
from modegpt.evaluation.spec import Workload
from modegpt.evaluation.throughput import measured_speedup
from modegpt.methods.base import CompressionTask, Method, RankMethod
from modegpt.models import LayerShape, block_linear_parameters, cache_bytes_per_token, random_compressed

STEP = 1e-3
"""Sparsities that meet a target in bytes are found to so much, rounded up."""
PERCENT = [percent / 100 for percent in range(1, 100)]
"""Sparsities among which one that meets a target in speed is found: times differ by more from minute to minute."""
SPEED_TOLERANCE = 0.02
"""A speed is missed where it falls short by more, relatively: measurements differ by as much."""
REPEATS, LEAST_SECONDS, DECODE_TOKENS = 5, 2.0, 8
"""Rounds of one measurement of speed, seconds that they take at least, and tokens in each where these are decoded."""
LENGTH = 512
"""Tokens in front of it where none are stated."""


def aimed(
    config: RunConfig,
    method: Method,
    model: PreTrainedModel,
    tokens: CalibrationTokens,
    *,
    say: Callable[[str], object],
) -> tuple[RunConfig, dict[str, Any]]:
    """``config``, which has a target, with the sparsity at which ``method`` meets it, and what is known of the target.

    ``model``: the dense one.

    Raises:
        UserError: the dense model meets the target, nothing does, or the method cannot tell sizes before it starts.
    """
    compression = config.compression
    if compression.target == "target_bytes":
        sparsity, aim = _for_bytes(compression, method, model, say=say)
    else:
        sparsity, aim = _for_speed(compression, method, model, tokens, say=say)
    return replace(config, compression=replace(compression, sparsity=sparsity)), aim


def reached(
    aim: Mapping[str, Any], compression: CompressionConfig, dense: PreTrainedModel, compressed: PreTrainedModel
) -> dict[str, Any]:
    """``aim`` with what came of it: the bytes that ``compressed`` needs, or its speed, measured beside ``dense``."""
    if "target_bytes" in aim:
        return {**aim, "achieved_bytes": bytes_needed(compressed, compression)}
    return {**aim, "achieved_speedup": _speedup(dense, compressed, workload_of(compression, dense))}


def missed(target: Mapping[str, Any]) -> list[str]:
    """A warning where a target is missed that was ``reached`` for."""
    if "target_bytes" in target and target["achieved_bytes"] > target["target_bytes"]:
        return [f"the target is missed: {target['achieved_bytes']:,} bytes needed, {target['target_bytes']:,} asked"]
    if "target_speedup" in target and target["achieved_speedup"] < (1 - SPEED_TOLERANCE) * target["target_speedup"]:
        return [
            f"the target is missed: {target['achieved_speedup']:.2f} times as fast ({target['target_workload']}), "
            f"{target['target_speedup']:g} asked and {target['predicted_speedup']:.2f} predicted"
        ]
    return []


def _for_bytes(
    compression: CompressionConfig, method: Method, model: PreTrainedModel, *, say: Callable[[str], object]
) -> tuple[float, dict[str, Any]]:
    """Keys and values are taken to shrink as weights do where the method reduces heads, and not at all elsewhere."""
    assert compression.target_bytes is not None
    wanted, dense = read_bytes("compression.target_bytes", compression.target_bytes), bytes_needed(model, compression)
    block = model.dtype.itemsize * block_linear_parameters(model)
    if isinstance(method, RankMethod) and not method.whole:
        block += dense - bytes_needed(model, replace(compression, target_context=0))
    asked = f"compression.target_bytes={compression.target_bytes}"
    if dense <= wanted:
        raise UserError(f"{asked}: the dense model takes {dense:,} bytes, which is no more; there is nothing to remove")
    sparsity = math.ceil((dense - wanted) / block / STEP) * STEP
    if sparsity >= 1:
        raise UserError(f"{asked} cannot be met: {dense - block:,} bytes are left where everything is removed")
    sparsity = round(sparsity, 3)
    say(f"{asked}: {dense:,} bytes dense, {wanted:,} wanted, so compression.sparsity={sparsity:g}")
    return sparsity, {"target_bytes": wanted}


def bytes_needed(model: PreTrainedModel, compression: CompressionConfig) -> int:
    """Bytes of the weights, and of keys and values for the context and batch that the target states."""
    tokens = compression.target_context * compression.target_batch
    return model.dtype.itemsize * model.num_parameters() + tokens * cache_bytes_per_token(model.config, model.dtype)


def _for_speed(
    compression: CompressionConfig,
    method: Method,
    model: PreTrainedModel,
    tokens: CalibrationTokens,
    *,
    say: Callable[[str], object],
) -> tuple[float, dict[str, Any]]:
    """By timing models of the sizes that a sparsity gives, whatever their weights: sizes alone decide the time."""
    wanted = compression.target_speedup
    assert wanted is not None
    asked = f"compression.target_speedup={wanted:g}"
    if not isinstance(method, RankMethod):
        raise UserError(f"{asked}: method={method.name} plans no ranks, so that sizes are not known before the start")
    workload = workload_of(compression, model)
    calibration = Calibration(model=model, tokens=tokens)
    influence = calibration.check_activations()

    def shapes(sparsity: float) -> list[LayerShape]:
        return method.likely_shapes(CompressionTask(calibration=calibration, sparsity=sparsity), influence)

    def speedup(sparsity: float) -> float:
        return _speedup(model, random_compressed(model, shapes(sparsity)), workload)

    possible = PERCENT[: _num_possible(shapes)]
    sparsity, predicted = least_sparsity(wanted, speedup, possible)
    what = f"{predicted:.2f} times as fast ({workload}) by models of such sizes"
    if predicted < wanted:
        raise UserError(f"{asked} cannot be met: compression.sparsity={sparsity:g}, the most there is, is {what}")
    say(f"{asked}: {what}, so compression.sparsity={sparsity:g}")
    return sparsity, {"target_speedup": wanted, "target_workload": str(workload), "predicted_speedup": predicted}


def _num_possible(shapes: Callable[[float], object]) -> int:
    """How many of ``PERCENT`` leave every module a rank. Raises UserError where none does."""
    for count in range(len(PERCENT), 0, -1):
        try:
            shapes(PERCENT[count - 1])
            return count
        except UserError:
            if count == 1:
                raise
    raise AssertionError("PERCENT is empty")


def least_sparsity(
    wanted: float, speedup: Callable[[float], float], sparsities: Sequence[float]
) -> tuple[float, float]:
    """The least of the increasing ``sparsities`` whose ``speedup`` reaches ``wanted``, and it; else the last and its.

    Seconds fall nearly in line with what is removed, so each measurement is taken where the line through its two
    neighbours meets the target. Some four are needed.
    """
    low, high = -1, len(sparsities) - 1
    at_low, at_high = (0.0, 1.0), (sparsities[high], 1 / speedup(sparsities[high]))  # sparsity and relative seconds
    if at_high[1] > 1 / wanted:
        return sparsities[high], 1 / at_high[1]
    while high - low > 1:
        share = (at_low[1] - 1 / wanted) / (at_low[1] - at_high[1])
        crossing = at_low[0] + share * (at_high[0] - at_low[0])
        index = next((index for index in range(low + 1, high) if sparsities[index] >= crossing), high - 1)
        seconds = 1 / speedup(sparsities[index])
        if seconds <= 1 / wanted:
            high, at_high = index, (sparsities[index], seconds)
        else:
            low, at_low = index, (sparsities[index], seconds)
    return sparsities[high], 1 / at_high[1]


def workload_of(compression: CompressionConfig, model: PreTrainedModel) -> Workload:
    """What ``compression.target_speedup`` is about. Raises UserError where it does not fit the model's context."""
    context, added = int(model.config.max_position_embeddings), DECODE_TOKENS * (compression.target_phase == "decode")
    length = compression.target_context or min(LENGTH, context - added)
    if length + added > context:
        raise UserError(f"compression.target_context={length} is too long: the model has {context} positions")
    return Workload(compression.target_phase, compression.target_batch, length)


def _speedup(dense: PreTrainedModel, other: PreTrainedModel, workload: Workload) -> float:
    return measured_speedup(dense, other, workload, repeats=REPEATS, seconds=LEAST_SECONDS, decode_tokens=DECODE_TOKENS)
