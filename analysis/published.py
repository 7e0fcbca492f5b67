"""Published figures beside ours, where model, method, rate, calibration, metric and window all match, and nowhere else.

``published_numbers.csv`` is a copy of the collected figures with their sources and how sure each one is.
"""

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.cells import Cell
from analysis.runs import Run

FILE = Path(__file__).resolve().parent / "published_numbers.csv"
METHODS = {
    "Dense": "dense",
    "MoDeGPT": "modegpt",
    "MoDeGPT BI allocation": "modegpt",
    "MoDeGPT uniform allocation": "modegpt",
    "SliceGPT": "slicegpt",
    "ShortGPT": "shortgpt",
    "SLEB": "sleb",
    "LLM-Pruner": "llm_pruner",
    "LLM Surgeon": "llm_surgeon",
    "SVD-LLM": "svd_llm",
    "ASVD": "asvd",
    "FLAP": "flap",
}
ALLOCATIONS = {"MoDeGPT": "entropic", "MoDeGPT BI allocation": "entropic", "MoDeGPT uniform allocation": "uniform"}
PAPER_TASKS = {
    "arc_easy": "acc_norm",
    "arc_challenge": "acc_norm",
    "piqa": "acc_norm",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
}
"""The tasks and metrics behind the paper's zero-shot mean; other scales have other names in the list."""
SOURCES = {"WikiText-2": "wikitext2", "Alpaca": "alpaca"}


@dataclass(frozen=True)
class Published:
    """One published figure."""

    paper: str
    table: str
    model: str
    method: str
    calibration: str
    rate: str
    window: str
    metric: str
    value: str
    source: str
    confidence: str


@dataclass(frozen=True)
class Beside:
    """A published figure and ours; ours is empty where nothing matches."""

    published: Published
    ours: Cell

    @property
    def difference(self) -> float | None:
        """Ours minus the published one."""
        return None if self.ours.mean is None else self.ours.mean - float(self.published.value)


def load_published() -> list[Published]:
    """Every figure of the list."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return [Published(*row) for row in list(csv.reader(file))[1:]]


def beside(runs: Sequence[Run], wanted: Callable[[Published], bool]) -> list[Beside]:
    """The wanted figures, each with our runs that match it."""
    return [Beside(each, _ours(each, runs)) for each in load_published() if wanted(each)]


def _ours(each: Published, runs: Sequence[Run]) -> Cell:
    metric = metric_of(each)
    if metric is None:
        return Cell()
    name, scale = metric
    found: dict[str, float] = {}
    for run in runs:
        dense = METHODS.get(each.method.removesuffix("-Alpaca")) == "dense"
        value = run.facts.get(f"dense_{name}" if dense else name)
        if (
            value is not None
            and same_model(run.facts["model"], each.model)
            and (dense or _same_run(run, each))
            and (scale == 1 or _paper_metrics(run))
        ):
            found[run.path] = scale * value
            if dense:
                break
    return Cell(values=tuple(found.values()), records=tuple(found))


def metric_of(each: Published) -> tuple[str, float] | None:
    """The frame's column that measures the same thing, and the factor to the published unit; None if there is none."""
    if each.metric == "wikitext2_ppl" and each.window.isdigit():
        return f"ppl_wikitext2_{each.window}", 1.0
    if each.metric in ("zeroshot5_avg_pct", "avg5_pct"):
        return "zeroshot_mean", 100.0
    task = each.metric.removesuffix("_pct")
    return (f"zeroshot_{task}", 100.0) if task in PAPER_TASKS and each.metric != task else None


def same_model(ours: str, theirs: str) -> bool:
    """Whether two names mean the same model; only dashes and case may differ."""
    return ours.replace("-", "").lower() == theirs.replace("-", "").lower()


def _same_run(run: Run, each: Published) -> bool:
    method = each.method.removesuffix("-Alpaca")
    number = re.fullmatch(r"\d+(\.\d+)?", each.rate)
    calibration = re.fullmatch(r"(WikiText-2|Alpaca) (\d+)x(\d+)", each.calibration)
    if (
        method not in METHODS
        or number is None
        or abs(float(each.rate) - 100 * run.facts["target_sparsity"]) > 1e-6
        or calibration is None
    ):
        return False
    drawn = (run.facts["calibration"], run.facts["calibration_num_samples"], run.facts["calibration_sequence_length"])
    paper = method not in ALLOCATIONS or (
        run.setting("allocation") == ALLOCATIONS[method]
        and tuple(run.setting(f"decomposition/{module}") for module in ("mlp", "query_key", "value_output"))
        == ("nystrom", "cr", "svd")
    )
    return (
        run.facts["method"] == METHODS[method]
        and paper
        and drawn == (SOURCES[calibration[1]], int(calibration[2]), int(calibration[3]))
    )


def _paper_metrics(run: Run) -> bool:
    scored: Mapping = run.record["metrics"]["dense"]["zeroshot"]
    return {task: score.get("metric") for task, score in scored.items() if task != "mean"} == PAPER_TASKS
