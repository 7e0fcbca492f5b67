"""LoRA on the compressed model's own linears: train low-rank adapters on text, then add them to the weights."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modegpt.calibration.gradients import summed_loss
from modegpt.errors import UserError
from modegpt.models import decoder_layers, family_of
from modegpt.models.families import Family
from modegpt.progress import Progress

LONGEST_AUTO_LENGTH = 1024  # the paper's
NUM_LOGGED_LOSSES = 20
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Lora:
    """LoRA (Hu et al., ICLR 2022, arXiv 2106.09685): every adapted linear computes ``x W + (alpha / rank) x A B``.

    A starts random and B at zero, so training starts from the compressed model. AdamW without weight decay; the
    learning rate rises over the first ``warmup`` of the steps and falls linearly to zero; gradients are clipped to
    norm 1.

    Args:
        targets: ``mlp``: the linears of the MLP alone; ``all``: those of the attention too. Both factors of a low-rank
            linear are adapted.
        rank, alpha, dropout: the adapters' inner size, scale and dropout.
        num_samples, sequence_length: training windows; ``auto`` is 1024 tokens, or the model's context where that is
            shorter.
        epochs: passes over them, in an order of its own each.
        batch_size: windows behind one step.
        micro_batch_size: windows in one forward and backward pass, to save memory; null: all of a step.
    """

    targets: Literal["mlp", "all"] = "mlp"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    learning_rate: float = 2e-4
    num_samples: int = 8000
    sequence_length: int | str = "auto"
    epochs: int = 1
    batch_size: int = 8
    micro_batch_size: int | None = None
    warmup: float = 0.05

    def __post_init__(self) -> None:
        for name in ("rank", "num_samples", "epochs", "batch_size", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"recovery.{name}={value} is too small: at least 1")
        for name in ("alpha", "learning_rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"recovery.{name}={getattr(self, name)} must be positive")
        for name in ("dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"recovery.{name}={getattr(self, name)} is outside [0, 1)")
        if isinstance(self.sequence_length, str) and self.sequence_length != "auto":
            raise UserError(f"recovery.sequence_length={self.sequence_length} is neither a number of tokens nor auto")
        if isinstance(self.sequence_length, int) and self.sequence_length < 2:
            raise UserError(f"recovery.sequence_length={self.sequence_length} is too small: at least 2")

    def window(self, context: int) -> int:
        """Tokens of a training window for a model of this context. Raises UserError when it does not fit."""
        if isinstance(self.sequence_length, str):
            return min(LONGEST_AUTO_LENGTH, context)
        if self.sequence_length > context:
            raise UserError(
                f"recovery.sequence_length={self.sequence_length} is longer than the model's context of {context} "
                f"tokens; use at most {context}, or auto"
            )
        return self.sequence_length

    def recover(
        self, model: PreTrainedModel, ids: Tensor, *, seed: int, progress: Progress
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Train on ``ids`` (num_samples, sequence_length) and merge the adapters.

        ``model`` is changed, but no tensor that it shares with another is. The same seed gives the same weights on the
        same machine; the global random state is left as it was.

        Returns the model and ``num_steps, num_trained_parameters, num_adapted_linears, losses`` (mean negative
        log-likelihoods at up to 20 points of the training, each the mean since the one before). Raises UserError when
        the loss is not finite.
        """
        was_training, num_adapted = model.training, len(adapted_linears(model, self.targets))
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(seed)
            adapted = self.adapt(model)
            losses = self._train(adapted, ids, seed=seed, progress=progress)
        report = {
            "num_steps": self.num_steps(len(ids)),
            "num_trained_parameters": sum(
                parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad
            ),
            "num_adapted_linears": num_adapted,
            "losses": losses,
        }
        # safe: into a copy of each weight, which may be shared with the dense model
        merged = adapted.merge_and_unload(safe_merge=True)
        return merged.requires_grad_(False).train(was_training), report

    def adapt(self, model: PreTrainedModel) -> Any:
        """``model`` as a ``peft.PeftModel`` with fresh adapters, the only parameters that learn."""
        from peft import LoraConfig, get_peft_model  # an extra, and a second of import

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # any number scales
            lora_dropout=self.dropout,
            target_modules=adapted_linears(model, self.targets),
            bias="none",
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            # about a property that peft reads
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            return get_peft_model(model, config)

    def num_steps(self, num_samples: int) -> int:
        """Optimiser steps over ``num_samples`` windows."""
        return self.epochs * math.ceil(num_samples / self.batch_size)

    def _train(self, model: Any, ids: Tensor, *, seed: int, progress: Progress) -> list[float]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        num_steps = self.num_steps(len(ids))
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.learning_rate_share(step, num_steps))
        order = torch.Generator().manual_seed(seed)
        losses: list[float] = []
        since: list[float] = []
        step, num_logged = 0, min(NUM_LOGGED_LOSSES, num_steps)
        model.train()
        with progress.bar(num_steps, "recovery", unit="step") as bar:
            for _ in range(self.epochs):
                for chosen in torch.randperm(len(ids), generator=order).split(self.batch_size):
                    since.append(self._gradients(model, ids[chosen]))
                    torch.nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad(set_to_none=True)
                    step += 1
                    bar.update()
                    if step * num_logged >= (len(losses) + 1) * num_steps:
                        losses.append(sum(since) / len(since))
                        since = []
        return losses

    def _gradients(self, model: Any, ids: Tensor) -> float:
        """Accumulate the gradients of the mean loss of one step; returns that loss."""
        num_predicted, total = ids.shape[0] * (ids.shape[1] - 1), 0.0
        for batch in ids.split(self.micro_batch_size or len(ids)):
            loss = summed_loss(model, batch.to(model.device)) / num_predicted
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise UserError(
                f"recovery diverged: the loss is {total}; lower recovery.learning_rate, "
                f"or train in another dtype than {model.dtype}"
            )
        return total

    def learning_rate_share(self, step: int, num_steps: int) -> float:
        """The learning rate at ``step`` (from 0) over its peak: it rises over the warm-up and then falls to zero."""
        rise = max(1, round(self.warmup * num_steps))
        return (step + 1) / rise if step < rise else (num_steps - step) / max(1, num_steps - rise)


def adapted_linears(model: PreTrainedModel, targets: str) -> list[str]:
    """Full names of the linears that get an adapter; a low-rank linear gives both its factors, an empty one none."""
    family = family_of(model.config)
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(linear)] for layer in decoder_layers(model) for linear in _linears(family, layer, targets)]


def _linears(family: Family, layer: nn.Module, targets: str) -> Iterator[nn.Linear]:
    paths = [family.gate_path, family.up_path, family.down_path]
    if targets == "all":
        paths = [family.query_path, family.key_path, family.value_path, family.output_path, *paths]
    for path in filter(None, paths):
        yield from (module for module in layer.get_submodule(path).modules() if isinstance(module, nn.Linear))
