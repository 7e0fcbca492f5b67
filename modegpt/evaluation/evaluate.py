"""Score a model on a text and on zero-shot tasks; what can be refused is refused before any forward pass."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modegpt.data.texts import Documents, load_documents
from modegpt.data.tokens import cut_windows, token_stream, window_bos
from modegpt.errors import UserError
from modegpt.evaluation.begun import Begun
from modegpt.evaluation.items import is_accuracy
from modegpt.evaluation.perplexity import metric_name, perplexity, resolve_windows, token_fingerprint
from modegpt.evaluation.spec import EvaluationSpec, PerplexitySpec, ZeroShotSpec
from modegpt.evaluation.tasks import load_tasks, task_commits, task_fingerprint
from modegpt.evaluation.zeroshot import zeroshot
from modegpt.files import json_sha256
from modegpt.models.families import family_name
from modegpt.progress import Progress


@dataclass(frozen=True)
class ScoredText:
    """A text ready to score: ``token_ids`` (num_tokens,) int64, their sha256, and the window lengths.

    ``batch_tokens``: tokens in one forward pass. ``bos``: the token in front of each window, where there is one.
    """

    source: str
    batch_tokens: int
    token_ids: Tensor
    sha256: str
    windows: list[int]
    bos: int | None = None

    def fingerprint(self) -> dict[str, Any]:
        """What the perplexities depend on, JSON-able; the field's custom about a BOS goes without saying."""
        habit = {} if self.bos is None else {"bos": "each_window"}
        return {"source": self.source, "sha256": self.sha256, "windows": self.windows, **habit}


@dataclass(frozen=True)
class PreparedEvaluation:
    """Everything scoring needs apart from a model: loaded, tokenised and checked once, used for dense and compressed.

    ``encodings`` is filled by the first model scored: tokens by request, for the next model with this tokenizer.
    ``commits``: of the hub's repositories that text and tasks are from, by name.
    """

    tokenizer: PreTrainedTokenizerBase
    context: int
    text: ScoredText | None
    zeroshot: ZeroShotSpec | None
    tasks: dict[str, Any]
    encodings: dict = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to score."""
        return self.text is None and not self.tasks

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on apart from the model, JSON-able. Batch sizes are left out: they only round."""
        limit = self.zeroshot.limit if self.zeroshot else None
        template = self.tokenizer.chat_template if self.zeroshot and self.zeroshot.apply_chat_template else None
        return {
            "context": self.context,
            "text": self.text.fingerprint() if self.text else None,
            "tasks": {name: task_fingerprint(task, limit=limit) for name, task in self.tasks.items()},
            "limit": limit,
            **({} if template is None else {"chat_template": json_sha256(template)}),
        }


def prepare_evaluation(
    spec: EvaluationSpec,
    *,
    tokenizer: PreTrainedTokenizerBase,
    model_config: PreTrainedConfig,
    documents: Documents | None = None,
    bos: str = "auto",
) -> PreparedEvaluation:
    """Load the text and the tasks of ``spec`` and check them against the model.

    ``documents``: the text, if it is at hand; it is not loaded then. ``bos``: see ``data.tokens.window_bos``.

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
        if spec.zeroshot.apply_chat_template and not tokenizer.chat_template:
            raise UserError("evaluation.zeroshot.apply_chat_template=true, but the tokenizer has no chat template")
        tasks = load_tasks(
            spec.zeroshot.tasks,
            data_path=spec.zeroshot.data_path,
            documents=documents,
            num_fewshot=spec.zeroshot.num_fewshot,
            run_code=spec.zeroshot.run_code,
        )
        if spec.zeroshot.apply_chat_template:
            tasks = {f"{name}_chat": task for name, task in tasks.items()}
    if spec.perplexity and documents is not None:
        first = window_bos(bos, family=family_name(model_config), tokenizer=tokenizer)
        text = _prepare_text(spec.perplexity, documents, tokenizer, model_config.vocab_size, context, first)
    commits = {} if documents is None else dict(documents.commits)
    for task in tasks.values():
        commits |= task_commits(task)
    return PreparedEvaluation(
        tokenizer=tokenizer, context=context, text=text, zeroshot=spec.zeroshot, tasks=tasks, commits=commits
    )


def _prepare_text(
    spec: PerplexitySpec,
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    context: int,
    bos: int | None,
) -> ScoredText:
    token_ids = token_stream(documents, tokenizer, vocab_size=vocab_size, bos=bos)[: spec.limit]
    windows = resolve_windows(
        spec.windows,
        context=context,
        num_tokens=token_ids.numel() + (bos is not None),  # which each window begins with
        what=spec.path or f"the {documents.source} test text",
    )
    return ScoredText(
        source=documents.source,
        batch_tokens=spec.batch_tokens,
        token_ids=token_ids,
        sha256=token_fingerprint(token_ids),
        windows=windows,
        bos=bos,
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
        return _evaluate(
            model, prepared, label=label, progress=progress.of(label), score_windows=score_windows, begun=begun
        )


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
            name = metric_name(text.source, window, bos=text.bos is not None)
            before = " (scored before)" if name in begun.parts else ""
            token_ids = cut_windows(text.token_ids, window, bos=text.bos).flatten()
            result = begun.parts.get(name) or score_windows(
                model, token_ids, window=window, batch_tokens=text.batch_tokens, progress=progress, begun=begun
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
            apply_chat_template=prepared.zeroshot.apply_chat_template,
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
        if is_accuracy(score)
    }
    return {
        "zeroshot": {name: after / before if before else None for name, (before, after) in accuracies.items()},
        "perplexity_increase": {
            name: compressed["perplexity"][name]["value"] / score["value"]
            for name, score in dense["perplexity"].items()
        },
    }
