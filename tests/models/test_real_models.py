"""The two real models, in GGUF files: they are read as Transformers reads them, and lose little by what is fitted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from experiments.fetch_real_models import command, fetched
from modegpt.allocation.policies import Uniform
from modegpt.calibration.calibration import Calibration
from modegpt.data.texts import load_documents
from modegpt.data.tokens import CalibrationTokens, cut_windows, window_bos
from modegpt.decompositions import MLPMagnitude, MLPNystrom, QueryKeyCRPairs
from modegpt.methods.base import CompressionTask
from modegpt.methods.modegpt import MoDeGPT
from modegpt.models import family_of
from modegpt.models.checkpoints import load_model, load_tokenizer
from modegpt.progress import Progress

pytestmark = pytest.mark.large
TEXT = (
    "The river rises in the hills north of the town and flows south through farmland to the sea. In the nineteenth "
    "century it drove a dozen mills, most of which ground wheat; two of them wove cotton until the war. The last one "
    "closed in 1931 and is a museum today. Visitors can see the great wheel, which was made of oak, and the stones. "
)


NATS = {"smollm2": 3.323, "gemma3": 3.102}
"""A token of the first 64 of ``TEXT``, by Transformers alone."""


@dataclass(frozen=True)
class Real:
    name: str
    file: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def windows(self, text: str, count: int, length: int) -> Tensor:
        """The first windows of ``length`` tokens of ``text``, each behind a BOS where the family was trained so.

        SmolLM2 was not: its BOS begins a turn of a chat, and the text behind it costs 0.28 nats a token more.
        """
        bos = window_bos("auto", family=self.model.config.model_type, tokenizer=self.tokenizer)
        stream = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)
        return cut_windows(stream, length + (bos is not None), bos=bos)[:count]


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def real(request: pytest.FixtureRequest) -> Real:
    file = fetched(request.param)
    if file is None:
        pytest.skip(f"the model is not there: {command(request.param)}")
    return Real(request.param, file, load_model(str(file), device="cpu"), load_tokenizer(str(file)))


def excess(real: Real, fitted: Tensor, scored: Tensor, **modules: Any) -> float:
    """Nats a token that ``modules`` cost on the windows ``scored``, reduced on the windows ``fitted``."""
    tokens = CalibrationTokens(fitted, sha256="", stream_tokens=fitted.numel())
    method = MoDeGPT(**{"mlp": None, "query_key": None, "value_output": None, "allocation": Uniform(), **modules})
    task = CompressionTask(Calibration(real.model, tokens, batch_size=2, progress=Progress(quiet=True)), 0.0)
    return nats(method.compress(task).model, scored) - nats(real.model, scored)


@torch.no_grad()
def nats(model: PreTrainedModel, ids: Tensor) -> float:
    return float(model(ids, labels=ids).loss)


def test_it_is_the_model_that_transformers_reads(real: Real) -> None:
    ids = real.windows(TEXT, 1, 64)
    stock = AutoModelForCausalLM.from_pretrained(real.file.parent, gguf_file=real.file.name, dtype=torch.float32)
    expected = nats(stock.eval(), ids)
    assert nats(real.model, ids) == pytest.approx(expected, abs=1e-5)
    assert expected == pytest.approx(NATS[real.name], abs=5e-4)


def test_the_order_of_words_means_something_to_it(real: Real) -> None:
    ids = real.windows(TEXT, 1, 64)
    drawn = torch.randperm(ids.shape[1] - 1, generator=torch.Generator().manual_seed(0))
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + drawn])
    assert nats(real.model, ids[:, order]) > nats(real.model, ids) + 3


@pytest.fixture(scope="module")
def texts(real: Real) -> tuple[Tensor, Tensor]:
    """Windows of the training stories to fit on, and of the others to score."""

    def windows(split: str, count: int) -> Tensor:
        return real.windows(" ".join(load_documents("tiny", path=None, split=split).texts[:200]), count, 255)

    return windows("calibration", 8), windows("test", 2)


def test_fitted_channels_lose_a_tenth_of_what_naive_slices_do(real: Real, texts: tuple[Tensor, Tensor]) -> None:
    """A fifth of the MLP's channels gone."""
    if family_of(real.model.config).head_norms:
        pytest.skip("what it can lose is in its heads' norms")
    share = {"module_sparsity": {"mlp": 0.2}}
    assert 0 < excess(real, *texts, mlp=MLPNystrom(), **share) < excess(real, *texts, mlp=MLPMagnitude(), **share) / 10


def test_estimated_norms_lose_less_than_half_of_what_slicing_alone_does(
    real: Real, texts: tuple[Tensor, Tensor]
) -> None:
    """A quarter of the pairs gone."""
    if not family_of(real.model.config).head_norms:
        pytest.skip("its heads have no norms")
    lost = {
        fit: excess(real, *texts, query_key=QueryKeyCRPairs(head_norm=fit), module_sparsity={"query_key": 0.25})
        for fit in ("pairs", "kept")
    }
    assert lost["pairs"] < lost["kept"] / 2
