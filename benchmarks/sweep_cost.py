"""What a sweep costs beyond the work it cannot avoid: ``python benchmarks/sweep_cost.py [OVERRIDES ...]``.

Runs 5 sparsities x 4 MLP decompositions of tiny-llama in one process, from an empty cache, and adds up the stage
seconds of the records. Unavoidable: one pass over the calibration text, one evaluation of every compressed model, one
of the dense model. OVERRIDES go to every job (``model=...``, ``calibration.num_samples=...``). Wall time is given too:
it adds starting Python, composing configurations, reading texts and writing records, which weigh on a tiny model and on
no other.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modegpt.records.store import RecordStore, load_record

SPARSITIES = "compression.sparsity=0.1,0.2,0.3,0.4,0.5"
VARIANTS = "decomposition/mlp=nystrom,columns,magnitude,random"
SETTINGS = [
    "evaluation.zeroshot=null",
    "tracking=disabled",
    "threads=1",
    "quiet=true",
    "output.pictures=false",
    "output.experiment=sweep-cost",
]
NUM_JOBS = 20
CALIBRATION = ("influence", "statistics")
GOAL = 1.5


def account(records: Sequence[Mapping[str, Any]]) -> tuple[Counter[str], float]:
    """Seconds of every stage over all records, and how many of them were unavoidable."""
    stages = [Counter({stage["name"]: stage["seconds"] for stage in record["cost"]["stages"]}) for record in records]
    seconds = sum(stages, Counter())
    # once is what the one job spent that found nothing to reuse; the others' share of these stages is overhead
    once = max(sum(of[name] for name in CALIBRATION) for of in stages) + max(of["dense evaluation"] for of in stages)
    return seconds, once + seconds["compressed evaluation"]


def main() -> int:
    """Run, add up, print; the exit code is that of a job that failed, else says whether the goal was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of every job, such as model=tiny-opt")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "modegpt",
            "--multirun",
            SPARSITIES,
            VARIANTS,
            *SETTINGS,
            f"output.root={folder}/results",
            *arguments.overrides,
        ]
        environment = os.environ | {"MODEGPT_CACHE": f"{folder}/cache", "OMP_NUM_THREADS": "1"}
        checkout = Path(__file__).resolve().parent.parent
        started = time.monotonic()
        done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL, check=False)
        if done.returncode != 0:  # it said why
            return done.returncode
        wall = time.monotonic() - started
        records = [load_record(path) for path in RecordStore(f"{folder}/results").paths()]
    assert len(records) == NUM_JOBS, f"{len(records)} records instead of {NUM_JOBS}"
    seconds, unavoidable = account(records)
    for name, value in seconds.most_common():
        print(f"{name:<22} {value:8.2f} s")
    ratio = seconds.total() / unavoidable
    passes = sum(record["cost"]["forward_passes"] for record in records)
    print(f"{NUM_JOBS} jobs, {passes:g} forward passes over the calibration text")
    print(f"all {seconds.total():.2f} s, unavoidable {unavoidable:.2f} s: ratio {ratio:.3f} (goal: at most {GOAL})")
    print(f"wall time {wall:.2f} s, {wall / unavoidable:.3f} times what is unavoidable")
    return int(ratio > GOAL)


if __name__ == "__main__":
    sys.exit(main())
