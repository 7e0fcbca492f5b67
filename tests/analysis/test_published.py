"""A published figure stands beside ours only where everything matches."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from analysis.published import PAPER_TASKS, Published, beside, load_published, metric_of, same_model
from analysis.runs import Run, load_runs


@pytest.fixture
def figure() -> Published:
    """MoDeGPT on Llama-2 7B at 30 %: 7.51 on windows of 4096."""
    [found] = [
        each
        for each in load_published()
        if each.table.startswith("MoDeGPT Table 3")
        and (each.model, each.method, each.rate) == ("Llama-2-7B", "MoDeGPT", "30")
    ]
    assert (found.value, found.window) == ("7.51", "4096")
    return found


def paper_run(
    store,
    root: Path,
    *,
    model: str = "llama2-7b",
    window: int = 4096,
    samples: int = 128,
    allocation: str = "entropic",
    sparsity: float = 0.3,
    text: str = "wikitext2",
    length: int = 2048,
    method: str = "modegpt",
    mlp: str = "nystrom",
    tasks: Mapping[str, str] = MappingProxyType({}),
) -> list[Run]:
    """One run in the paper's setting, but for what is asked for."""
    score = {"value": 7.0, "window": window, "num_windows": 9, "num_predicted_tokens": 9, "mean_nll": 1.9}
    right = {"value": 0.6, "stderr": 0.01, "num_items": 100}
    zeroshot: dict[str, dict[str, Any]] = {task: right | {"metric": metric} for task, metric in tasks.items()}
    zeroshot |= {"mean": {"value": 0.6, "stderr": 0.01, "num_tasks": len(tasks), "limit": None}} if tasks else {}
    scores = {"perplexity": {f"ppl_wikitext2_{window}": score}, "zeroshot": zeroshot}
    metrics = {"dense": scores, "compressed": scores, "retention": {}, "limited": False}
    calibration = {
        "source": text,
        "num_samples": samples,
        "sequence_length": length,
        "seed": 0,
        "num_tokens": 1,
        "tokens_sha256": "c" * 64,
    }
    settings = {"method": method, "compression.sparsity": sparsity, "allocation": allocation, "seed": 0}
    settings |= {"decomposition/mlp": mlp}
    store.write_one(root, store.experiment("methods"), settings, model=model, metrics=metrics, calibration=calibration)
    return load_runs(root)


def test_the_same_setting_matches(store, tmp_path: Path, figure: Published) -> None:
    [match] = beside(paper_run(store, tmp_path), lambda each: each == figure)
    assert match.ours.values == (7.0,)
    assert match.difference == pytest.approx(7.0 - 7.51)


@pytest.mark.parametrize(
    "change",
    [
        {"window": 2048},
        {"model": "llama3-8b"},
        {"samples": 64},
        {"length": 1024},
        {"text": "alpaca"},
        {"allocation": "uniform"},
        {"sparsity": 0.2},
        {"method": "slicegpt"},
        {"mlp": "columns"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_difference_keeps_them_apart(store, tmp_path: Path, figure: Published, change: dict) -> None:
    [match] = beside(paper_run(store, tmp_path, **change), lambda each: each == figure)
    assert match.ours.values == () and match.difference is None


def test_a_mean_over_other_metrics_is_another_number(store, tmp_path: Path) -> None:
    """The same five tasks, one of them by plain accuracy, or four of them."""
    [mean] = [
        each
        for each in load_published()
        if (each.model, each.method, each.rate) == ("Llama-2-7B", "MoDeGPT BI allocation", "30")
        and each.metric == "zeroshot5_avg_pct"
    ]
    others = [
        PAPER_TASKS,
        {**PAPER_TASKS, "piqa": "acc"},
        {task: metric for task, metric in PAPER_TASKS.items() if task != "piqa"},
    ]
    for number, (tasks, values) in enumerate(zip(others, [(60.0,), (), ()], strict=True)):
        [match] = beside(paper_run(store, tmp_path / str(number), tasks=tasks), lambda each: each == mean)
        assert match.ours.values == pytest.approx(values)


def test_other_scales_never_match(figure: Published) -> None:
    assert metric_of(figure) == ("ppl_wikitext2_4096", 1.0)
    assert metric_of(replace(figure, metric="avg5_pct")) == ("zeroshot_mean", 100.0)
    assert metric_of(replace(figure, metric="piqa_acc_pct")) is None
    assert (
        metric_of(replace(figure, metric="zeroshot5_avg_pct (acc for PIQA/ARC-e/WinoG, acc_norm HellaS/ARC-c)")) is None
    )
    assert metric_of(replace(figure, window="")) is None
    assert same_model("llama3.1-8b", "Llama-3.1-8B") and not same_model("llama3-8b", "Llama-3.1-8B")
