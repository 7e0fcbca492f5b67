"""What is scored: the schema of the ``evaluation`` configuration.

Plain mutable dataclasses, so that they serve as a configuration schema too; ranges are checked on construction.
"""

from dataclasses import dataclass, field
from typing import Any

from modegpt.errors import UserError


@dataclass
class PerplexitySpec:
    """Perplexity of one text.

    Attributes:
        source: a text source (see ``calibration/texts.py``); None scores no perplexity.
        path: a local file for it.
        windows: window lengths in tokens, or ``"auto"``: 2048 where it fits and the model's own context, no more than 4096.
        batch_tokens: tokens in one forward pass (one window at least).
    """

    source: str | None = None
    path: str | None = None
    windows: Any = "auto"
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        if isinstance(self.windows, int) and not isinstance(self.windows, bool):
            self.windows = [self.windows]
        if self.windows != "auto":
            if isinstance(self.windows, str) or not self.windows or not all(isinstance(window, int) for window in self.windows):
                raise UserError(f"evaluation.perplexity.windows={self.windows} should be auto or a list of lengths, such as [2048]")
            if min(self.windows) < 2:
                raise UserError(f"evaluation.perplexity.windows={list(self.windows)}: a window needs at least 2 tokens")
        _at_least("evaluation.perplexity.batch_tokens", self.batch_tokens, 1)


@dataclass
class ZeroShotSpec:
    """Zero-shot accuracy through lm-evaluation-harness.

    Attributes:
        tasks: ``"tiny"``, ``"paper"``, any task name of lm-evaluation-harness, or a list of these; None scores no task.
        data_path: folder of local files for the paper's tasks, read instead of the hub.
        batch_size: requests in one forward pass.
        limit: score only the first items of each task; such a result is marked as limited.
    """

    tasks: Any = None
    data_path: str | None = None
    batch_size: int = 32
    limit: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str):
            self.tasks = [self.tasks]
        if self.tasks is not None and (not self.tasks or not all(isinstance(task, str) for task in self.tasks)):
            raise UserError(f"evaluation.zeroshot.tasks={self.tasks} should be tiny, paper or a list of task names; null scores none")
        _at_least("evaluation.zeroshot.batch_size", self.batch_size, 1)
        if self.limit is not None:
            _at_least("evaluation.zeroshot.limit", self.limit, 1)


@dataclass
class EvaluationSpec:
    """The two kinds of score; a section that is None, or names nothing, is not scored."""

    perplexity: PerplexitySpec | None = field(default_factory=PerplexitySpec)
    zeroshot: ZeroShotSpec | None = field(default_factory=ZeroShotSpec)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name}={value} should be at least {least}")
