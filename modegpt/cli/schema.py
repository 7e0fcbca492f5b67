"""The bridge from Hydra's configuration to the plain dataclasses of ``modegpt.config``."""

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

import modegpt
from modegpt.cache import Cache, cache_directory
from modegpt.config import CacheConfig, RunConfig, defaults, unknown
from modegpt.files import json_sha256

INGREDIENTS = "experiments/ingredients"
"""The file of combinations of modegpt_plus's switches in ``conf/``, and the group whose options they are."""


@functools.cache
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

    read: ClassVar[dict[tuple[str, str], ConfigResult]] = {}
    """What was read: Hydra composes a run's configuration twice, a sweep's once more for each job."""

    def load_config(self, config_path: str) -> ConfigResult:
        """The file's content over the defaults of what it names."""
        if (key := (self.path, config_path)) not in self.read:
            self.read[key] = self._load(config_path)
        return copy.deepcopy(self.read[key])

    def _load(self, config_path: str) -> ConfigResult:
        result = super().load_config(config_path)
        known = options().get(config_path.rpartition("/")[0], {})
        if known and isinstance(result.config, DictConfig) and (name := result.config.get("name")) in known:
            completed = OmegaConf.create({"name": name, **known[str(name)]})
            result.config = OmegaConf.merge(completed, result.config)
        return result


@functools.cache
def options() -> dict[str, dict[str, dict[str, Any]]]:
    """Of each group whose choices are classes: these by name, with their options at their defaults.

    The classes bring PyTorch and Transformers with them, which take seconds; so they are asked once, and again when a
    source file of this package has changed.
    """
    package = Path(modegpt.__file__).resolve().parent
    sources = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")}
    cache = Cache(cache_directory(), json_sha256({"options": sources}), CacheConfig().max_bytes)
    found = cache.load_json("options")
    if found is None:
        found = {group: {name: defaults(cls) for name, cls in classes.items()} for group, classes in _classes().items()}
        cache.store_json("options", found)
    return found


def _classes() -> dict[str, Mapping[str, type]]:
    from modegpt.allocation.policies import POLICIES
    from modegpt.decompositions import VARIANTS
    from modegpt.methods.registry import METHODS
    from modegpt.recovery.job import RECOVERIES

    decompositions = {f"decomposition/{module}": choices for module, choices in VARIANTS.items()}
    return {"method": METHODS, "allocation": POLICIES, "recovery": RECOVERIES, **decompositions}


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


def check_choices(overrides: Sequence[str]) -> None:
    """Refuse what is no name where an option of a group is chosen: Hydra itself stumbles over a number or a list.

    Raises:
        hydra.errors.OverrideParseException: no override.
        UserError: what is chosen is no name; the options are named.
    """
    groups = config_groups()
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        group = override.key_or_group
        if group not in groups or override.is_sweep_override():
            continue
        value = override.value()
        if not isinstance(value, str | dict) and not (value is None and override.is_delete()):
            raise unknown(group, value, [path.stem for path in (config_directory() / group).glob("*.yaml")])


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
