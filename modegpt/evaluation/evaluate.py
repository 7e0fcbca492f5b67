"""Score a model on a text and on zero-shot tasks; what can be refused is refused before any forward pass."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modegpt.data.texts import Documents, load_documents, tokenize_stream
from modegpt.errors import UserError
from modegpt.evaluation.begun import Begun
from modegpt.evaluation.items import ACCURACIES
from modegpt.evaluation.perplexity import metric_name, perplexity, resolve_windows, token_fingerprint
from modegpt.evaluation.spec import EvaluationSpec, PerplexitySpec, ZeroShotSpec
from modegpt.evaluation.tasks import load_tasks, task_fingerprint
from modegpt.evaluation.zeroshot import zeroshot
from modegpt.progress import Progress


@dataclass(frozen=True)
class ScoredText:
    """A text ready to score: ``token_ids`` (num_tokens,) int64, their sha256, and the window lengths.

    ``batch_tokens``: tokens in one forward pass.
    """

    source: str
    batch_tokens: int
    token_ids: Tensor
    sha256: str
    windows: list[int]


@dataclass(frozen=True)
class PreparedEvaluation:
    """Everything scoring needs apart from a model: loaded, tokenised and checked once, used for dense and compressed.

    ``encodings`` is filled by the first model scored: tokens by request, for the next model with this tokenizer.
    """

    tokenizer: PreTrainedTokenizerBase
    context: int
    text: ScoredText | None
    zeroshot: ZeroShotSpec | None
    tasks: dict[str, Any]
    encodings: dict = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to score."""
        return self.text is None and not self.tasks

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on apart from the model, JSON-able. Batch sizes are left out: they only round."""
        limit = self.zeroshot.limit if self.zeroshot else None
        return {
            "context": self.context,
            "text": {"source": self.text.source, "sha256": self.text.sha256, "windows": self.text.windows}
            if self.text
            else None,
            "tasks": {name: task_fingerprint(task, limit=limit) for name, task in self.tasks.items()},
            "limit": limit,
        }


def prepare_evaluation(
    spec: EvaluationSpec,
    *,
    tokenizer: PreTrainedTokenizerBase,
    model_config: PreTrainedConfig,
    documents: Documents | None = None,
) -> PreparedEvaluation:
    """Load the text and the tasks of ``spec`` and check them against the model.

    ``documents``: the text, if it is at hand; it is not loaded then.

    Raises UserError on unreadable files, unknown tasks or sources, a hub out of reach, a text shorter than one window,
    a window longer than the model's context, and a tokenizer with ids the model has no embedding for.
    """
    tokenizer = copy.deepcopy(tokenizer)  # the harness may give it a padding token
    context = int(model_config.max_position_embeddings)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has neither a BOS nor an EOS token; zero-shot scoring needs one to start from")
    tasks, text = {}, None
    if documents is None and spec.perplexity and spec.perplexity.source:
        documents = load_documents(spec.perplexity.source, path=spec.perplexity.path, split="test")
    if spec.zeroshot and spec.zeroshot.tasks:
        tasks = load_tasks(spec.zeroshot.tasks, data_path=spec.zeroshot.data_path, documents=documents)
    if spec.perplexity and documents is not None:
        text = _prepare_text(spec.perplexity, documents, tokenizer, model_config.vocab_size, context)
    return PreparedEvaluation(tokenizer=tokenizer, context=context, text=text, zeroshot=spec.zeroshot, tasks=tasks)


def _prepare_text(
    spec: PerplexitySpec, documents: Documents, tokenizer: PreTrainedTokenizerBase, vocab_size: int, context: int
) -> ScoredText:
    token_ids = tokenize_stream(documents, tokenizer)
    if token_ids.max() >= vocab_size:
        raise UserError(
            f"the tokenizer gives id {int(token_ids.max())} but the model's vocabulary has {vocab_size} entries; "
            "they do not belong together"
        )
    windows = resolve_windows(
        spec.windows,
        context=context,
        num_tokens=token_ids.numel(),
        what=spec.path or f"the {documents.source} test text",
    )
    return ScoredText(
        source=documents.source,
        batch_tokens=spec.batch_tokens,
        token_ids=token_ids,
        sha256=token_fingerprint(token_ids),
        windows=windows,
    )


def evaluate(
    model: PreTrainedModel,
    prepared: PreparedEvaluation,
    *,
    label: str,
    progress: Progress,
    score_windows: Callable[..., dict] = perplexity,
    begun: Begun | None = None,
) -> dict[str, dict]:
    """Score ``model``, which is put in evaluation mode; perplexities first, each said as ``label`` when known.

    ``score_windows`` is called as ``perplexity`` is. ``begun`` holds what an interrupted start scored, and gets what
    this one scores.

    Returns ``{"perplexity": {ppl_<source>_<window>: {...}}, "zeroshot": {task: {...}, "mean": {...}}}``; what is not
    asked for is empty. A task's entry is that of ``zeroshot``. A perplexity's is that of ``perplexity`` with
    ``num_tokens, tokens_sha256`` of the whole text.
    Raises UserError when the model gives NaN or infinite logits.
    """
    model.eval()
    begun = begun or Begun()
    with begun:
        return _evaluate(model, prepared, label=label, progress=progress, score_windows=score_windows, begun=begun)


def _evaluate(
    model: PreTrainedModel,
    prepared: PreparedEvaluation,
    *,
    label: str,
    progress: Progress,
    score_windows: Callable[..., dict],
    begun: Begun,
) -> dict[str, dict]:
    scores: dict[str, dict] = {"perplexity": {}, "zeroshot": {}}
    if prepared.text:
        text = prepared.text
        for window in text.windows:
            name = metric_name(text.source, window)
            before = " (scored before)" if name in begun.parts else ""
            result = begun.parts.get(name) or score_windows(
                model, text.token_ids, window=window, batch_tokens=text.batch_tokens, progress=progress, begun=begun
            )
            begun.note(name, result)
            progress.say(
                f"{label}: {name} = {result['value']:.4f} over {result['num_predicted_tokens']} tokens{before}"
            )
            scores["perplexity"][name] = result | {"num_tokens": text.token_ids.numel(), "tokens_sha256": text.sha256}
    if prepared.zeroshot and prepared.tasks:
        scores["zeroshot"] = zeroshot(
            model,
            prepared.tokenizer,
            prepared.tasks,
            batch_size=prepared.zeroshot.batch_size,
            max_length=prepared.context,
            limit=prepared.zeroshot.limit,
            encodings=prepared.encodings,
            progress=progress,
            begun=begun,
        )
    return scores


def retention(dense: dict[str, dict], compressed: dict[str, dict]) -> dict[str, dict[str, float | None]]:
    """How much of the dense scores is left.

    Returns ``zeroshot``: task (and ``"mean"``) -> compressed accuracy / dense accuracy, 1 is unharmed (None where
    dense scores 0); ``perplexity_increase``: metric -> compressed / dense perplexity, 1 is unharmed.
    """
    assert (
        dense["zeroshot"].keys() == compressed["zeroshot"].keys()
        and dense["perplexity"].keys() == compressed["perplexity"].keys()
    )
    accuracies = {
        name: (score["value"], compressed["zeroshot"][name]["value"])
        for name, score in dense["zeroshot"].items()
        if score.get("metric", "acc") in ACCURACIES
    }
    return {
        "zeroshot": {name: after / before if before else None for name, (before, after) in accuracies.items()},
        "perplexity_increase": {
            name: compressed["perplexity"][name]["value"] / score["value"]
            for name, score in dense["perplexity"].items()
        },
    }
