"""Recovery as a step of the main job: what it trains on, never the test text, and what it leaves in the record."""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modegpt.cost.metering import CostMeter
from modegpt.cost.work import forward_cost
from modegpt.data.texts import Documents, tokenize_stream
from modegpt.data.tokens import CalibrationTokens, draw_windows
from modegpt.errors import UserError
from modegpt.models.integrity import check_finite
from modegpt.progress import Progress
from modegpt.recovery.lora import Lora

RECOVERIES = {"lora": Lora}
SHORT_CHARACTERS = 100  # headings and one-line documents repeat in any text
LARGEST_SHARED = 0.01
STAGE = "recovery"


@dataclass(frozen=True)
class Recovery:
    """A training that follows compression.

    Args:
        tokens: its windows, drawn from the calibration text.
        shared: share of the test text's characters in documents that stand in the training text too.
    """

    name: str
    lora: Lora
    tokens: CalibrationTokens
    shared: float
    seed: int

    @property
    def label(self) -> str:
        """What the run's name says of it."""
        return f"{self.name}-{self.lora.targets}"

    def decides(self) -> dict[str, Any]:
        """The options that decide the result: all but the windows in one pass, which only round."""
        return {"name": self.name} | {
            key: value for key, value in asdict(self.lora).items() if key != "micro_batch_size"
        }

    def apply(
        self,
        model: PreTrainedModel,
        before: dict[str, Any],
        *,
        score: Callable[[PreTrainedModel], dict[str, Any]],
        meter: CostMeter,
        progress: Progress,
    ) -> tuple[PreTrainedModel, dict[str, Any], dict[str, Any]]:
        """Train ``model``, whose scores are ``before``.

        Returns the trained model, its scores and the record's ``compression.recovery``.
        """
        with meter.stage(STAGE) as metered:
            # a backward through frozen weights, of which no gradient is made, costs what a forward does
            cost = forward_cost(model)
            for kind in ("forward", "product"):
                metered.add(kind, cost.dtype, flops=self.lora.epochs * cost.flops(*self.tokens.ids.shape))
            recovered, report = self.lora.recover(model, self.tokens.ids, seed=self.seed, progress=progress)
        check_finite(recovered)
        text = {
            "num_samples": self.tokens.ids.shape[0],
            "sequence_length": self.tokens.ids.shape[1],
            "tokens_sha256": self.tokens.sha256,
        }
        return (
            recovered,
            score(recovered),
            self.decides() | report | text | {"shared_with_test": self.shared, "before": before},
        )


def check_recovery(name: str, *, method: str, out_of_core: bool) -> None:
    """Raises UserError for a run that has nothing to train, or not in memory, and for a missing peft."""
    if method == "dense":
        raise UserError(f"recovery={name} has no effect with method=dense: there is no compressed model")
    if out_of_core:
        raise UserError(
            f"recovery={name} trains the whole compressed model in memory; leave out out_of_core.enabled=true"
        )
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"recovery={name} needs peft: pip install 'modegpt[recovery]'")


def prepare_recovery(
    lora: Lora,
    *,
    name: str,
    training: Documents,
    test: Documents | None,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    seed: int,
    bos: int | None = None,
) -> Recovery:
    """Draw the training windows of ``lora`` from the ``training`` text, each with ``bos`` in front, if given.

    Raises UserError for too little text, a window longer than the context, and a training text that holds more than one
    per cent of the ``test`` text.
    """
    shared = shared_share(training, test) if test else 0.0
    if shared > LARGEST_SHARED:
        raise UserError(
            f"recovery={name} would train on the test text: {100 * shared:.0f} % of it stands in the calibration text; "
            "choose another calibration text"
        )
    tokens = draw_windows(
        tokenize_stream(training, tokenizer, special_tokens=bos is None),
        num_samples=lora.num_samples,
        sequence_length=lora.window(context),
        seed=seed,
        bos=bos,
        asked_by="recovery",
    )
    return Recovery(name=name, lora=lora, tokens=tokens, shared=shared, seed=seed)


def shared_share(training: Documents, test: Documents) -> float:
    """Share of ``test``'s characters that lie in documents which ``training`` holds too, short documents left out."""
    seen = {text.strip() for text in training}
    long = [text.strip() for text in test if len(text.strip()) >= SHORT_CHARACTERS]
    return sum(len(text) for text in long if text in seen) / max(1, sum(map(len, long)))
