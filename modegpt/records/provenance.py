"""Where a number comes from: code, packages, hardware, command; never a host, a user or an absolute path."""

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from modegpt.records.paths import portable

PACKAGES = [
    "modegpt",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "lm_eval",
    "accelerate",
    "peft",
    "numpy",
    "scipy",
    "hydra-core",
    "omegaconf",
    "wandb",
]


def provenance() -> dict[str, Any]:
    """The record's ``provenance`` node."""
    return {
        "git": git_state(),
        "packages": package_versions(),
        "python": platform.python_version(),
        "hardware": hardware(),
    }


def git_state(package: Path | None = None) -> dict[str, str | bool | None]:
    """Commit of the checkout that ``package`` (default: this one) is part of, and whether its code was changed since.

    Only the package, ``conf`` and the dependency pins count as code: new records in ``results`` leave the tree clean.
    Both are null outside a checkout: a wheel, or a virtual environment that merely lies in someone's repository.
    """
    package = package or Path(__file__).parent.parent
    if not _git(package, "ls-files", "__init__.py"):
        return {"commit": None, "dirty": None}
    code = [".", *(f":/{name}" for name in ("conf", "pyproject.toml", "constraints.txt"))]
    changed = _git(package, "status", "--porcelain", "--", *code)
    return {"commit": _git(package, "rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def package_versions() -> dict[str, str]:
    """Installed versions of what can change a number; packages that are absent are left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, torch threads, memory, GPUs. Names of parts, never of the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "num_cores": cores,
        "num_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "cuda": torch.version.cuda,
    }


def command_line(arguments: Sequence[str], program: str = "modegpt") -> str:
    """The run as a user would type it again, quoted for a shell, its absolute paths made portable.

    ``arguments`` are the overrides of this run (a launcher's workers do not have them in ``sys.argv``).
    """
    return f"{program} {shlex.join(portable(list(arguments)))}".strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _git(directory: Path, *arguments: str) -> str | None:
    """What git prints, or None without git or outside a repository. Takes no lock, so parallel runs cannot collide."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, env=environment, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
