"""Entry point of the main job: compose the configuration, check it, run it, and turn user errors into one line."""

import os
import shlex
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from modegpt.cli.messages import explain, is_defect
from modegpt.cli.schema import check_choices, config_directory, register, run_config
from modegpt.cli.sweep import Sweep, attempt
from modegpt.errors import UserError, any_terminal, shortened
from modegpt.termination import EXIT_CODE as TERMINATED
from modegpt.termination import GRACE_SECONDS, Terminated, heeding_sigterm

INTERRUPTED = 130


class Failed(BaseException):
    """Carries a lone job's error past Hydra, which would report an Exception on a line of its own."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (default: this process's own) and return the exit code.

    A user error is one line on standard error; ``MODEGPT_TRACEBACK=1`` shows where it came from.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing its own kind of traceback
    Sweep.current = None
    with heeding_sigterm():
        return _main(arguments)


def _main(arguments: list[str]) -> int:
    error: BaseException | None = None
    try:
        _run_hydra(arguments)
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except Failed as failed:
        error = failed.__cause__
    except (KeyboardInterrupt, Exception) as raised:
        error = raised
    finally:
        if Sweep.current is not None:
            Sweep.current.stop()
    lines = _alone(error) if Sweep.current is None else _swept(Sweep.current, error)
    print(*lines, sep="\n", end="\n" if lines else "", file=sys.stderr)
    if isinstance(error, KeyboardInterrupt):
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    return int(bool(lines))


def _alone(error: BaseException | None) -> list[str]:
    """What to say after a lone run."""
    if error is None:
        return []
    trace = traceback.format_exception(error) if _traceback_wanted() or is_defect(error) else []
    return [*trace, f"error: {explain(error)}"]


def _swept(sweep: Sweep, error: BaseException | None) -> list[str]:
    """What to say after a sweep. ``error`` is the launcher's or the user's: jobs note theirs."""
    failures, unfinished = sweep.failures(), sweep.unfinished()
    users = error is not None and not is_defect(error) and not isinstance(error, KeyboardInterrupt)
    if users or not (failures or unfinished):
        sweep.discard()
        return _alone(error)
    trace = traceback.format_exception(error) if error is not None and _traceback_wanted() else []
    cause = f" ({shortened(explain(error))})" if error is not None else ""
    rest = f", {unfinished} have no outcome (lost, still at work or never begun)" if unfinished else ""
    return [
        *trace,
        *(f"failed: {failure}" for failure in failures),
        f"error: {len(failures)} of {len(sweep.jobs)} jobs of the sweep failed{cause}{rest}; "
        f"tracebacks are in {sweep.directory}; the same command again runs those that have no record",
    ]


def _traceback_wanted() -> bool:
    return os.environ.get("MODEGPT_TRACEBACK") == "1"


def _run_hydra(arguments: list[str]) -> None:
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign, assignment]  # argparse's own prints a page of usage
    overrides = parser.parse_intermixed_args(arguments).overrides
    flags = [
        argument for argument in arguments if argument not in overrides
    ]  # Hydra itself wants all flags on one side
    register()
    check_choices(overrides)
    job = hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="config")(run_job)
    own_arguments = sys.argv
    sys.argv = [own_arguments[0], *flags, *overrides]
    try:
        job()
    finally:
        sys.argv = own_arguments


def _refuse(message: str) -> None:
    raise UserError(f"{message}; see modegpt --help")


def run_job(cfg: DictConfig) -> None:
    """Hydra's task: one run, alone or as a job of a sweep (then in any process)."""
    any_terminal()
    settings = HydraConfig.get()
    # as they were typed: what stands for a value may have none
    typed = OmegaConf.to_container(settings.overrides.task, resolve=False)
    assert isinstance(typed, list)
    overrides = [str(override) for override in typed]
    if settings.mode is RunMode.MULTIRUN:
        directory = Path(settings.runtime.output_dir)
        # bars of several processes would overwrite each other on one terminal, where the sweep's own bar is
        quiet = Sweep.current is None and sys.stderr.isatty()
        with heeding_sigterm(GRACE_SECONDS / 2) if Sweep.current is None else nullcontext():  # one that leads heeds it
            return attempt(
                lambda: _run(cfg, overrides, quiet=quiet),
                number=settings.job.num,
                overrides=overrides,
                directory=directory,
            )
    try:
        return _run(cfg, overrides)
    except Exception as error:
        raise Failed from error


def _run(cfg: DictConfig, overrides: list[str], quiet: bool = False) -> None:
    config = run_config(cfg)
    config.quiet |= quiet
    # here and not above: --help and a refused configuration should not wait for all of the main job
    if config.threads is not None:
        import torch

        torch.set_num_threads(config.threads)
    from modegpt.run import run

    run(config, command=shlex.join(["modegpt", *overrides]))
