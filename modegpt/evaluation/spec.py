"""What is scored: the schema of the ``evaluation`` configuration.

Plain mutable dataclasses, so that they serve as a configuration schema too; ranges are checked on construction.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from modegpt.errors import UserError

PHASES = ("prefill", "decode")


@dataclass
class PerplexitySpec:
    """Perplexity of one text.

    Attributes:
        source: a text source (see ``data/texts.py``); None scores no perplexity.
        path: a local file for it.
        windows: window lengths in tokens, or ``"auto"`` (see ``perplexity.resolve_windows``).
        batch_tokens: tokens in one forward pass (one window at least).
        limit: score only the first tokens of the text; such a result is marked as limited.
    """

    source: str | None = None
    path: str | None = None
    windows: Any = "auto"
    batch_tokens: int = 4096
    limit: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.windows, int) and not isinstance(self.windows, bool):
            self.windows = [self.windows]
        if self.windows != "auto":
            if (
                isinstance(self.windows, str)
                or not self.windows
                or not isinstance(self.windows, Sequence)
                or not all(type(window) is int for window in self.windows)
            ):
                raise UserError(
                    f"evaluation.perplexity.windows={self.windows} should be auto or a list of lengths, such as [2048]"
                )
            if min(self.windows) < 2:
                raise UserError(f"evaluation.perplexity.windows={list(self.windows)}: a window needs at least 2 tokens")
        _at_least("evaluation.perplexity.batch_tokens", self.batch_tokens, 1)
        if self.limit is not None:
            _at_least("evaluation.perplexity.limit", self.limit, 2)


@dataclass
class ZeroShotSpec:
    """Tasks of lm-evaluation-harness, without examples in the prompt unless asked for.

    Attributes:
        tasks: ``"tiny"``, ``"paper"``, ``"next_sentence"``, any task, group or tag of lm-evaluation-harness, or a list
            of these; None scores no task.
        data_path: folder of local files, read instead of the hub (see ``local_tasks.py``).
        batch_size: requests in one forward pass.
        limit: score only the first items of each task; such a result is marked as limited.
        num_fewshot: examples in the prompt; None: as many as each task has by itself.
        apply_chat_template: ask as the tokenizer's chat template does, examples as turns of the conversation.
        run_code: let tasks such as HumanEval run the code that the model writes, on this machine.
    """

    tasks: Any = None
    data_path: str | None = None
    batch_size: int = 32
    limit: int | None = None
    num_fewshot: int | None = 0
    apply_chat_template: bool = False
    run_code: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str):
            self.tasks = [self.tasks]
        if self.tasks is not None and (not self.tasks or not all(isinstance(task, str) for task in self.tasks)):
            raise UserError(
                f"evaluation.zeroshot.tasks={self.tasks} should be tiny, paper or a list of task names; "
                "null scores none"
            )
        _at_least("evaluation.zeroshot.batch_size", self.batch_size, 1)
        if self.limit is not None:
            _at_least("evaluation.zeroshot.limit", self.limit, 1)
        if self.num_fewshot is not None:
            _at_least("evaluation.zeroshot.num_fewshot", self.num_fewshot, 0)


@dataclass(frozen=True)
class Workload:
    """One thing to time.

    ``prefill``: a batch of prompts of ``length`` tokens to their first token. ``decode``: one more token after
    ``length``.
    """

    phase: str
    batch_size: int
    length: int

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise UserError(f"phase must be one of {', '.join(PHASES)}, got {self.phase!r}")
        if min(self.batch_size, self.length) < 1:
            raise UserError(f"batch size and length must be at least 1, got {self.batch_size} and {self.length}")

    @classmethod
    def parse(cls, phase: str, text: str) -> "Workload":
        """``"8x128"``: batch size 8, length 128. Raises UserError for anything else."""
        batch_size, _, length = text.partition("x")
        if not (batch_size.isdigit() and length.isdigit()):
            raise UserError(f"a workload is BATCHxLENGTH, for example 8x128, got {text!r}")
        return cls(phase, int(batch_size), int(length))

    def __str__(self) -> str:
        """``decode 8x128``."""
        return f"{self.phase} {self.batch_size}x{self.length}"

    @property
    def num_tokens(self) -> int:
        """Tokens that one step processes."""
        return self.batch_size * (self.length if self.phase == "prefill" else 1)


@dataclass
class ThroughputSpec:
    """How fast the compressed model runs beside the dense one, on this machine.

    Attributes:
        prefill: batches of prompts as BATCHxLENGTH (``1x512``), timed to their first token.
        decode: batches of sequences as BATCHxLENGTH, timed for one more token of each.
        repeats: measured rounds, in each of which the two models take turns.
        decode_tokens: tokens that one measurement of decoding makes.
    """

    prefill: list[str] = field(default_factory=list)
    decode: list[str] = field(default_factory=list)
    repeats: int = 7
    decode_tokens: int = 8

    def __post_init__(self) -> None:
        _at_least("evaluation.throughput.repeats", self.repeats, 1)
        _at_least("evaluation.throughput.decode_tokens", self.decode_tokens, 1)
        for phase in PHASES:
            try:
                self._of(phase)
            except UserError as error:
                raise UserError(f"evaluation.throughput.{phase}: {error}") from None

    @property
    def workloads(self) -> list[Workload]:
        """Everything to measure."""
        return [each for phase in PHASES for each in self._of(phase)]

    def _of(self, phase: str) -> list[Workload]:
        return [Workload.parse(phase, text) for text in getattr(self, phase)]

    def check(self, context: int) -> None:
        """Raises UserError for a workload that does not fit in ``context`` tokens."""
        for each in self.workloads:
            longest = each.length + (self.decode_tokens if each.phase == "decode" else 0)
            if longest > context:
                raise UserError(
                    f"evaluation.throughput.{each.phase}: {each.batch_size}x{each.length} needs {longest} tokens, "
                    f"the model's context is {context}"
                )


@dataclass
class EvaluationSpec:
    """The kinds of score; a section that is None, or names nothing, is not scored."""

    perplexity: PerplexitySpec | None = field(default_factory=PerplexitySpec)
    zeroshot: ZeroShotSpec | None = field(default_factory=ZeroShotSpec)
    throughput: ThroughputSpec = field(default_factory=ThroughputSpec)


def _at_least(name: str, value: int, least: int) -> None:
    if not least <= value < 2**63:
        raise UserError(f"{name}={value} should be at least {least}" + " and below 2^63" * (value >= 2**63))
