"""The model card is text whatever the record holds, and names a base model only where it is one on the hub."""

from pathlib import Path

import pytest
import yaml

from modegpt.models.card import model_card
from tests.models.family_table import native_model
from tests.models.saved import RECORD

HOSTILE = "<img src=x onerror=alert(1)> | a\n# b `c` [d](javascript:e) \x1b[2J"


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_names_of_others_stay_text() -> None:
    model = native_model("llama")
    record = RECORD | {
        "name": HOSTILE,
        "command": f"modegpt model.name='{HOSTILE}' ```\n</code>",
        "model": RECORD["model"] | {"name": HOSTILE, "path": HOSTILE},
        "calibration": {"source": HOSTILE},
    }
    card = model_card(model, record)
    before, _, after = card.partition("## Command")
    assert "<img" not in before and "\x1b" not in card and "](javascript" not in before.replace(r"\](", "")
    for table in before.split("\n\n"):
        rows = [line.replace(r"\|", "").count("|") for line in table.splitlines() if line.startswith("|")]
        assert len(set(rows)) <= 1, table
    fence = after.split()[0]
    assert set(fence) == {"`"} and len(fence) == 4 and after.count(fence) == 2, "the command stays in its block"
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["modegpt", "compressed"],
    }


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("someone/model", True),
        ("gpt2", True),
        ("here/model", False),
        ("here", False),
        ("./here", False),
        (".../model", False),
        ("../model", False),
        ("a/b/c", False),
        ("embedded:tiny-llama", False),
        ("~/model", False),
        ("x\ntags: [a]", False),
        ("someone/model: x", False),
        ("C:\\models\\mine", False),
        (None, False),
    ],
)
def test_a_base_model_is_on_the_hub(
    path: str | None, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory of the same name comes before the hub when a model is loaded, so the hub's is not what was used."""
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = model_card(native_model("llama"), RECORD | {"model": RECORD["model"] | {"path": path}})
    assert front_matter(card).get("base_model") == (path if named else None)
