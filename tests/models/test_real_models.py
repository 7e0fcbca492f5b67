"""The two real models, in GGUF files: they are read, they know English, and lose pairs under their norms."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.fetch_real_models import command, fetched
from modegpt.allocation.policies import Uniform
from modegpt.calibration.calibration import Calibration
from modegpt.data.texts import load_documents
from modegpt.data.tokens import CalibrationTokens
from modegpt.decompositions import QueryKeyCRPairs
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


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def real(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    file = fetched(request.param)
    if file is None:
        pytest.skip(f"the model is not there: {command(request.param)}")
    return load_model(str(file), device="cpu"), load_tokenizer(str(file))


def windows(tokenizer: PreTrainedTokenizerBase, text: str, count: int, length: int) -> Tensor:
    """The first windows of ``text``, each behind a BOS."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids[: count * (length - 1)]).view(count, -1)
    return torch.cat([torch.full((count, 1), tokenizer.bos_token_id), ids], dim=1)


@torch.no_grad()
def nats(model: PreTrainedModel, ids: Tensor) -> float:
    return float(model(ids, labels=ids).loss)


def test_a_real_model_knows_english(real: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = real
    ids = windows(tokenizer, TEXT, 1, 65)
    order = torch.cat(
        [torch.zeros(1, dtype=torch.long), 1 + torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    )
    assert nats(model, ids) < 4 < nats(model, ids[:, order]) - 1


def test_estimated_norms_lose_less_than_half_of_what_slicing_alone_does(
    real: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    """A quarter of the pairs gone, fitted on the training stories and scored on the others."""
    model, tokenizer = real
    if not family_of(model.config).head_norms:
        pytest.skip("its heads have no norms")
    fitted, scored = (
        windows(tokenizer, " ".join(load_documents("tiny", path=None, split=split).texts[:200]), count, 256)
        for split, count in (("calibration", 8), ("test", 2))
    )
    tokens, excess = CalibrationTokens(fitted, sha256="", stream_tokens=fitted.numel()), {}
    for fit in ("pairs", "kept"):
        method = MoDeGPT(
            mlp=None,
            query_key=QueryKeyCRPairs(head_norm=fit),
            value_output=None,
            allocation=Uniform(),
            module_sparsity={"query_key": 0.25},
        )
        task = CompressionTask(Calibration(model, tokens, batch_size=2, progress=Progress(quiet=True)), 0.0)
        excess[fit] = nats(method.compress(task).model, scored) - nats(model, scored)
    assert excess["pairs"] < excess["kept"] / 2
