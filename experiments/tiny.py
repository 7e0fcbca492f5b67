"""The tiny version of every experiment, unattended.

    python experiments/tiny.py [--root results] [--only NAME ...] [--full]

The embedded models, and the two real ones where the shared folder is (``MODEGPT_SHARED``, or ``shared`` beside the
checkout). Two processes at most, one thread each. Interrupt it and start it again: a run that has its record, in a
directory or in an archive, is skipped. ``modegpt-records pack`` then moves new records into the archives.

Every experiment but those of ``ELSEWHERE`` runs in it, but not on every model: ``PLAN``, which ends within 90 minutes
on two cores. ``--full`` adds what that leaves out, some four times as much.
"""

import argparse
import itertools
import math
import operator
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

EXPERIMENTS = Path(__file__).resolve().parent
CHECKOUT = EXPERIMENTS.parent
SHARED = Path(os.environ.get("MODEGPT_SHARED", CHECKOUT.parent / "shared"))
TINY = ("calibration=tiny", "evaluation=tiny")
LLAMA, OPT, QWEN, OLMOE = "tiny-llama", "tiny-opt", "tiny-qwen3", "tiny-olmoe"
BABY, STORIES = "babyllama-105", "stories260K"
EMBEDDED = {name: [f"model={name}"] for name in (LLAMA, OPT, QWEN, OLMOE)}
MODELS = EMBEDDED | {
    name: ["model=local", f"model.name={name}", f"model.path={SHARED}/models/{name}"]
    for name in (BABY, STORIES)
    if (SHARED / "models" / name).is_dir()
}
REAL_TEXT = ["calibration=jsonl", f"calibration.path={SHARED}/data/tinystories/calib_800.jsonl"]
REAL_TEST = ["evaluation=jsonl", f"evaluation.perplexity.path={SHARED}/data/tinystories/eval_200.jsonl"]
REAL_TASKS = ("evaluation.zeroshot.tasks=paper", f"evaluation.zeroshot.data_path={SHARED}/data/zeroshot")
SECONDS = {LLAMA: 1.0, OPT: 1.0, QWEN: 1.0, OLMOE: 1.0, STORIES: 2.0, BABY: 3.0}
"""What one run of a model costs, relative to the others: mostly its evaluation."""


@dataclass(frozen=True)
class On:
    """The models of an experiment: those of the tiny version, and what ``--full`` adds.

    ``settings`` are for all of them, ``embedded`` and ``real`` for one kind.
    """

    models: tuple[str, ...]
    full: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    embedded: tuple[str, ...] = ()
    real: tuple[str, ...] = ()
    scored: bool = True

    def overrides(self, name: str) -> list[str]:
        """What ``name`` is run with."""
        return [
            *self.settings,
            *overrides(name, scored=self.scored),
            *(self.embedded if name in EMBEDDED else self.real),
        ]


