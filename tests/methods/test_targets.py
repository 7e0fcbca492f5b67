"""A target in bytes becomes the share to remove, the model that comes of it meets it, and else it is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from modegpt.config import CompressionConfig, read_bytes
from modegpt.errors import UserError
from modegpt.methods.targets import aimed, bytes_needed, missed_bytes, target_facts
from modegpt.models.checkpoints import load_model
from modegpt.records.store import load_record
from modegpt.run import run
from tests.small_run import small


def found(results: Path, **compression: Any) -> tuple[float, list[str]]:
    """The sparsity for the embedded model, and what is said."""
    config = small(results, compression=CompressionConfig(**compression))
    said: list[str] = []
    model = load_model(str(config.model.path), device="cpu")
    return aimed(config, model, say=said.append).compression.sparsity, said


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("4GiB", 4 << 30), ("1.5 MB", 1_500_000), ("2kB", 2000), ("3TiB", 3 << 40), ("17", 17), ("17B", 17)],
)
def test_sizes_are_read(text: str, wanted: int) -> None:
    assert read_bytes("x", text) == wanted


@pytest.mark.parametrize("text", ["many", "4 giga", "-3GB", "0", "4G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"compression.target_bytes={text} is not understood"):
        CompressionConfig(target_bytes=text)


def test_the_run_meets_it_and_says_so(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small(results, compression=CompressionConfig(target_bytes="4.5MB"), quiet=False)
    record = load_record(run(config, command="modegpt"))
    compression = record["compression"]
    assert compression["target_bytes"] == 4_500_000 >= compression["achieved_bytes"] > 4_480_000
    assert compression["achieved_bytes"] == 4 * compression["num_parameters"]
    assert f"compression.sparsity={compression['target_sparsity']:g}" in capsys.readouterr().out
    assert record["config"]["compression"]["target_bytes"] == "4.5MB" and not compression.get("warnings")
    assert "target" not in json.dumps(record["identity"]), "the rate decides, however it was found"


def test_the_cache_counts_where_it_is_asked_for(results: Path) -> None:
    """Heads shrink with the weights, unless the engine wants them whole, and then the weights pay for all."""
    weights, _ = found(results, target_bytes="5MB")
    both, said = found(results, target_bytes="5.3072MB", target_context=50, target_batch=2)
    whole, _ = found(results, target_bytes="5.3072MB", target_context=50, target_batch=2, engine="gguf")
    assert both < weights == whole and "5,523,968 bytes dense" in said[0]


def test_what_cannot_be_met_is_refused(results: Path) -> None:
    with pytest.raises(UserError, match="there is nothing to remove"):
        found(results, target_bytes="1GB")
    with pytest.raises(UserError, match=r"cannot be met: [\d,]+ bytes are left where everything is removed"):
        found(results, target_bytes="100kB")
    with pytest.raises(UserError, match="no effect with method=dense"):
        config = small(results, compression=CompressionConfig(target_bytes="4MB"), method={"name": "dense"})
        aimed(config, load_model(str(config.model.path), device="cpu"), say=print)
    with pytest.raises(UserError, match="no effect without target_bytes"):
        CompressionConfig(target_context=5)


def test_a_missed_target_is_a_warning(results: Path) -> None:
    model = load_model("embedded:tiny-llama", device="cpu")
    asked = CompressionConfig(target_bytes="5MB")
    facts = target_facts(asked, model)
    assert facts["achieved_bytes"] == bytes_needed(model, asked) == 5_216_768
    assert missed_bytes(facts) == ["the target is missed: 5,216,768 bytes needed, 5,000,000 asked"]
    assert missed_bytes(facts | {"target_bytes": 6_000_000}) == [] == missed_bytes({})
