"""Bad input: one line that names what would be right, a non-zero exit code, the main job never called."""

import re
import sys
from collections.abc import Callable

import pytest

from modegpt.config import build
from modegpt.decompositions import MLP_VARIANTS
from modegpt.decompositions.nystrom import MLPNystrom
from modegpt.errors import UserError
from modegpt.methods.registry import make_method

BAD = {
    "unknown key": (
        ["compression.sparsty=0.2"],
        "error: compression.sparsty is not known; choose from",
        "did you mean sparsity?",
    ),
    "unknown top-level key": (["modle=x"], "did you mean model?"),
    "unknown key of a variant": (["decomposition.mlp.rigde=1"], "choose from name, ridge"),
    "forced key": (["++compression.ratio=1"], "compression.ratio is not known; choose from budget,"),
    "key that was taken out": (
        ["method=modegpt_plus", "method.centred=true"],
        "error: method.centred was taken out in November 2026: ",
        "(docs/plus_choices.md)",
    ),
    "added key": (["+nonsense=1"], "nonsense is not known; choose from"),
    "unknown option": (
        ["decomposition/mlp=nystrm"],
        "decomposition/mlp=nystrm is not known; choose from",
        "did you mean nystrom?",
    ),
    "unknown group": (
        ["decomposition/mpl=nystrom"],
        "error: decomposition/mpl is not known",
        "did you mean decomposition/mlp?",
    ),
    "a number for a choice": (
        ["decomposition/query_key=-1"],
        "decomposition/query_key=-1 is not known; choose from cr",
    ),
    "a list for a choice": (["decomposition/value_output=[1e309]"], "decomposition/value_output=[inf] is not known"),
    "a number for an added choice": (["+recovery=-0.0"], "recovery=-0.0 is not known; choose from lora, none"),
    "a list for a choice that is left out": (["~model=[-1]"], "model=[-1] is not known; choose from"),
    "nothing for a choice": (["model=null"], "model=None is not known; choose from"),
    "unknown model": (["model=tiny-lama"], "did you mean tiny-llama?"),
    "type of a number": (["compression.sparsity=much"], "compression.sparsity:", "'much'", "Float"),
    "type of an integer": (["calibration.num_samples=1.5"], "calibration.num_samples:", "Integer"),
    "type of a section": (["compression=0.3"], "compression:"),
    "sparsity 1": (["compression.sparsity=1"], "compression.sparsity=1.0 is outside [0, 1)"),
    "sparsity below 0": (["compression.sparsity=-0.1"], "compression.sparsity=-0.1 is outside [0, 1)"),
    "module sparsity": (
        ["compression.module_sparsity.query_key=1.2"],
        "compression.module_sparsity.query_key=1.2 is outside [0, 1)",
    ),
    "layer sparsity": (
        ["allocation=explicit", "compression.layer_sparsity=[0.1,2]"],
        "compression.layer_sparsity=2.0 is outside",
    ),
    "budget": (["compression.budget=close"], "compression.budget=close is not known; choose from exact, nearest"),
    "skipped layer": (["compression.skip_layers=[-1]"], "compression.skip_layers=-1"),
    "no samples": (["calibration.num_samples=0"], "calibration.num_samples=0 is too small: at least 1"),
    "sequence length": (["calibration.sequence_length=long"], "calibration.sequence_length=long"),
    "source": (["calibration.source=wiki"], "calibration.source=wiki is not known; choose from", "wikitext2"),
    "file source without a file": (["calibration=jsonl"], "calibration.path is missing"),
    "local model without a path": (["model=local"], "model.path is missing"),
    "dtype": (["model.dtype=float8"], "model.dtype=float8 is not known; choose from"),
    "device": (["model.device=gpu"], "model.device=gpu is not known; choose from auto, cpu, cuda"),
    "tracking": (["tracking.mode=on"], "tracking.mode=on is not known; choose from disabled, offline, online"),
    "window": (["evaluation.perplexity.windows=[1]"], "evaluation.perplexity.windows"),
    "experiment": (["output.experiment=a/b"], "output.experiment=a/b must be one directory name"),
    "seed": (["seed=-1"], "seed=-1 is too small"),
    "seed of 64 bits": (["seed=18446744073709551616"], "seed=18446744073709551616 is too large: at most"),
    "calibration seed of 64 bits": (["calibration.seed=18446744073709551616"], "calibration.seed=", "is too large"),
    "size of 64 bits": (["calibration.batch_size=18446744073709551616"], "calibration.batch_size=", "is too large"),
    "threads": (["threads=100000"], "threads=100000 is too large: at most 1024"),
    "windows that are no numbers": (["evaluation.perplexity.windows=true"], "windows=True should be auto or a list"),
    "a window that is no number": (["evaluation.perplexity.windows=[true]"], "windows=[True] should be auto or a list"),
    "half a window": (["evaluation.perplexity.windows=1.5"], "windows=1.5 should be auto or a list"),
    "NUL in a path": (["calibration.path='a\0b'"], "calibration.path=a\\0b holds a character that cannot be written"),
    "NUL in another path": (
        ["output.save_model='a\0b'"],
        "output.save_model=a\\0b holds a character that cannot be written",
    ),
    "no UTF-8": (["output.save_model='a\udcff'"], "output.save_model=a\\udcff holds a character"),
    "no UTF-8 in a list": (["tracking.tags=['a\udcff']"], "tracking.tags=a\\udcff holds a character"),
    "a variable that is not set": (
        ["tracking.mode=${oc.env:MODEGPT_NO_SUCH_VARIABLE}"],
        "Environment variable 'MODEGPT_NO_SUCH_VARIABLE' not found",
    ),
    "sweep without the flag": (["seed=1,2"], "add --multirun"),
    "grammar": (["seed=["], "cannot read the override seed=["),
    "flag": (["--sparsity"], "--sparsity", "modegpt --help"),
    "launcher": (
        ["--multirun", "hydra/launcher=slurm", "seed=1,2"],
        "hydra/launcher=slurm is not known",
        "modegpt[sweep]",
    ),
    "launcher of no processes": (
        ["--multirun", "seed=1,2", "hydra/launcher=node", "hydra.launcher.n_jobs=0"],
        "error: hydra.launcher.n_jobs=0 must be a whole number",
    ),
    "sweep of a wrong key": (["--multirun", "sede=1,2"], "error: sede is not known", "did you mean seed?"),
}


