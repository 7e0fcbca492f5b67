"""Recovery as a step of the main job: what it trains on, that this is not what is scored, and what it leaves in the record."""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modegpt.config import RunConfig, build
from modegpt.cost.metering import CostMeter
from modegpt.cost.work import forward_cost
from modegpt.data.texts import Documents, load_documents, tokenize_stream
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
    """A training that follows compression, its windows drawn from the calibration text and checked against the test text.

    ``shared``: share of the test text's characters in documents that stand in the training text too.
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
        """The options that decide the result; windows in one pass only round."""
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
        """Train ``model``, whose scores are ``before``; returns it with its new scores and the record's ``compression.recovery``."""
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


def make_recovery(config: RunConfig) -> Lora | None:
    """The training that ``config.recovery`` describes; None for ``none``.

    Raises UserError for unknown or impossible options, a run that has nothing to train, and a missing peft.
    """
    name = config.recovery.get("name")
    if name == "none":
        return None
    lora = build(RECOVERIES, config.recovery, "recovery")
    if config.method["name"] == "dense":
        raise UserError(f"recovery={name} has no effect with method=dense: there is no compressed model")
    if config.out_of_core.enabled:
        raise UserError(
            f"recovery={name} trains the whole compressed model in memory; leave out out_of_core.enabled=true"
        )
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"recovery={name} needs peft: pip install 'modegpt[recovery]'")
    return lora


def prepare_recovery(config: RunConfig, lora: Lora, *, tokenizer: PreTrainedTokenizerBase, context: int) -> Recovery:
    """Draw the training windows of ``lora`` from the calibration text.

    Raises UserError for too little text, a window longer than the context, and a training text that holds more than one
    per cent of the test text.
    """
    wanted, test, name = config.calibration, config.evaluation.perplexity, config.recovery["name"]
    documents = load_documents(wanted.source, path=wanted.path, split="calibration")
    shared = (
        shared_share(documents, load_documents(test.source, path=test.path, split="test"))
        if test and test.source
        else 0.0
    )
    if shared > LARGEST_SHARED:
        raise UserError(
            f"recovery={name} would train on the test text: {100 * shared:.0f} % of it stands in the calibration text; choose another calibration text"
        )
    stream = tokenize_stream(documents, tokenizer)
    tokens = draw_windows(
        stream,
        num_samples=lora.num_samples,
        sequence_length=lora.window(context),
        seed=config.seed,
        asked_by="recovery",
    )
    return Recovery(name=name, lora=lora, tokens=tokens, shared=shared, seed=config.seed)


def shared_share(training: Documents, test: Documents) -> float:
    """Share of the characters of ``test``, its short documents aside, that lie in documents which ``training`` holds too."""
    seen = {text.strip() for text in training}
    long = [text.strip() for text in test if len(text.strip()) >= SHORT_CHARACTERS]
    return sum(len(text) for text in long if text in seen) / max(1, sum(map(len, long)))