PLAN = {
    "methods": On((LLAMA, OPT), full=(STORIES, BABY)),
    "methods_seeds": On((LLAMA,), full=(OPT, STORIES, BABY)),
    **dict.fromkeys(("variants_mlp", "variants_value_output"), On((LLAMA,), full=(OPT, BABY))),
    "variants_query_key": On((LLAMA,), full=(BABY,)),
    "variants_query_key_opt": On((OPT,)),
    **dict.fromkeys(("allocation", "module_wise", "layer_sparsity"), On((LLAMA, OPT), full=(BABY,))),
    **dict.fromkeys(("engines", "engines_shared"), On((LLAMA, BABY), full=(STORIES,))),
    "engines_plus": On((LLAMA,), full=(BABY, STORIES)),
    "compression_cost": On((LLAMA, OPT), full=(BABY,), scored=False),
    **dict.fromkeys(("allocation_epsilon", "ridge"), On((LLAMA,), full=(OPT, STORIES, BABY))),
    **dict.fromkeys(("calibration_size", "seeds"), On((LLAMA, STORIES), full=(OPT, BABY))),
    **dict.fromkeys(("plus_uniform", "plus_samples", "plus_zeroshot"), On((LLAMA,), full=(OPT, STORIES, BABY))),
    "plus_cost": On((LLAMA,), full=(OPT, STORIES, BABY), scored=False),
    "throughput": On((LLAMA, OPT), full=(BABY, STORIES), scored=False),
    "plus_ablation": On((OPT,), full=(LLAMA, STORIES, BABY)),
    "zeroshot": On((LLAMA, OPT), full=(STORIES,), real=REAL_TASKS),
    "zeroshot_seeds": On((LLAMA,), full=(OPT, STORIES), real=REAL_TASKS),
    **dict.fromkeys(("head_norm", "head_norm_selection"), On((QWEN,), settings=("evaluation.perplexity.limit=null",))),
    **dict.fromkeys(("mixtures", "mixtures_uniform"), On((OLMOE,))),
    "recovery": On(
        (LLAMA,),
        full=(OPT, BABY),
        settings=("recovery.num_samples=256", "recovery.batch_size=4", "recovery.learning_rate=2e-3"),
    ),
    "opt_family": On((OPT,), full=(STORIES,), embedded=TINY),
    "llama2_70b": On((LLAMA,), full=(STORIES,), embedded=TINY, real=REAL_TASKS),
}
"""Where each experiment runs; a model is swept whole or not at all, because tables refuse a part of the seeds."""
ELSEWHERE = (
    "engines_real",
    *(path.stem for path in sorted(Path(__file__).parent.glob("real_models*.yaml"))),
)
"""Experiments on a model that has to be fetched first: their headers say how."""
OTHER_TEXTS = [
    [f"calibration={source}", f"calibration.path={SHARED}/data/{path}"]
    for source, path in (
        ("wikitext2", "wikitext2/wiki.train.part.raw"),
        ("alpaca", "alpaca/alpaca_5000.json"),
        ("jsonl", "tinystories/calib_800.jsonl"),
    )
    if (SHARED / "data" / path).is_file()
]
OTHER_DOMAIN = [text for text in OTHER_TEXTS if text[0] == "calibration=wikitext2"]
POLL_SECONDS = 5.0


@dataclass(frozen=True)
class Sweep:
    """One multirun command; ``model`` is its short name."""

    experiment: str
    model: str
    overrides: list[str]

    def command(self, root: Path, directory: Path) -> list[str]:
        """What to run: records under ``root``, what the sweep writes itself in ``directory``."""
        own = [
            f"output.root={root}",
            "output.pictures=false",
            "evaluation.perplexity.batch_tokens=1024",
            f"hydra.sweep.dir={directory}",
            "threads=1",
            "quiet=true",
        ]
        return [sys.executable, "-m", "modegpt", "--multirun", f"+experiments={self.experiment}", *self.overrides, *own]

    @property
    def num_jobs(self) -> int:
        """What Hydra's sweeper will make of it: the product of all choices."""
        params = OmegaConf.load(EXPERIMENTS / f"{self.experiment}.yaml").hydra.sweeper.params
        settings = dict(override.split("=", 1) for override in self.overrides)
        settings = {key: str(value) for key, value in params.items()} | settings
        parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in settings.items()])
        return math.prod(sum(1 for _ in each.sweep_iterator()) for each in parsed if each.is_sweep_override())

    @property
    def weight(self) -> float:
        """What one of its jobs costs, relative to those of other sweeps."""
        return SECONDS[self.model] * (
            5
            if self.experiment == "recovery"
            else 3
            if self.experiment.startswith(("methods", "plus", "engines_plus"))
            else 1
        )


def overrides(name: str, text: list[str] | None = None, *, scored: bool = True) -> list[str]:
    """A model with its texts; ``text`` calibrates it on another than its own.

    Without ``scored``, the experiment says how it is scored.
    """
    own, test = ([], []) if name in EMBEDDED else (REAL_TEXT, REAL_TEST)
    return [*MODELS[name], *(own if text is None else text), *(test if scored else [])]


