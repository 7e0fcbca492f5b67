"""The tiny version of every experiment, unattended: ``python experiments/tiny.py [--root results] [--only NAME ...]``.

The two embedded models, and the two real ones where the shared folder is (``MODEGPT_SHARED``, or ``shared`` beside the
checkout). Two processes at most, one thread each. Interrupt it and start it again: finished runs are skipped.
"""

import argparse
import itertools
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

EXPERIMENTS = Path(__file__).resolve().parent
CHECKOUT = EXPERIMENTS.parent
SHARED = Path(os.environ.get("MODEGPT_SHARED", CHECKOUT.parent / "shared"))
TINY = ["calibration=tiny", "evaluation=tiny"]
EMBEDDED = {name: [f"model={name}"] for name in ("tiny-llama", "tiny-opt")}
REAL_TEXT = [
    "calibration=jsonl",
    f"calibration.path={SHARED}/data/tinystories/calib_800.jsonl",
    "evaluation=jsonl",
    f"evaluation.perplexity.path={SHARED}/data/tinystories/eval_200.jsonl",
]
REAL = {
    name: ["model=local", f"model.name={name}", f"model.path={SHARED}/models/{name}", *REAL_TEXT]
    for name in ("babyllama-105", "stories260K")
    if (SHARED / "models" / name).is_dir()
}
OTHER_TEXTS = [
    ["calibration=jsonl", "calibration.path=modegpt/tiny/data/test.jsonl"],  # the test text itself: a bound, not a result
    *(
        [f"calibration={source}", f"calibration.path={SHARED}/data/{path}"]
        for source, path in (("wikitext2", "wikitext2/wiki.train.part.raw"), ("alpaca", "alpaca/alpaca_5000.json"), ("jsonl", "tinystories/calib_800.jsonl"))
        if (SHARED / "data" / path).is_file()
    ),
]
POLL_SECONDS = 5.0


@dataclass(frozen=True)
class Sweep:
    """One multirun command."""

    experiment: str
    overrides: list[str]

    def command(self, root: Path, directory: Path) -> list[str]:
        own = [f"output.root={root}", f"hydra.sweep.dir={directory}", "threads=1", "quiet=true"]
        return [sys.executable, "-m", "modegpt", "--multirun", f"+experiments={self.experiment}", *self.overrides, *own]

    @property
    def num_jobs(self) -> int:
        """What Hydra's sweeper will make of it: the product of all choices."""
        params = OmegaConf.load(EXPERIMENTS / f"{self.experiment}.yaml").hydra.sweeper.params
        settings = dict(override.split("=", 1) for override in self.overrides)
        settings = {key: str(value) for key, value in params.items()} | settings
        parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in settings.items()])
        return prod(sum(1 for _ in each.sweep_iterator()) for each in parsed if each.is_sweep_override())


def plan(only: list[str]) -> list[Sweep]:
    """Every sweep, the longest first, so that the two processes end together."""
    models = EMBEDDED | REAL
    some = {name: overrides for name, overrides in models.items() if name != "stories260K"}
    where = {
        **dict.fromkeys(("methods", "methods_seeds"), models),
        **dict.fromkeys(("variants_mlp", "variants_value_output", "layer_sparsity", "seeds", "module_wise", "allocation"), some),
        **dict.fromkeys(("allocation_epsilon", "calibration_size", "ridge", "compression_cost"), some),
        "variants_query_key": [name for name in some if name != "tiny-opt"],
        "variants_query_key_opt": ["tiny-opt"],
        "opt_family": ["tiny-opt"],
        "llama2_70b": ["tiny-llama"],
        "zeroshot": EMBEDDED,
    }
    sweeps = [Sweep(name, [*(TINY if name in ("opt_family", "llama2_70b") else []), *models[model]]) for name, of in where.items() for model in of]
    texts = [["calibration=tiny"], *OTHER_TEXTS]
    sweeps += [Sweep("calibration_choice", [*EMBEDDED[model], *text]) for model, text in itertools.product(EMBEDDED, texts)]
    chosen = [sweep for sweep in sweeps if not only or sweep.experiment in only]
    # layer_sparsity repeats runs of methods: last, when these are there
    return sorted(chosen, key=lambda sweep: (sweep.experiment in ("layer_sparsity", "compression_cost"), -sweep.num_jobs))


def main() -> int:
    """Run the plan; the exit code says whether every run of it has a record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("results"), help="where records go (default: results)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these experiments")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    arguments = parser.parse_args()
    sweeps = plan(arguments.only)
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
            return subprocess.run(commands[number], cwd=CHECKOUT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode

    shown = -1
    totals, started = [sweep.num_jobs for sweep in sweeps], time.monotonic()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = [pool.submit(launch, number) for number in range(len(sweeps))]
        while not all(future.done() for future in running):
            time.sleep(POLL_SECONDS)
            finished = [total if future.done() else _outcomes(directory) for total, future, directory in zip(totals, running, directories, strict=True)]
            if sum(finished) == shown and not sys.stdout.isatty():
                continue
            shown = sum(finished)
            _show(shown, sum(totals), time.monotonic() - started, [s.experiment for s, f in zip(sweeps, running, strict=True) if f.running()])
    failed = [number for number, future in enumerate(running) if future.result() != 0]
    for number in failed:
        print(f"failed: {sweeps[number].experiment}: {directories[number].with_suffix('.log')}", file=sys.stderr)
    return int(bool(failed))


def _outcomes(directory: Path) -> int:
    return sum(1 for _ in directory.glob("*/outcome.json"))


def _show(done: int, total: int, seconds: float, names: list[str]) -> None:
    left = f"{seconds * (total - done) / done / 60:.0f} min left" if done else "estimating"
    end = "\r" if sys.stdout.isatty() else "\n"
    print(f"{done}/{total} runs, {seconds / 60:.0f} min, {left}: {', '.join(names)}".ljust(100), end=end, flush=True)


if __name__ == "__main__":
    sys.exit(main())
