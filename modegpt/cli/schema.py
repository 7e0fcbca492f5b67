"""The bridge from Hydra's configuration to the plain dataclasses of ``modegpt.config``."""

from collections.abc import Mapping
from pathlib import Path

from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

import modegpt
from modegpt.config import RunConfig, defaults

INGREDIENTS = "experiments/ingredients"
"""The file of combinations of modegpt_plus's switches in ``conf/``, and the group whose options they are."""


def register() -> None:
    """Tell Hydra what no YAML file of ``conf/`` says.

    ``RunConfig`` is the schema that ``conf/config.yaml`` starts from, so Hydra refuses wrong keys and types. Files that
    name a choice are completed from its class. Each combination of ``experiments/ingredients.yaml`` is an option of its
    own.
    """
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)
    for name, combination in ingredients().items():
        store.store(group=INGREDIENTS, name=name, node=combination["switches"], package="method")
    Plugins.instance()  # which registers Hydra's own sources, once
    SourcesRegistry.instance().types["file"] = FileConfigSource


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's reader of YAML files. To a file that names a choice it adds the options of the class behind the name.

    So the file need not repeat them, and yet ``--cfg job`` shows them and the command line can set them. It has the
    name of Hydra's own reader: by the name Hydra tells, in the workers of a launcher, that files have a reader already.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        """The file's content over the defaults of what it names."""
        result = super().load_config(config_path)
        choices = _choices(config_path.rpartition("/")[0])
        if choices and isinstance(result.config, DictConfig) and (name := result.config.get("name")) in choices:
            completed = OmegaConf.create({"name": name, **defaults(choices[str(name)])})
            result.config = OmegaConf.merge(completed, result.config)
        return result


def _choices(group: str) -> Mapping[str, type]:
    """The classes that the options of a group name; none where a group is no choice of a class."""
    match group.split("/"):  # imported here: the classes bring PyTorch with them
        case ["method"]:
            from modegpt.methods.registry import METHODS

            return METHODS
        case ["decomposition", module]:
            from modegpt.decompositions import VARIANTS

            return VARIANTS[module]
        case ["allocation"]:
            from modegpt.allocation.policies import POLICIES

            return POLICIES
        case ["recovery"]:
            from modegpt.recovery.job import RECOVERIES

            return RECOVERIES
    return {}


def ingredients() -> dict[str, dict]:
    """Combinations of modegpt_plus's switches by name: a ``title``, and the ``switches`` that are set."""
    combined = OmegaConf.to_container(OmegaConf.load(config_directory() / f"{INGREDIENTS}.yaml"))
    assert isinstance(combined, dict)
    return {str(name): combination for name, combination in combined.items()}


def config_directory() -> Path:
    """``conf/``: inside the installed package, or beside it in a checkout."""
    package = Path(modegpt.__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def config_groups() -> list[str]:
    """Our configuration groups, as they are written on the command line."""
    root = config_directory()
    groups = {path.parent.relative_to(root).as_posix() for path in root.rglob("*.yaml")}
    return sorted(group for group in groups if group != "." and not group.startswith("hydra"))


def run_config(cfg: DictConfig) -> RunConfig:
    """The checked configuration of one run.

    Raises:
        omegaconf.errors.OmegaConfBaseException: a key that was forced in with ``++``, an unresolvable interpolation.
        UserError: a value out of range.
    """
    schema = OmegaConf.structured(RunConfig)
    config = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.to_container(cfg, resolve=True)))
    assert isinstance(config, RunConfig)
    return config
