"""One line for every error a user can fix."""

import re

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from modegpt.cli.schema import config_groups
from modegpt.config import unknown, unknown_key
from modegpt.errors import UserError
from modegpt.escaping import printable


def is_defect(error: BaseException) -> bool:
    """Whether ``error`` is this program's fault: no bad input, nor the file system, too little memory or a Ctrl-C."""
    users = (UserError, HydraException, OmegaConfBaseException, OSError, MemoryError, KeyboardInterrupt)
    return not isinstance(error, users) and not _out_of_memory(error)


def _out_of_memory(error: BaseException) -> bool:
    # by name: a composition may fail before torch is imported
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def explain(error: BaseException) -> str:
    """What was wrong, and what would be right, in one line."""
    match error:
        case KeyboardInterrupt():
            return str(error) or "interrupted"
        case MissingConfigException():
            return _missing_option(error)
        case OverrideParseException():
            return _one_line(f"cannot read the override {error.override}: {str(error).splitlines()[0]}")
        case ConfigCompositionException() | OmegaConfBaseException():
            cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
            return _one_line(_composition(error, cause))
        case _ if _out_of_memory(error):
            return _one_line(
                "out of memory: lower calibration.batch_size, evaluation batch sizes or model.dtype "
                f"({_first_line(error)})"
            )
        case UserError() | HydraException() | OSError():
            return _one_line(str(error))
        case _:
            return _one_line(f"unexpected {type(error).__name__}: {error}")


def _composition(error: Exception, cause: BaseException | None) -> str:
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key is not None:
        return _unknown_key(cause)
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {_first_line(cause)}" if cause.full_key else _first_line(cause)
    if ambiguous := re.match(r"Ambiguous value for argument '(.*)'", str(error)):
        return f"{ambiguous[1]} gives several values: add --multirun to sweep over them, or write a list as key=[a,b]"
    return str(error)


def _unknown_key(cause: OmegaConfBaseException) -> str:
    key = cause.full_key or ""
    if "/" in key:
        return str(unknown_key(key, config_groups()))
    keys = cause.parent_node.keys() if OmegaConf.is_dict(cause.parent_node) else ()
    return str(unknown_key(key, map(str, keys)))


def _missing_option(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if not group or not error.options:
        return _one_line(str(error))
    hint = "; cluster needs: pip install 'modegpt[sweep]'" if group == "hydra/launcher" else ""
    return str(unknown(group, name, error.options)) + hint


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
