"""SLEB: drop layers one at a time, each time the one that the model predicts best without.

Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer
Blocks", ICML 2024, section 3.2 (the third metric) and algorithm 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modegpt.calibration.stream import HiddenStates, advance, layers_replaced, yielding
from modegpt.cost.work import forward
from modegpt.errors import UserError
from modegpt.methods.base import Compressed, CompressionTask, Method
from modegpt.methods.divergence import StandIns, acting_as
from modegpt.methods.layer_dropping import drop_layers, num_dropped_layers
from modegpt.models import decoder_layers


@dataclass(frozen=True)
class SLEB(Method):
    """Greedy: at each step the layer goes whose absence leaves the lowest perplexity on the calibration tokens.

    Args:
        num_first_kept, num_last_kept: layers at either end of what remains that are not candidates. The
            authors' code keeps one at each end; the algorithm as published keeps none.

    Checked line by line against the official code (jiwonsong-dev/SLEB, ``sleb.py``), and beside its loss on the same
    tokens: on tiny-llama the same three layers go, in the same order, at losses equal to 1e-7, with one layer kept at
    each end and with none.

    Ties go to the earliest layer. A candidate is run from where it differs from the model of its step: what
    precedes the missing layer is computed once a step, so a step costs about half of its candidates' passes.
    """

    name: ClassVar[str] = "sleb"
    experts: ClassVar[bool] = True

    num_first_kept: int = 0
    num_last_kept: int = 0

    def __post_init__(self) -> None:
        if self.num_first_kept < 0 or self.num_last_kept < 0:
            raise UserError(
                f"sleb num_first_kept={self.num_first_kept} and num_last_kept={self.num_last_kept} must not be negative"
            )

    @torch.no_grad()
    def compress(self, task: CompressionTask) -> Compressed:
        """Drop one layer a step until the share nearest to the task's sparsity is gone."""
        calibration, model = task.calibration, task.model
        alive = list(range(calibration.num_layers))
        num_dropped = num_dropped_layers(task.sparsity, len(alive))
        if len(alive) - num_dropped < self.num_first_kept + self.num_last_kept:
            raise UserError(
                f"sleb cannot drop {num_dropped} of {len(alive)} layers and keep the first {self.num_first_kept} "
                f"and the last {self.num_last_kept}; lower the sparsity or keep fewer"
            )
        dropped, perplexities = [], []
        bar = calibration.progress.bar(num_candidates(self, len(alive), num_dropped), "layer elimination", "candidate")
        with calibration.meter.stage("elimination", counted=True), bar:
            start = calibration.embed() if num_dropped else None
            for _ in range(num_dropped):
                assert start is not None
                candidates = alive[self.num_first_kept : len(alive) - self.num_last_kept]
                losses, layers_run = losses_without(
                    model, calibration.tokens.ids, start, alive, candidates, on_candidate=bar.update
                )
                best = min(candidates, key=losses.__getitem__)
                alive.remove(best)
                dropped.append(best)
                perplexities.append(math.exp(losses[best]))
                calibration.meter.forward_passes += layers_run / calibration.num_layers
        if num_dropped:
            calibration.meter.calibration_tokens = calibration.tokens.num_tokens
        return drop_layers(task, dropped, calibration_perplexities=perplexities)


def num_candidates(method: SLEB, num_layers: int, num_dropped: int) -> int:
    """Models that are tried in all."""
    return sum(num_layers - step - method.num_first_kept - method.num_last_kept for step in range(num_dropped))


def losses_without(
    model: PreTrainedModel,
    ids: Tensor,
    start: HiddenStates,
    alive: list[int],
    candidates: list[int],
    *,
    on_candidate: Callable[[], object],
    part: Callable[[nn.Module], StandIns] | None = None,
) -> tuple[dict[int, float], int]:
    """For each of the ``candidates`` the mean loss of the layers ``alive`` without it, and how many layers ran.

    Args:
        ids: (num_samples, sequence_length) tokens, those that ``start`` (in front of layer 0, untouched) embeds.
        alive: increasing layer indices; ``candidates`` among them.
        part: of a candidate's layer, what acts as if a part of it were missing; None: all of it is.
    """
    layers, losses, layers_run = decoder_layers(model), {}, 0
    prefix = HiddenStates(list(start.batches), start.arguments)
    for position, index in enumerate(alive[: alive.index(candidates[-1]) + 1]):
        if index in candidates:
            rest = HiddenStates(list(prefix.batches), prefix.arguments)
            if part is not None:
                with acting_as(part(layers[index])):
                    advance(rest, index, layers[index])
                layers_run += 1
            for later in alive[position + 1 :]:
                advance(rest, later, layers[later])
                layers_run += 1
            losses[index] = next_token_loss(model, ids, rest)
            on_candidate()
        if index != candidates[-1]:
            advance(prefix, index, layers[index])
            layers_run += 1
    return losses, layers_run


def next_token_loss(model: PreTrainedModel, ids: Tensor, hidden: HiddenStates) -> float:
    """Mean negative log-likelihood (nats a token) of ``ids`` given the ``hidden`` states that leave the last layer.

    The model's own forward runs with ``hidden`` in its layers' place, so the norm and the head are the family's own.
    """
    total, count, first = 0.0, 0, 0
    for x in hidden.batches:
        batch = ids[first : first + x.shape[0]].to(model.device)
        first += x.shape[0]
        with layers_replaced(decoder_layers(model), yielding(x)), forward():
            logits = model(batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
        )
        total, count = total + loss.item(), count + batch[:, 1:].numel()
    return total / count
