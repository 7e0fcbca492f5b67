"""The model card of a compressed checkpoint: what it is, how it was made and measured, how to load it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from modegpt.escaping import markdown, printable_lines

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
"""What the hub takes for the name of a repository."""

LOADING = """## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)  # or `import modegpt.models` first
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
```

It needs transformers >= 5. To score it:
`lm_eval run --model hf --model_args pretrained=PATH,trust_remote_code=True --tasks ...`
"""


def model_card(model: PreTrainedModel, record: Mapping[str, Any]) -> str:
    """Markdown with front matter, from a run's ``record``; sections whose part of the record is absent are left out."""
    about = record.get("model") or {}
    sections = [
        _front_matter(about),
        f"# {markdown(str(record.get('name') or about.get('name') or type(model).__name__))}\n",
        _origin(about, record),
    ]
    sections += [
        _metrics(record.get("metrics") or {}),
        _layers(model),
        _calibration(record.get("calibration")),
        _command(record),
        LOADING,
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(about: Mapping[str, Any]) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [modegpt, compressed]"]
    path = str(about.get("path") or "")
    if HUB_NAME.fullmatch(path) and not Path(path).exists():  # a directory comes before the hub
        lines.append(f"base_model: {path}")
    return "\n".join([*lines, "---", ""])


def _origin(about: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    compression = record.get("compression") or {}
    rows = [
        ("dense model", about.get("name")),
        ("method", compression.get("method")),
        ("sparsity of the block-linear weights", _percent(compression.get("achieved_sparsity"))),
        ("sparsity of the whole model", _percent(compression.get("whole_model_sparsity"))),
        ("dense parameters", about.get("num_parameters")),
        ("dense weights sha256", about.get("weights_sha256")),
    ]
    return _table(("", ""), [row for row in rows if row[1] is not None])


def _metrics(metrics: Mapping[str, Any]) -> str:
    dense, compressed = (dict(_flat_scores(metrics.get(side) or {})) for side in ("dense", "compressed"))
    names = [*compressed, *(name for name in dense if name not in compressed)]
    rows = [(name, _number(dense.get(name)), _number(compressed.get(name))) for name in names]
    return "## Scores\n\n" + _table(("metric", "dense", "compressed"), rows) if rows else ""


def _flat_scores(scores: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, score in (scores.get("perplexity") or {}).items():
        yield name, score["value"]
    for task, score in (scores.get("zeroshot") or {}).items():
        if isinstance(score, Mapping):
            yield f"{task} ({score.get('metric', 'acc')})", score["value"]
        elif isinstance(score, int | float):
            yield task, score


def _layers(model: PreTrainedModel) -> str:
    config = model.config
    if not hasattr(config, "qk_head_dims"):
        return ""
    columns = (
        config.kept_layers,
        config.qk_head_dims,
        config.v_head_dims,
        config.kv_head_counts,
        config.intermediate_sizes,
    )
    head = ("dense layer", "query-key head size", "value head size", "key-value heads", "MLP width")
    return "## Sizes per layer\n\n" + _table(head, list(zip(*columns, strict=True)))


def _calibration(calibration: Mapping[str, Any] | None) -> str:
    rows = [(name, value) for name, value in (calibration or {}).items() if isinstance(value, str | int | float)]
    return "## Calibration\n\n" + _table(("", ""), rows) if rows else ""


def _command(record: Mapping[str, Any]) -> str:
    if not record.get("command"):
        return ""
    command = printable_lines(str(record["command"]))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    return f"## Command\n\n{fence}\n{command}\n{fence}\n"


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return (
        "\n".join(
            "| " + " | ".join("" if cell is None else markdown(str(cell)) for cell in line) + " |" for line in lines
        )
        + "\n"
        if rows
        else ""
    )


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.2f} %"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
