"""The part of the packaging that ``pyproject.toml`` cannot say: ``conf/`` is top-level in the checkout, ``modegpt/conf`` in the wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["modegpt", "modegpt.*"]), "modegpt.conf"],
    package_dir={"modegpt.conf": "conf"},
    package_data={
        "modegpt.conf": ["**/*.yaml"],
        "modegpt.tiny": ["**/*.json", "**/*.jsonl", "**/*.safetensors", "**/*.txt", "**/*.yaml"],
    },
)