def plan(only: list[str], full: bool = False) -> list[Sweep]:
    """Every sweep, the longest first, so that the two processes end together."""
    sweeps = [
        Sweep(experiment, name, on.overrides(name))
        for experiment, on in PLAN.items()
        for name in (*on.models, *(on.full if full else ()))
        if name in MODELS
    ]
    texts = [["calibration=tiny"], *OTHER_TEXTS]
    sweeps += [
        Sweep("calibration_choice", name, overrides(name, text))
        for name, text in itertools.product([name for name in MODELS if name != BABY] if full else (LLAMA,), texts)
    ]
    sweeps += [
        Sweep("plus_domain", name, overrides(name, text))
        for name, text in itertools.product(MODELS if full else (LLAMA,), OTHER_DOMAIN)
    ]
    chosen = [sweep for sweep in sweeps if not only or sweep.experiment in only]
    # layer_sparsity repeats runs of methods: last, when these are there; times are taken when less else runs
    return sorted(
        chosen,
        key=lambda sweep: (
            sweep.experiment in ("layer_sparsity", "compression_cost", "plus_cost", "throughput"),
            -sweep.num_jobs * sweep.weight,
        ),
    )


def main() -> int:
    """Run the plan; the exit code says whether every run of it has a record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("results"), help="where records go (default: results)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these experiments")
    parser.add_argument("--full", action="store_true", help="every experiment on more models: some five times the work")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        print(f"error: --jobs {arguments.jobs} is too small: at least 1", file=sys.stderr)
        return 2
    sweeps = plan(arguments.only, arguments.full)
    root = arguments.root
    logs = root / ".sweeps"
    directories = [logs / f"tiny-{sweep.experiment}-{number}" for number, sweep in enumerate(sweeps)]
    commands = [sweep.command(root, directory) for sweep, directory in zip(sweeps, directories, strict=True)]
    if arguments.list:
        print(*map(shlex.join, commands), sep="\n")
        return 0
    logs.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

    def launch(number: int) -> int:
        with directories[number].with_suffix(".log").open("w") as log:
            return subprocess.run(
                commands[number], cwd=CHECKOUT, env=environment, stdout=log, stderr=subprocess.STDOUT
            ).returncode

    shown = -1
    totals, weights, started = (
        [sweep.num_jobs for sweep in sweeps],
        [sweep.weight for sweep in sweeps],
        time.monotonic(),
    )
    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = [pool.submit(launch, number) for number in range(len(sweeps))]
        while not all(future.done() for future in running):
            time.sleep(POLL_SECONDS)
            finished = [
                total if future.done() else _outcomes(directory)
                for total, future, directory in zip(totals, running, directories, strict=True)
            ]
            if sum(finished) == shown and not sys.stdout.isatty():
                continue
            shown = sum(finished)
            share = sum(map(operator.mul, finished, weights)) / sum(map(operator.mul, totals, weights))
            _show(
                shown,
                sum(totals),
                share,
                time.monotonic() - started,
                [s.experiment for s, f in zip(sweeps, running, strict=True) if f.running()],
            )
    failed = [number for number, future in enumerate(running) if future.result() != 0]
    for number in failed:
        print(f"failed: {sweeps[number].experiment}: {directories[number].with_suffix('.log')}", file=sys.stderr)
    return int(bool(failed))


def _outcomes(directory: Path) -> int:
    return sum(1 for _ in directory.glob("*/outcome.json"))


def _show(done: int, total: int, share: float, seconds: float, names: list[str]) -> None:
    left = f"{seconds * (1 - share) / share / 60:.0f} min left" if done else "estimating"
    end = "\r" if sys.stdout.isatty() else "\n"
    print(f"{done}/{total} runs, {seconds / 60:.0f} min, {left}: {', '.join(names)}".ljust(100), end=end, flush=True)


if __name__ == "__main__":
    sys.exit(main())
