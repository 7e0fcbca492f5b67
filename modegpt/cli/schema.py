"""The bridge from Hydra's configuration to the plain dataclasses of ``modegpt.config``."""

from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

import modegpt
from modegpt.config import RunConfig


def register() -> None:
    """Make ``RunConfig`` the schema that ``conf/config.yaml`` starts from, so that Hydra refuses wrong keys and types."""
    ConfigStore.instance().store(name="schema", node=RunConfig)


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
