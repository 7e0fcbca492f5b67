"""The main job in seconds, for tests that want a whole run."""

import json
from pathlib import Path
from typing import Any

from modegpt.config import CalibrationConfig, DecompositionConfig, ModelConfig, OutputConfig, RunConfig, TrackingConfig
from modegpt.evaluation.spec import EvaluationSpec, PerplexitySpec, ZeroShotSpec

PAPER = {"mlp": {"name": "nystrom"}, "query_key": {"name": "cr"}, "value_output": {"name": "svd"}}


def small(results: Path, **changes: Any) -> RunConfig:
    """A run of seconds: few samples, two perplexity windows, four items a task."""
    text = results.parent / "text.jsonl"
    if not text.exists():
        lines = [json.dumps({"text": "The old baker walked to the market and bought two apples . " * 30})] * 12
        text.write_text("\n".join(lines), encoding="utf-8")
    defaults: dict[str, Any] = {
        "quiet": True,
        "model": ModelConfig(name="tiny-llama", path="embedded:tiny-llama"),
        "method": {"name": "modegpt"},
        "decomposition": DecompositionConfig(**PAPER),
        "allocation": {"name": "entropic"},
        "calibration": CalibrationConfig(source="jsonl", path=str(text), num_samples=4, sequence_length=128),
        "evaluation": EvaluationSpec(
            PerplexitySpec(source="jsonl", path=str(text), windows=[128]), ZeroShotSpec(tasks=["tiny_pronoun"], limit=4)
        ),
        "output": OutputConfig(root=str(results)),
        "tracking": TrackingConfig(mode="disabled"),
    }
    return RunConfig(**(defaults | changes))