@pytest.mark.parametrize(("arguments", "expected"), [(case[0], case[1:]) for case in BAD.values()], ids=BAD)
def test_one_line(
    job: Callable, capfd: pytest.CaptureFixture, tmp_path, arguments: list[str], expected: tuple[str, ...]
) -> None:
    code, calls = job(*arguments, f"output.root={tmp_path}/results")
    output = capfd.readouterr()
    assert code != 0 and calls == []
    [line] = output.err.splitlines()
    assert line.startswith("error: ")
    for part in expected:
        assert part in line
    assert output.out == ""
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_in_a_fresh_process(process: Callable) -> None:
    finished = process("compression.sparsity=1")
    assert finished.returncode == 1
    assert (
        finished.stderr
        == "error: compression.sparsity=1.0 is outside [0, 1): it is the share of the weights to remove\n"
    )


def test_a_defect_keeps_its_traceback(process: Callable) -> None:
    finished = process("compression.sparsity=0.5")
    assert finished.returncode == 1
    assert "Traceback" in finished.stderr
    assert finished.stderr.splitlines()[-1] == "error: unexpected ValueError: planned failure"


def test_traceback_on_request(job: Callable, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEGPT_TRACEBACK", "1")
    assert job("threads=0")[0] == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("error: threads=0")


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (UserError("no such thing"), "error: no such thing"),
        (PermissionError(13, "Permission denied", "x/y"), "error: [Errno 13] Permission denied: 'x/y'"),
        (KeyboardInterrupt(), "error: interrupted"),
        (MemoryError("cannot allocate"), "error: out of memory"),
    ],
)
def test_errors_of_the_main_job(
    job: Callable, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, raised: BaseException, line: str
) -> None:
    def run(config: object, *, command: str) -> None:
        raise raised

    monkeypatch.setattr(sys.modules["modegpt.run"], "run", run)
    assert job()[0] == (130 if isinstance(raised, KeyboardInterrupt) else 1)
    [only] = capfd.readouterr().err.splitlines()
    assert only.startswith(line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["allocation=explicit"], "compression.layer_sparsity"),
        (["compression.layer_sparsity=[0.1]"], "allocation=explicit"),
        (["+decomposition.mlp.rigde=1"], "decomposition.mlp.rigde is not known; choose from ridge; did you mean ridge"),
        (["decomposition.mlp.ridge=big"], "decomposition.mlp.ridge=big has the wrong type: expected float"),
        (["decomposition.query_key.name=nystrom"], "query_key=nystrom is not known; choose from cr"),
        (["allocation.epsilon=null"], "allocation.epsilon=None has the wrong type"),
        (["method=slicegpt", "compression.skip_layers=[1]"], "compression.skip_layers has no effect"),
        (["method.name=modegtp"], "did you mean modegpt"),
        (["allocation.epsilon=inf"], "allocation.epsilon=inf is out of range: it must be finite"),
        (["allocation.epsilon=nan"], "allocation.epsilon=nan is out of range"),
        (["decomposition.mlp.ridge=inf"], "decomposition.mlp.ridge=inf is out of range"),
        (["method=llm_pruner", "method.batch_size=18446744073709551616"], "batch_size=18446744073709551616 is out of"),
    ],
)
def test_methods_are_refused_before_any_work(job: Callable, arguments: list[str], message: str) -> None:
    code, [(config, _)] = job(*arguments)
    assert code == 0
    with pytest.raises(UserError, match=re.escape(message)):
        make_method(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "nystrm"}, "decomposition.mlp.name=nystrm is not known; choose from .*; did you mean nystrom"),
        ({"name": "nystrom", "rigde": 1.0}, "decomposition.mlp.rigde is not known; choose from ridge"),
        ({"name": "svd", "ridge": 1.0}, "svd has no options"),
        ({"name": "nystrom", "ridge": "big"}, "decomposition.mlp.ridge=big has the wrong type: expected float"),
        ({"name": "elimination", "block": True}, "expected int"),
        ({}, "decomposition.mlp.name=None is not known"),
    ],
)
def test_build_refuses(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(MLP_VARIANTS, options, "decomposition.mlp")


def test_build_takes_an_integer_for_a_float() -> None:
    assert build(MLP_VARIANTS, {"name": "nystrom", "ridge": 1}, "decomposition.mlp") == MLPNystrom(ridge=1)
