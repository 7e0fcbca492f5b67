"""The main job: load, score the dense model, calibrate and compress, recover, score again, record."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from modegpt.backend import Scores
from modegpt.cache import cache_directory
from modegpt.config import RunConfig
from modegpt.cost.machine import measure_again, measure_ceiling
from modegpt.cost.metering import peak_memory_bytes
from modegpt.cost.work import metered_forwards
from modegpt.errors import UserError
from modegpt.evaluation.dense_cache import begun_scores, dense_key, dense_scores
from modegpt.evaluation.throughput import beside_dense
from modegpt.files import canonical_json
from modegpt.methods.base import Compressed
from modegpt.methods.targets import reached
from modegpt.models.checkpoints import saved_by
from modegpt.models.integrity import fingerprint_sample
from modegpt.prepare import Run, prepare
from modegpt.records.pictures import save_pictures
from modegpt.records.recording import compression_facts, make_record
from modegpt.records.schema import Record
from modegpt.records.store import RECORD, load_record
from modegpt.records.summary import summary
from modegpt.records.tracking import make_tracker
from modegpt.space import space_warnings
from modegpt.termination import last_words


def run(config: RunConfig, *, command: str) -> Path:
    """Do the main job and return the path of its record, which is the finished one if there is one already.

    What cannot be written beside the record never costs it: the error comes after the record. Raises UserError.
    """
    prepared = prepare(config, command=command)
    store, world, output = prepared.store, prepared.world, config.output
    done = world.told(store.existing(experiment=output.experiment, name=prepared.name, decides=prepared.decides))
    if done is not None and not output.overwrite:
        return finished(prepared, done)
    with last_words(partial(note, prepared)):
        record = execute(prepared)
        path = None if record is None else write(prepared, record)
    if path is not None:
        show(prepared, path)
    return prepared.directory / RECORD


def finished(run: Run, done: Record) -> Path:
    """Say that a run is finished, and save its checkpoint if that is wanted and was not: compressed again, not scored.

    Pictures that are wanted and missing are drawn: a run may be killed between its record and them.

    Raises UserError where compressing again gives another model.
    """
    path, target = run.store.place(done), run.target.directory
    if target is None or saved_by(target) == done["identity"]["hash"]:
        run.progress.say(f"this run is finished already: {path} (output.overwrite=true computes it again)")
        run.world.leave()
    else:
        run.progress.say(f"this run is finished already: {path}; compressing again for the checkpoint")
        compressed = compress(run)
        if run.recovery is not None and run.world.leads:
            compressed, _ = recover(run, compressed, {}, score=lambda _: {})
        if run.world.leads:
            check_same(run, compressed, done)
            run.backend.save(compressed, run.target, done)
            run.backend.finish(compressed, run.target, done)
            run.progress.say(f"checkpoint: {target}")
    if run.world.leads:
        if run.config.output.pictures and path.is_file():  # no record of an archive
            try:
                save_pictures(done, path.parent, replace=False)
            except UserError as error:
                run.progress.say(f"warning: {error}")
        print(summary(done, record_path=path))
    return path


def check_same(run: Run, compressed: Compressed, done: Record) -> None:
    """Raise UserError unless ``compressed`` has the ranks that its record has."""
    again = compression_facts(
        run.backend.model,
        compressed,
        method=run.config.method["name"],
        target_sparsity=run.config.compression.sparsity,
    )

    def chosen(facts: Record) -> str:
        return canonical_json([facts["num_parameters"], [layer["ranks"] for layer in facts["layers"]]])

    if chosen(again) != chosen(done["compression"]):
        raise UserError(
            f"compressing again chose other ranks than those of {run.store.place(done)}, so no checkpoint was saved; "
            "output.overwrite=true makes record and checkpoint anew"
        )


def execute(run: Run) -> Record | None:
    """Score, compress, save, recover and score again; returns what to record, None in a process that does not lead."""
    config, meter, backend = run.config, run.meter, run.backend
    if not run.world.leads:
        compress(run)
        return None
    for warning in space_warnings(run):
        run.progress.say(f"warning: {warning}")
    with meter.stage("machine ceiling"):
        meter.ceiling = ceiling = measure_ceiling(run.device, backend.model.dtype)
    dense, compressed, scores, speeds = score_dense(run), None, None, None

    def saved_and_scored(made: Compressed) -> Scores:
        save(run, made, content(run, dense=dense, compressed=made))
        return score_compressed(run, made, label="compressed" if run.recovery is None else "recovered")

    if run.method is not None:
        compressed = compress(run)
        if run.aim:
            with meter.stage("target"):
                target = reached(run.aim, config.compression, backend.model, compressed.model)
            compressed = replace(compressed, target=target)
        if run.recovery is None:
            scores = saved_and_scored(compressed)
        else:
            before = score_compressed(run, compressed, label="compressed")
            compressed, scores = recover(run, compressed, before, score=saved_and_scored)
    if config.evaluation.throughput.workloads:
        run.stage = "throughput"
        with meter.stage(run.stage):
            smaller = None if compressed is None else compressed.model
            speeds = beside_dense(backend.model, smaller, config.evaluation.throughput, say=run.progress.say)
    peaks = peak_memory_bytes()  # without what the second measurement needs
    with meter.stage("machine ceiling"):
        meter.ceiling = measure_again(ceiling, run.device, backend.model.dtype)
    record = content(run, dense=dense, compressed=compressed, scores=scores, speeds=speeds, peaks=peaks)
    if compressed is not None and run.target.directory is not None and not run.unsaved:
        with kept_for_later(run):
            backend.finish(compressed, run.target, record)
            run.progress.say(f"checkpoint: {run.target.directory}")
    return record


def content(
    run: Run,
    *,
    dense: Scores,
    compressed: Compressed | None,
    scores: Scores | None = None,
    speeds: dict[str, Any] | None = None,
    peaks: dict[str, int] | None = None,
) -> Record:
    """The record of what is known so far."""
    return make_record(
        run.config,
        command=run.command,
        name=run.name,
        decides=run.decides,
        model=run.backend.model,
        tokens=None if run.task is None else run.task.calibration.tokens,
        compressed=compressed,
        dense_scores=dense,
        compressed_scores=scores,
        speeds=speeds,
        cost=run.meter.summary() | {"peak_memory_bytes": peaks or peak_memory_bytes()},
        commits=run.commits,
    )


@contextmanager
def kept_for_later(run: Run) -> Iterator[None]:
    """An error in the block is said and kept in ``run.unsaved``, so that it does not cost the record."""
    try:
        yield
    except Exception as error:
        run.progress.say(f"warning: {error}")
        run.unsaved.append(error)


def save(run: Run, compressed: Compressed, record: Record) -> None:
    """Save the checkpoint, if that is wanted, with a card of what is known."""
    if run.target.directory is not None:
        run.stage = "saving"
        with kept_for_later(run), run.meter.stage(run.stage):
            run.backend.save(compressed, run.target, record)


def write(run: Run, record: Record) -> Path:
    """Put the record on disk. Where that fails, its metrics are printed before the UserError is raised."""
    run.stage = "record"
    try:
        path = run.store.write(record, overwrite=run.config.output.overwrite)
    except UserError as error:
        print(summary(record))
        raise UserError(f"{error}; the metrics of this run are those printed, no file has them") from error
    for begun in run.begun:
        begun.forget()
    return path


def note(run: Run, error: BaseException) -> None:
    """Leave a note of the failed run where its record would be, if there is no record and the disk takes it."""
    if not (run.directory / RECORD).exists():
        with suppress(UserError):
            run.store.write_error(
                experiment=run.config.output.experiment,
                name=run.name,
                decides=run.decides,
                stage=run.stage,
                message=str(error) or type(error).__name__,
                command=run.command,
            )


def show(run: Run, path: Path) -> None:
    """Draw the record in ``path``, mirror it to the tracker, print its summary, and raise what was kept for later."""
    record = load_record(path)
    drawn: list[Path] = []
    if run.config.output.pictures:
        with kept_for_later(run):
            drawn = save_pictures(record, path.parent)
    make_tracker(**asdict(run.config.tracking)).mirror(record, record_path=path, pictures=drawn)
    print(summary(record, record_path=path, pictures=drawn))
    for error in run.unsaved:
        if not isinstance(error, UserError):
            raise error
    if run.unsaved:
        raise UserError(f"{'; '.join(map(str, run.unsaved))}; the record is whole: {path}")


@contextmanager
def scoring(run: Run, stage: str, model: PreTrainedModel) -> Iterator[None]:
    """Meter the scoring of ``model`` in the block as a stage of its own; not where there is nothing to score."""
    if run.evaluation.is_empty:
        yield
        return
    run.stage = stage
    with run.meter.stage(stage) as metered, metered_forwards(model, metered.add):
        yield


def score_dense(run: Run) -> Scores:
    """The dense model's scores, computed once for each (model, evaluation)."""
    model, cache = run.backend.model, run.config.cache
    with scoring(run, "dense evaluation", model):
        return dense_scores(
            run.evaluation,
            lambda begun: run.backend.score(run.evaluation, progress=run.progress, begun=begun),
            weights_sha256=run.decides["model"]["weights_sha256"],
            tokenizer_sha256=run.decides["model"]["tokenizer_sha256"],
            dtype=str(model.dtype),
            device=torch.device(run.device).type,
            directory=cache_directory(cache.dir),
            max_bytes=cache.max_bytes,
            progress=run.progress,
        )


