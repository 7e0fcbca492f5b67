"""What ``pyproject.toml`` cannot say: ``conf/`` is top-level in the checkout and ``modegpt/conf`` in the wheel."""

from setuptools import find_namespace_packages, setup

DATA = ["*.csv", "*.json", "*.jsonl", "*.md", "*.safetensors", "*.txt", "*.yaml", "py.typed"]

setup(
    # namespace packages, so that folders of data count too and carry their files
    packages=[
        *find_namespace_packages(include=["modegpt", "modegpt.*"], exclude=["*.__pycache__"]),
        *("modegpt." + package for package in find_namespace_packages(include=["conf", "conf.*"])),
    ],
    package_dir={"modegpt.conf": "conf"},
    package_data={"": DATA},
)
