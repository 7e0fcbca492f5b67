"""What ``pyproject.toml`` cannot say: ``conf/`` is top-level in the checkout and ``modegpt/conf`` in the wheel."""

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

DATA = ["*.csv", "*.json", "*.jsonl", "*.md", "*.safetensors", "*.txt", "*.yaml", "py.typed"]


class BuildModules(build_py):
    """Leaves the runner of the experiments out: ``conf/`` ships values, not code."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """As setuptools finds them, none under ``modegpt.conf``."""
        return [] if package.startswith("modegpt.conf") else super().find_package_modules(package, package_dir)


setup(
    # namespace packages, so that folders of data count too and carry their files
    packages=[
        *find_namespace_packages(include=["modegpt", "modegpt.*"], exclude=["*.__pycache__"]),
        *("modegpt." + package for package in find_namespace_packages(include=["conf", "conf.*"])),
    ],
    package_dir={"modegpt.conf": "conf"},
    package_data={"": DATA},
    cmdclass={"build_py": BuildModules},
)
