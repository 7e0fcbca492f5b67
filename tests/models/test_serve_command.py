"""``transformers serve`` answers from an exported checkpoint, batching continuously, as the compressed model does."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers.utils.import_utils import is_serve_available

from modegpt.cli.export import export
from modegpt.models.checkpoints import load_model, load_tokenizer, save_checkpoint
from tests.models.family_table import sliced_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not is_serve_available(), reason="the server's packages are not here: pip install 'transformers[serving]'"
    ),
]


def test_the_server_gives_the_same_text(tmp_path: Path) -> None:
    model, tokenizer = (
        sliced_model(load_model("embedded:tiny-llama", device="cpu"))[0],
        load_tokenizer("embedded:tiny-llama"),
    )
    save_checkpoint(model, tokenizer, tmp_path / "ours", {})
    export(str(tmp_path / "ours"), tmp_path / "stock", width_multiple=1)
    ids = tokenizer("The cat", return_tensors="pt").input_ids
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = [
        "--device",
        "cpu",
        "--continuous-batching",
        "--cb-num-blocks",
        "32",
        "--cb-block-size",
        "16",
        "--cb-max-batch-tokens",
        "64",
        "--port",
        str(port),
    ]
    command = [
        sys.executable,
        "-c",
        "from transformers.cli.transformers import main; main()",
        "serve",
        str(tmp_path / "stock"),
        *options,
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path) as server,
    ):
        try:
            body = {"model": str(tmp_path / "stock"), "prompt": "The cat", "max_tokens": 8, "temperature": 0}
            answer = _ask(f"http://localhost:{port}/v1/completions", body, server, deadline=time.monotonic() + 240)
        finally:
            server.terminate()
    assert answer["choices"][0]["text"] == tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)


def _ask(url: str, body: dict, server: subprocess.Popen, *, deadline: float) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=100) as reply:
                return json.load(reply)
        except urllib.error.URLError:
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(1)
