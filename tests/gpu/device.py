"""Where the tests marked ``gpu`` run: on a GPU, or on what ``MODEGPT_GPU_TESTS`` names, which rehearses them."""

import os

import pytest
import torch

DEVICE = os.environ.get("MODEGPT_GPU_TESTS", "cuda")
HERE = DEVICE != "cuda" or torch.cuda.is_available()
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HERE, reason="there is no CUDA device here")]