def compress(run: Run) -> Compressed:
    """Calibrate and compress, layer by layer."""
    assert run.method is not None and run.task is not None
    run.stage = "compression"
    with run.meter.stage(run.stage):
        return run.backend.compress(run.method, run.task, run.target)


def score_compressed(run: Run, compressed: Compressed, *, label: str) -> Scores:
    """The scores of the compressed or recovered model, said under ``label``."""
    cache = run.config.cache
    key = dense_key(
        run.evaluation,
        weights_sha256=fingerprint_sample(compressed.model),
        tokenizer_sha256=run.decides["model"]["tokenizer_sha256"],
        dtype=str(compressed.model.dtype),
        device=torch.device(run.device).type,
    )
    begun = begun_scores(
        run.evaluation,
        key | {"run": run.target.run, "label": label},
        directory=cache_directory(cache.dir),
        max_bytes=cache.max_bytes,
    )
    run.begun.append(begun)
    with scoring(run, f"{label} evaluation", compressed.model):
        return run.backend.score_compressed(compressed, run.evaluation, label=label, progress=run.progress, begun=begun)


def recover(
    run: Run, compressed: Compressed, before: Scores, *, score: Callable[[Compressed], Scores]
) -> tuple[Compressed, Scores]:
    """Train what was compressed, whose scores are ``before``, and ``score`` it."""
    assert run.recovery is not None
    run.stage = "recovery"
    model, scores, report = run.recovery.apply(
        compressed.model,
        before,
        score=lambda model: score(replace(compressed, model=model)),
        meter=run.meter,
        progress=run.progress,
    )
    return replace(compressed, model=model, recovery=report), scores
