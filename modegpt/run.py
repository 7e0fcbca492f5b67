"""The main job: load, score the dense model, calibrate and compress, recover, score again, record."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modegpt.backend import Scores
from modegpt.cache import cache_directory
from modegpt.config import RunConfig
from modegpt.cost.machine import measure_again, measure_ceiling
from modegpt.cost.metering import peak_memory_bytes
from modegpt.cost.work import metered_forwards
from modegpt.evaluation.dense_cache import dense_scores
from modegpt.evaluation.throughput import beside_dense
from modegpt.methods.base import Compressed
from modegpt.prepare import Run, prepare
from modegpt.records.recording import make_record, show
from modegpt.records.summary import summary


def run(config: RunConfig, *, command: str) -> Path:
    """Do the main job and return the path of its record, which is the finished one if there is one already."""
    prepared = prepare(config, command=command)
    store, world, output = prepared.store, prepared.world, config.output
    done = world.told(store.existing(experiment=output.experiment, name=prepared.name, decides=prepared.decides))
    if done is not None and not output.overwrite:
        path = store.place(done)
        prepared.progress.say(f"this run is finished already: {path} (output.overwrite=true computes it again)")
        world.leave()
        if world.leads:
            print(summary(done, record_path=path))
        return path
    try:
        return execute(prepared)
    except (Exception, KeyboardInterrupt) as error:
        store.write_error(
            experiment=output.experiment,
            name=prepared.name,
            decides=prepared.decides,
            stage=prepared.stage,
            message=str(error) or type(error).__name__,
            command=command,
        )
        raise


def execute(run: Run) -> Path:
    """Score, compress, recover, score again, record and show; returns the record's path."""
    config, meter, backend = run.config, run.meter, run.backend
    if not run.world.leads:
        compress(run)
        return run.directory / "record.json"
    with meter.stage("machine ceiling"):
        meter.ceiling = ceiling = measure_ceiling(run.device, backend.model.dtype)
    dense, compressed, scores, speeds = score_dense(run), None, None, None
    if run.method is not None:
        compressed = compress(run)
        scores = score_compressed(run, compressed)
    if run.recovery is not None:
        compressed, scores = recover(run, compressed, scores)
    if config.evaluation.throughput.workloads:
        run.stage = "throughput"
        with meter.stage(run.stage):
            smaller = None if compressed is None else compressed.model
            speeds = beside_dense(backend.model, smaller, config.evaluation.throughput, say=run.progress.say)
    peaks = peak_memory_bytes()  # without what the second measurement needs
    with meter.stage("machine ceiling"):
        meter.ceiling = measure_again(ceiling, run.device, backend.model.dtype)
    run.stage = "record"
    record = make_record(
        config,
        command=run.command,
        name=run.name,
        decides=run.decides,
        model=backend.model,
        tokens=None if run.task is None else run.task.calibration.tokens,
        compressed=compressed,
        dense_scores=dense,
        compressed_scores=scores,
        speeds=speeds,
        cost=meter.summary() | {"peak_memory_bytes": peaks},
    )
    if compressed is not None and run.target.directory is not None:
        with meter.stage("saving"):
            backend.save(compressed, run.target, record)
        run.progress.say(f"checkpoint: {run.target.directory}")
    path = run.store.write(record, overwrite=config.output.overwrite)
    show(path, pictures=config.output.pictures, tracking=config.tracking)
    return path


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
            lambda: run.backend.score(run.evaluation, progress=run.progress),
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


def score_compressed(run: Run, compressed: Compressed) -> Scores:
    """The compressed model's scores."""
    with scoring(run, "compressed evaluation", compressed.model):
        return run.backend.score_compressed(compressed, run.evaluation, label="compressed", progress=run.progress)


def recover(run: Run, compressed: Compressed | None, before: Scores | None) -> tuple[Compressed, Scores]:
    """Train what was compressed and score it again."""
    assert run.recovery is not None and compressed is not None and before is not None

    def score(model: PreTrainedModel) -> Scores:
        recovered = replace(compressed, model=model)
        with scoring(run, "recovered evaluation", model):
            return run.backend.score_compressed(recovered, run.evaluation, label="recovered", progress=run.progress)

    run.stage = "recovery"
    model, scores, report = run.recovery.apply(
        compressed.model, before, score=score, meter=run.meter, progress=run.progress
    )
    return replace(compressed, model=model, recovery=report), scores
