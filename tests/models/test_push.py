"""``modegpt-export --push`` puts a checkpoint or an export with its card on a hub: here, one on the loopback."""

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from modegpt.cli import export as command
from modegpt.models.checkpoints import load_model, save_checkpoint
from tests.loopback import serving
from tests.models.family_table import dense_model, sliced_model
from tests.models.saved import RECORD, tiny_tokenizer


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs: a repository is a dict of files."""

    repositories: dict[str, dict[str, bytes]]

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = self.path.strip("/").split("/")
        if parts[-2:] == ["repos", "create"]:
            asked = json.loads(raw)
            if asked.get("organization") == "forbidden":
                return self._answer({"error": "you may not write here"}, 403)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, {})
            return self._answer({"url": f"http://{self.headers['Host']}/{name}", "id": name})
        if parts[-2] == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(raw)["files"]]
            return self._answer({"files": [file | {"shouldIgnore": False} for file in files]})
        if parts[-2] == "commit":
            name = "/".join(parts[2:4])
            kept = self.repositories[name]
            for line in raw.decode().splitlines():
                step = json.loads(line)
                if step["key"] == "file":
                    kept[step["value"]["path"]] = base64.b64decode(step["value"]["content"])
            return self._answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/{'/'.join(parts[2:4])}/commit/1",
                    "commitOid": "1",
                    "success": True,
                }
            )
        return self._answer({})

    def do_GET(self) -> None:
        known = self.path.startswith(tuple(f"/api/models/{name}" for name in self.repositories))
        self._answer(
            {"siblings": [], "id": "someone/small"} if known else {"error": "not found"}, 200 if known else 404
        )

    def _answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing is said."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, bytes]]]:
    repositories: dict[str, dict[str, bytes]] = {}
    whole = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with serving(Hub, repositories=repositories) as address:
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: whole(endpoint=address, token="hf_test"))
        yield repositories


def test_checkpoints_and_exports_go_to_the_hub(hub: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = save_checkpoint(sliced_model(dense_model("llama"))[0], tiny_tokenizer(), tmp_path / "ours", RECORD)
    assert command.main([str(ours), "--push", "someone/small"]) == 0
    assert "on the hub: http://127.0.0.1" in capsys.readouterr().out
    there = hub["someone/small"]
    assert set(there) == {path.name for path in ours.iterdir()} and b"ppl_tiny_64" in there["README.md"]
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name, content in there.items():
        (fetched / name).write_bytes(content)
    load_model(str(fetched), device="cpu")  # whole, by its manifest

    assert command.main([str(ours), str(tmp_path / "stock"), "--push", "someone/stock"]) == 0
    assert b"| exported " in hub["someone/stock"]["README.md"] and "config.json" in hub["someone/stock"]


def test_what_cannot_be_put_there_is_one_line(hub: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = save_checkpoint(sliced_model(dense_model("llama"))[0], tiny_tokenizer(), tmp_path / "ours", {})
    assert command.main([str(ours)]) == 2 and "name a destination, or --push" in capsys.readouterr().err
    assert command.main([str(ours), "--push", "forbidden/x"]) == 2
    error = capsys.readouterr().err
    assert "cannot put" in error and "forbidden/x" in error and error.count("\n") == 1
    assert command.main([str(ours), "--push", "no/such/name"]) == 2 and "no/such/name" in capsys.readouterr().err
    (ours / "model.safetensors").write_bytes(b"")
    assert command.main([str(ours), "--push", "someone/damaged"]) == 2 and "someone/damaged" not in hub
