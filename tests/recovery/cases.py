"""One small compressed model of each kind that recovery may meet, with the dense model whose tensors it shares."""

import copy
import functools

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modegpt.allocation.policies import Uniform
from modegpt.decompositions import MLP_VARIANTS, QUERY_KEY_VARIANTS, VALUE_OUTPUT_VARIANTS
from modegpt.methods.modegpt import MoDeGPT
from modegpt.methods.shortgpt import ShortGPT
from modegpt.methods.slicegpt import SliceGPT
from modegpt.methods.svd import SVD
from tests.methods.task_of import task_of
from tests.models.family_table import dense_model

PAPER = MoDeGPT(
    mlp=MLP_VARIANTS["nystrom"](),
    query_key=QUERY_KEY_VARIANTS["cr"](),
    value_output=VALUE_OUTPUT_VARIANTS["svd"](),
    allocation=Uniform(),
)
COMPRESSED = {
    "llama": ("llama", PAPER),
    "opt": ("opt", PAPER),
    "phi3": ("phi3", PAPER),
    "low-rank": ("llama", SVD()),
    "dropped": ("llama", ShortGPT()),
    "sliced": ("llama", SliceGPT()),
}


@functools.cache
def _compressed(case: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    form, method = COMPRESSED[case]
    dense = dense_model(form)
    return dense, method.compress(task_of(dense, 0.4)).model


def compressed(case: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The dense model and a fresh copy of the compressed one; what they share they share in the copy too."""
    return copy.deepcopy(_compressed(case))


def windows(model: PreTrainedModel) -> Tensor:
    """(16, 20) token ids with much to learn: each window repeats four tokens."""
    period = torch.randint(3, model.config.vocab_size, (16, 4), generator=torch.Generator().manual_seed(1))
    return period.repeat(1, 5)
