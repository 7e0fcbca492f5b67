"""W&B as a mirror of a record that is already safely on disk: nothing that happens here can lose or fail a run."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from modegpt.errors import UserError
from modegpt.records.scores import all_scores

MODES = ("offline", "online", "disabled")
ONLINE_TIMEOUT_SECONDS = 30  # W&B's own default is 90: too long to wait for a network that is not there


class Tracker(Protocol):
    """Where a finished run is shown besides its record."""

    def mirror(self, record: Mapping[str, Any], *, record_path: Path, pictures: Sequence[Path] = ()) -> None:
        """Show the record in ``record_path`` with its pictures. Never raises for a failure of the service."""


class NoTracker:
    """Mirrors nothing."""

    def mirror(self, record: Mapping[str, Any], *, record_path: Path, pictures: Sequence[Path] = ()) -> None:
        """Does nothing."""


def warn(line: str) -> None:
    """The default place for a warning: one line on standard error."""
    print(f"warning: {line}", file=sys.stderr)


def make_tracker(
    *,
    mode: str = "offline",
    project: str = "modegpt",
    entity: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    warn: Callable[[str], None] = warn,
) -> Tracker:
    """The tracker for a configured mode; ``warn`` gets the one line that says what went wrong, should something.

    Raises:
        UserError: unknown mode.
    """
    if mode not in MODES:
        raise UserError(f"tracking.mode is {mode!r}; choose one of {', '.join(MODES)}")
    if mode == "disabled":
        return NoTracker()
    return WandbTracker(mode=mode, project=project, entity=entity, group=group, tags=tuple(tags), warn=warn)


@dataclass(frozen=True)
class WandbTracker:
    """A W&B run a record: configuration, summary metrics, tables, pictures, and an artifact of the record with both.

    ``group`` (default: the experiment's name) gathers a sweep. Offline runs lie in ``wandb/`` beside the record, with
    everything else W&B writes, until ``wandb sync``, run in the record's directory, sends them.
    """

    mode: str
    project: str
    entity: str | None
    group: str | None
    tags: tuple[str, ...]
    warn: Callable[[str], None]

    def mirror(self, record: Mapping[str, Any], *, record_path: Path, pictures: Sequence[Path] = ()) -> None:
        """See `Tracker.mirror`."""
        try:
            with _written_below(record_path.parent, keep_user_settings=self.mode == "online"):
                self._send(record, record_path, pictures)
        except Exception as error:  # whatever W&B, the network or the disk does: the record is safe, the run goes on
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            self.warn(f"not mirrored to W&B ({self.mode}): {reason}; the record is in {record_path}")

    def _send(self, record: Mapping[str, Any], record_path: Path, pictures: Sequence[Path]) -> None:
        import wandb  # only here: a second of import that a run without W&B need not pay

        if self.mode == "online" and not wandb.api.api_key:
            raise RuntimeError("no API key, run `wandb login` first")  # W&B would stop the run to ask for one
        short = record["identity"]["hash"][:8]
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group or record["experiment"],
            job_type=(record["compression"] or {}).get("method", "dense"),
            name=f"{record['name']}-{short}",
            tags=self.tags,
            config=record["config"],
            mode=cast(Literal["offline", "online"], self.mode),
            dir=record_path.parent,
            reinit="finish_previous",
            settings=wandb.Settings(
                silent=True,
                console="off",
                x_disable_stats=True,
                x_disable_meta=True,
                disable_git=True,
                save_code=False,
                init_timeout=ONLINE_TIMEOUT_SECONDS,
            ),
        )
        if self.mode == "offline":
            log_artifact = run.log_artifact  # which W&B calls too, for every table
            place = record_path.parent
            run.log_artifact = lambda artifact: log_artifact(_relative(artifact, place))  # type: ignore[method-assign]
        try:
            run.summary.update(headline(record))
            logged = {
                f"tables/{name}": wandb.Table(columns=[*columns], data=[*rows])
                for name, (columns, rows) in tables(record).items()
            }
            run.log(logged | {f"pictures/{picture.stem}": wandb.Image(str(picture)) for picture in pictures})
            artifact = wandb.Artifact(
                f"record-{short}", type="record", metadata={"identity": record["identity"]["hash"]}
            )
            for file in (record_path, *pictures):
                artifact.add_file(str(file))
            for name, table in logged.items():
                artifact.add(table, name)
            run.log_artifact(artifact)
        finally:
            run.finish()
            wandb.teardown()  # its service keeps the directories it was started with, the next run has others


def headline(record: Mapping[str, Any]) -> dict[str, float]:
    """The summary metrics: every score (``dense/...``: of the dense model), sparsities, cost."""
    compression, cost = record["compression"] or {}, record["cost"]
    scores = all_scores(record)
    values: dict[str, float | None] = {score.name: score.final for score in scores}
    values |= {f"dense/{score.name}": score.dense for score in scores}
    values |= {f"retention/{score.name}": score.retention for score in scores}
    values |= {key: compression.get(key) for key in ("target_sparsity", "achieved_sparsity", "whole_model_sparsity")}
    values |= {"seconds": sum(stage["seconds"] for stage in cost["stages"])}
    values |= {f"peak_memory_bytes/{device}": peak for device, peak in cost["peak_memory_bytes"].items()}
    return {key: value for key, value in values.items() if value is not None}


def tables(record: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Columns and rows of the tables that are logged: scores, and layers of a compressed model."""
    columns = [
        "name",
        "metric",
        "dense",
        "dense_stderr",
        "compressed",
        "compressed_stderr",
        "retention",
        "retention_stderr",
    ]
    scores = [[getattr(score, column) for column in columns] for score in all_scores(record)]
    logged = {"scores": (columns, scores)}
    if record["compression"] is not None:
        layers = record["compression"]["layers"]
        parts = {
            key: list(dict.fromkeys(name for layer in layers for name in layer[key]))
            for key in ("ranks", "relative_error")
        }
        columns = ["index", "sparsity", *(f"{key}_{name}" for key, names in parts.items() for name in names)]
        rows = [
            [
                layer["index"],
                layer["sparsity"],
                *(layer[key].get(name) for key, names in parts.items() for name in names),
            ]
            for layer in layers
        ]
        logged["layers"] = (columns, rows)
    return logged


def _relative(artifact: Any, directory: Path) -> Any:
    """``artifact``, whose staged files ``wandb sync`` finds from ``directory``, wherever that has moved meanwhile."""
    for entry in artifact.manifest.entries.values():
        if entry.local_path:  # None of what another artifact holds
            entry.local_path = os.path.relpath(entry.local_path, directory.resolve())
    return artifact


@contextmanager
def _written_below(directory: Path, *, keep_user_settings: bool) -> Iterator[None]:
    """Everything W&B writes for the time of the block goes below ``directory``, not into the user's home.

    ``keep_user_settings`` leaves the settings directory where it is: it says which server the user is logged in to.
    """
    names = ["WANDB_CACHE_DIR", "WANDB_DATA_DIR"] + ([] if keep_user_settings else ["WANDB_CONFIG_DIR"])
    before = {name: os.environ.get(name) for name in names}
    for name in names:
        place = directory.resolve() / "wandb" / name.split("_")[1].lower()
        place.mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(place)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
