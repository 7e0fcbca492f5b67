"""SVD-LLM: SVD of whitened weights, so that a dropped singular value is the loss of dropping it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from modegpt.calibration.stream import HiddenStates, advance
from modegpt.decompositions.linalg import PSDFactor, energy, psd_cholesky, relative
from modegpt.decompositions.modules import LowRank
from modegpt.errors import UserError
from modegpt.methods.base import Compressed, CompressionTask, Method
from modegpt.methods.low_rank import (
    Truncation,
    block_linears,
    dense_layers,
    factored_model,
    factored_shape,
    factored_tensors,
    input_gram,
    input_grams,
    input_statistics,
    layer_ranks,
)
from modegpt.models import Family, build_layer, compressed_config, decoder_layers, merged_tensors

SMALLEST_ENERGY = 1e-32
"""Of a direction, relative to the largest, as far as the balance of the two factors goes."""


def whitened_truncation(W: Tensor, factor: PSDFactor, rank: int) -> Truncation:
    """Truncation of ``L^T W = U S V^T`` where C = L L^T is the input's Gram matrix.

    ``A = L^-T U_r sqrt(S_r)`` and ``B = sqrt(S_r) V_r^T``. The squared loss is the sum of the dropped squared singular
    values: ``||X (W - A B)||_F = ||L^T (W - A B)||_F`` for every X with X^T X = C. W (in, out).

    Only the smaller side's singular vectors are computed, as eigenvectors of its Gram matrix. With the output's,
    ``A B = W V_r V_r^T`` asks for no inverse of L; with the input's, for one triangular solve of r columns.
    """
    L, W64 = factor.root(), W.double()
    M = L.mT @ W64
    tall = M.shape[0] >= M.shape[1]
    energies, vectors = torch.linalg.eigh(M.mT @ M if tall else M @ M.mT)
    energies, vectors = energies.flip(0).clamp(min=0), vectors.flip(1)[:, :rank]
    # the root of a singular value; any positive number gives the same A B
    root = energies[:rank].clamp(min=SMALLEST_ENERGY * energies[0] + torch.finfo(energies.dtype).tiny) ** 0.25
    if tall:
        A, B = W64 @ vectors / root, root.unsqueeze(-1) * vectors.mT
    else:
        A = torch.linalg.solve_triangular(L.mT, vectors * root, upper=True)
        B = vectors.mT @ M / root.unsqueeze(-1)
    factors = LowRank(A=A.to(W.dtype), B=B.to(W.dtype))
    return Truncation(factors, relative(energies[rank:].sum(), energies.sum()), factor.numerics)


def refit_output_factor(W: Tensor, truncation: Truncation, C: Tensor) -> Truncation:
    """Keep A and solve ``min_B ||X (W - A B)||_F`` for inputs X with the Gram matrix C: ``B = (A^T C A)^-1 A^T C W``.

    The columns of A are directions that whitening has sorted, so a plain Cholesky solve would see their
    scales only; ``psd_cholesky`` equilibrates and reports jitter. Float64; W (in, out).
    """
    A, W64, C = truncation.factors.A.double(), W.double(), C.double()
    CA = C @ A
    factor = psd_cholesky(A.mT @ CA)
    B = factor.solve(CA.mT @ W64)
    factors = LowRank(A=truncation.factors.A, B=B.to(W.dtype))
    numerics = truncation.numerics | ({"update": factor.numerics} if factor.numerics else {})
    return Truncation(factors, relative(energy(C, W64 - A @ B), energy(C, W64)), numerics)


@dataclass(frozen=True)
class SVDLLM(Method):
    """SVD-LLM (Wang et al., ICLR 2025, arXiv 2403.07378): truncation-aware data whitening (section 3.1).

    Every matrix has one sparsity; both factors count against it. The optional update is the layer-wise closed
    form of the paper's first preprints; the published version fine-tunes the factors with LoRA instead,
    which is recovery and not offered here.

    Run beside the official code (AIoT-MLSys-Lab/SVD-LLM) on the same tokens: SmolLM2-135M at 30 % has perplexity 280.7
    here and 279.2 there, which rounds each rank down; the logits differ by 7e-4 nats of divergence.

    Args:
        update: after whitening, go through the layers in order: with the inputs that the layer's linears have when
            all earlier layers are compressed (and the layer itself is dense), replace the output-side factor by
            the least-squares optimum for the input-side one. The target stays the dense weight on those same inputs.
            Costs two more passes over the calibration tokens. ``relative_error`` is then the error on those inputs.
    """

    name: ClassVar[str] = "svd_llm"
    experts: ClassVar[bool] = True

    update: bool = False

    def required_statistics(self, family: Family) -> frozenset[str]:
        """The Gram matrix of each map's input."""
        return input_statistics(family)

    def compress(self, task: CompressionTask) -> Compressed:
        """Truncate every block-linear weight, whitened by its inputs."""
        if task.sparsity == 0:
            return dense_layers(task)
        ranks = layer_ranks(task)
        whitened = self._whitened(task, ranks)
        return factored_model(task, ranks, self._updated(task, ranks, whitened) if self.update else whitened)

    def _whitened(self, task: CompressionTask, ranks: list[dict[str, int]]) -> Iterator[dict[str, Truncation]]:
        layers, meter = decoder_layers(task.model), task.calibration.meter
        observed = task.calibration.statistics(input_statistics(task.family), loop="decomposition")
        for layer, of_layer, statistics in zip(layers, ranks, observed, strict=True):
            with meter.stage("solve", counted=True):
                linears = block_linears(task.family, layer)
                grams = {name: psd_cholesky(C) for name, C in input_grams(task.family, layer, statistics).items()}
                truncations = {
                    role: whitened_truncation(linear.weight.detach().T, grams[input_gram(role)], of_layer[role])
                    for role, linear in linears.items()
                }
            yield truncations

    def _updated(
        self, task: CompressionTask, ranks: list[dict[str, int]], whitened: Iterator[dict[str, Truncation]]
    ) -> Iterator[dict[str, Truncation]]:
        calibration = task.calibration
        config = compressed_config(task.model.config, [factored_shape(task, of_layer) for of_layer in ranks])
        hidden = calibration.embed()
        for index, (layer, truncations) in enumerate(zip(decoder_layers(task.model), whitened, strict=True)):
            with calibration.meter.stage("update", counted=True):
                # A second list of the same batches: observing must leave the compressed stream in front of this layer.
                with self._explained(index, task, layer):
                    inputs = calibration.observe(
                        HiddenStates(list(hidden.batches), hidden.arguments), index, input_statistics(task.family)
                    )
                updated = self._refit(task.family, layer, truncations, inputs)
                compressed = build_layer(
                    config, index, merged_tensors(task.family, layer, factored_tensors(task.family, layer, updated))
                )
                with self._explained(index, task, layer):
                    advance(hidden, index, compressed)
                calibration.meter.forward_passes += 1 / calibration.num_layers  # beside the one observed
            yield updated

    @staticmethod
    @contextmanager
    def _explained(index: int, task: CompressionTask, layer: nn.Module) -> Iterator[None]:
        """Raise UserError that says why, where activations are not finite: these are not the dense model's."""
        try:
            yield
        except UserError as error:
            num_tokens = task.calibration.tokens.num_tokens
            num_features = max(linear.in_features for linear in block_linears(task.family, layer).values())
            reason = "the updated factors are out of the range of its dtype"
            if num_tokens < num_features:
                reason = f"{num_tokens} calibration tokens do not determine the update of {num_features} input features"
            raise UserError(
                f"svd_llm: the compressed model gives NaN or inf at layer {index} on the calibration text: {reason}; "
                "raise calibration.num_samples, or set method.update=false"
            ) from error

    @staticmethod
    def _refit(
        family: Family, layer: nn.Module, truncations: dict[str, Truncation], inputs: dict[str, Tensor]
    ) -> dict[str, Truncation]:
        grams = input_grams(family, layer, inputs)
        return {
            role: refit_output_factor(linear.weight.detach().T, truncations[role], grams[input_gram(role)])
            for role, linear in block_linears(family, layer).items()
        }
