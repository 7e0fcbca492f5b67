"""The recipe of the tiny models: ``python -m tools.tiny_world.train`` writes the data, trains and saves all models.

Same seed, library versions and processor: same weights. Other processors round differently, so the last digits differ.
"""

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from modegpt.data.embedded import MODELS_DIR, TINY_MODELS, TINY_TASKS
from modegpt.evaluation.tasks import load_tasks
from modegpt.evaluation.zeroshot import zeroshot
from modegpt.progress import Progress
from tools.tiny_world import corpus
from tools.tiny_world.data_files import write_data
from tools.tiny_world.tokenizer import train_tokenizer

CONTEXT_TOKENS = 256
VOCAB_SIZE = 1536
_SHARED = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT_TOKENS,
    "tie_word_embeddings": True,
}
# arguments of the Hugging Face config, by model
ARCHITECTURES = {
    "tiny-llama": {
        **_SHARED,
        "model_type": "llama",
        "intermediate_size": 352,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "tiny-opt": {**_SHARED, "model_type": "opt", "ffn_dim": 512, "word_embed_proj_dim": 128, "dropout": 0.0},
    "tiny-qwen3": {
        **_SHARED,
        "model_type": "qwen3",
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "intermediate_size": 256,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "tiny-olmoe": {
        **_SHARED,
        "model_type": "olmoe",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
}


@dataclass(frozen=True)
class Recipe:
    """Training hyper-parameters.

    Args:
        cosine_steps: where the cosine would end, were it not for the cooldown of the last ``cooldown_steps``.
        doc_start_share: share of windows that begin with a document.
        bos_share: share of windows led by ``<s>``.
        balance: weight of the loss that a mixture's router has for using its experts unevenly.
    """

    num_steps: int = 1800
    batch_size: int = 8
    learning_rate: float = 3e-3
    final_learning_rate_share: float = 0.02
    warmup_steps: int = 150
    cosine_steps: int = 3000
    cooldown_steps: int = 320
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    doc_start_share: float = 0.5
    bos_share: float = 0.25
    balance: float = 0.0
    seed: int = 0


# OPT learns its positions and its facts more slowly
RECIPES = {
    "tiny-llama": Recipe(),
    "tiny-opt": Recipe(num_steps=4000, cosine_steps=4000),
    "tiny-qwen3": Recipe(num_steps=1300),
    "tiny-olmoe": Recipe(num_steps=1700, learning_rate=4e-3, balance=0.01),
}


def build_model(architecture: dict, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> PreTrainedModel:
    """A freshly initialised model of one of ``ARCHITECTURES``, float32."""
    kwargs = dict(architecture)
    config = AutoConfig.for_model(
        kwargs.pop("model_type"),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **kwargs,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def encode_documents(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """One stream of token ids (T,), documents joined by blank lines, and the offsets (D,) at which documents start."""
    ids = torch.tensor(tokenizer("\n\n".join(documents), add_special_tokens=False, verbose=False).input_ids)
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    is_start = torch.zeros_like(ids, dtype=torch.bool)
    is_start[0] = True
    is_start[2:] = (ids[:-2] == newline) & (ids[1:-1] == newline)
    return ids, is_start.nonzero().flatten()


def draw_batch(
    ids: torch.Tensor, starts: torch.Tensor, *, recipe: Recipe, window: int, bos: int, generator: torch.Generator
) -> torch.Tensor:
    """Windows (batch_size, window) of the stream, at document starts or anywhere, some led by the BOS token."""

    def draw(high: int) -> torch.Tensor:
        return torch.randint(high, (recipe.batch_size,), generator=generator)

    def chance(share: float) -> torch.Tensor:
        return torch.rand(recipe.batch_size, generator=generator) < share

    last = len(ids) - window
    offsets = torch.where(chance(recipe.doc_start_share), starts[draw(len(starts))].clamp(max=last), draw(last + 1))
    batch = ids[offsets[:, None] + torch.arange(window)]
    led = torch.cat([torch.full((recipe.batch_size, 1), bos), batch[:, :-1]], dim=1)
    return torch.where(chance(recipe.bos_share)[:, None], led, batch)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, a cosine towards ``final_learning_rate_share`` of the peak, and a linear cooldown to zero."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    cooldown_start = recipe.num_steps - recipe.cooldown_steps
    progress = (min(step, cooldown_start) - recipe.warmup_steps) / (recipe.cosine_steps - recipe.warmup_steps)
    low = recipe.final_learning_rate_share
    rate = recipe.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
    return rate if step < cooldown_start else rate * (recipe.num_steps - step) / recipe.cooldown_steps


def next_token_loss(model: PreTrainedModel, batch: torch.Tensor, *, balance: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy in nats of each token given those before it in its window; ``batch`` is (B, T).

    ``balance``: see ``Recipe``.
    """
    outputs = model(batch, use_cache=False, **({"output_router_logits": True} if balance else {}))
    loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    return loss + balance * outputs.aux_loss if balance else loss


@torch.inference_mode()
def window_perplexity(model: PreTrainedModel, ids: torch.Tensor, *, window: int) -> float:
    """Perplexity over non-overlapping windows of the stream ``ids`` ``[T]``; the tail is dropped."""
    windows = ids[: len(ids) // window * window].view(-1, window)
    losses = [next_token_loss(model, batch).double() * len(batch) for batch in windows.split(16)]
    return math.exp(torch.stack(losses).sum().item() / len(windows))


def train(
    model: PreTrainedModel, ids: torch.Tensor, starts: torch.Tensor, *, recipe: Recipe, window: int, log_every: int = 50
) -> list[float]:
    """Train in place with AdamW (weight decay on matrices only); returns the loss of every step."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step in range(recipe.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        batch = draw_batch(
            ids, starts, recipe=recipe, window=window, bos=model.config.bos_token_id, generator=generator
        )
        loss = next_token_loss(model, batch, balance=recipe.balance)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if log_every and (step + 1) % log_every == 0:
            per_step_seconds = (time.monotonic() - started) / (step + 1)
            left_minutes = per_step_seconds * (recipe.num_steps - step - 1) / 60
            recent = sum(losses[-log_every:]) / log_every
            speed = recipe.batch_size * window / per_step_seconds
            print(
                f"step {step + 1}/{recipe.num_steps}  loss {recent:.4f}  {speed:.0f} tokens/s  "
                f"{left_minutes:.1f} min left",
                flush=True,
            )
    model.eval()
    return losses


def task_accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, limit: int | None = None
) -> dict[str, dict]:
    """Accuracy (``acc``, ``acc_norm``) on the five tasks; ``limit`` items of each, or all."""
    scores = zeroshot(
        model,
        tokenizer,
        load_tasks(["tiny"], data_path=None),
        batch_size=32,
        max_length=model.config.max_position_embeddings,
        limit=limit,
        encodings={},
        progress=Progress(quiet=True),
    )
    return {task: {metric: scores[task][metric] for metric in ("acc", "acc_norm")} for task in TINY_TASKS}


def train_and_save(name: str, *, recipe: Recipe, output: Path) -> dict:
    """Train one of the models and save it in Hugging Face form under ``output/name``.

    Returns what its RECIPE.json records.
    """
    started = time.monotonic()
    training_documents = corpus.documents("train")
    tokenizer = train_tokenizer(
        training_documents[:12000], vocab_size=VOCAB_SIZE, model_max_length=CONTEXT_TOKENS, add_bos=name == "tiny-llama"
    )
    ids, starts = encode_documents(training_documents, tokenizer)
    model = build_model(ARCHITECTURES[name], tokenizer, seed=recipe.seed)
    print(f"{name}: {model.num_parameters()} parameters, {len(ids)} training tokens", flush=True)
    losses = train(model, ids, starts, recipe=recipe, window=CONTEXT_TOKENS)
    return save_and_record(
        name,
        model,
        tokenizer,
        recipe=recipe,
        losses=losses,
        corpus_tokens=len(ids),
        training_seconds=time.monotonic() - started,
        output=output,
    )


def save_and_record(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    recipe: Recipe,
    losses: list[float],
    corpus_tokens: int,
    training_seconds: float,
    output: Path,
) -> dict:
    """Save a trained model with its tokenizer, score it on held-out text and the tasks, and write its RECIPE.json."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(output / name)
    tokenizer.save_pretrained(output / name)
    perplexities = {
        split: window_perplexity(model, encode_documents(corpus.documents(split), tokenizer)[0], window=CONTEXT_TOKENS)
        for split in ("validation", "test")
    }
    accuracies = task_accuracies(model, tokenizer)
    record = {
        "model": name,
        "architecture": ARCHITECTURES[name],
        "num_parameters": model.num_parameters(),
        "recipe": asdict(recipe),
        "corpus_seed": corpus.SEED,
        "corpus_tokens": corpus_tokens,
        "tokens_seen": recipe.num_steps * recipe.batch_size * CONTEXT_TOKENS,
        "final_training_loss": sum(losses[-50:]) / len(losses[-50:]),
        f"perplexity_{CONTEXT_TOKENS}": perplexities,
        "accuracies": accuracies,
        "mean_accuracy": sum(row["acc"] for row in accuracies.values()) / len(accuracies),
        "training_seconds": round(training_seconds),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (output / name / "RECIPE.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2), flush=True)
    return record


def main(arguments: list[str]) -> None:
    """Command line of the recipe."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_world.train", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), help="train only this model (default: all)")
    parser.add_argument("--output", type=Path, default=MODELS_DIR, help="directory that receives the models")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    write_data()
    for name in [parsed.model] if parsed.model else sorted(TINY_MODELS):
        train_and_save(name, recipe=RECIPES[name], output=parsed.output)


if __name__ == "__main__":
    main(sys.argv[1:])
