"""A transformers model as lm-evaluation-harness sees it: same numbers as its own wrapper, less work, nothing hidden."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modegpt.errors import UserError
from modegpt.evaluation.begun import Begun
from modegpt.evaluation.likelihood import input_device, token_log_likelihoods
from modegpt.models.families import FAMILIES, family_name

Encoded = tuple[list[int], list[int]]  # context tokens, continuation tokens
Tokens = tuple[int, ...]
Sharing = dict[Tokens, list[tuple[int, list[int]]]]  # input -> (index of a request, tokens to predict), of its requests


@dataclass(frozen=True)
class Row:
    """Inputs that have their first ``start`` tokens in common, as one sequence: these once, then the rest of each.

    All that is predicted is predicted from the rest.
    """

    start: int
    inputs: list[Tokens]

    def __len__(self) -> int:
        """How many tokens it has."""
        return self.start + sum(len(tokens) - self.start for tokens in self.inputs)

    @property
    def tokens(self) -> list[int]:
        """The tokens in order."""
        return [*self.inputs[0][: self.start], *(token for tokens in self.inputs for token in tokens[self.start :])]

    @property
    def positions(self) -> list[int]:
        """Where each token stands in its input."""
        return [
            *range(self.start),
            *(position for tokens in self.inputs for position in range(self.start, len(tokens))),
        ]

    @property
    def owners(self) -> list[int]:
        """The input that each token is of, from 1; 0 for those of all."""
        lengths = [len(tokens) - self.start for tokens in self.inputs]
        return [0] * self.start + [owner for owner, length in enumerate(lengths, 1) for _ in range(length)]


class HarnessModel(HFLM):
    """The harness's Hugging Face model with its own scoring of continuations.

    Compared with the wrapper it derives from: strings are tokenised once each, in one call, and the result is kept for
    the next model with the same tokenizer; requests with equal inputs share one forward pass, and those with a common
    context one pass over it; logits are made for continuations only, reduced in float32 and summed in float64
    whatever the model's dtype; requests cut to the model's context are counted; NaN is an error.

    Attributes:
        num_truncated: task name -> requests longer than the context, cut from the left (as the harness does).
        encodings: (context, continuation) -> tokens, shared between models that share a tokenizer.
        bar: a progress bar that counts input tokens.
        begun: where the answers of each call are kept in the order of its batches, and taken from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        max_length: int,
        encodings: dict[tuple[str, str], Encoded],
        bar: Any,
        begun: Begun,
    ) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length
        )
        self._device = input_device(model)
        self.num_truncated: Counter[str] = Counter()
        self.encodings = encodings
        self.bar = bar
        self.begun = begun
        self.num_calls = 0
        self.longest_beside = _longest_beside(model)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's continuation after its context, and whether it is the greedy one."""
        pairs = [request.args for request in requests]
        self._encode(pairs)
        encoded = [(pair, *self.encodings[pair]) for pair in pairs]
        for request, (_, context, continuation) in zip(requests, encoded, strict=True):
            self.num_truncated[request.task_name] += len(context) + len(continuation) > self.max_length + 1
        return self._loglikelihood_tokens(encoded)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """The harness's own, without its bar."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """The harness's own, its bar ours; prompts cut to leave room for the answer are counted.

        Raises UserError for an answer that may be as long as the context.
        """
        for request in requests:
            prompt, options = request.args
            longest = options.get("max_gen_toks", self.max_gen_toks)
            if longest >= self.max_length:
                raise UserError(
                    f"task {request.task_name!r} lets a model write {longest} tokens, "
                    f"this one's context is {self.max_length}"
                )
            length = len(self.tok_encode(prompt))
            self.num_truncated[request.task_name] += length > self.max_length - longest
            self.bar.total = (self.bar.total or 0) + min(length, self.max_length - longest)
        self.num_calls += 1
        part = f"answers {self.num_calls}"
        if part not in self.begun.parts:
            self.begun.note(part, super().generate_until(requests, disable_tqdm=True))
        return self.begun.parts[part]

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        """The harness's own; tells the bar."""
        written = super()._model_generate(context, max_length, stop, **options)
        self.bar.update(int(options["attention_mask"].sum()))
        return written

    def _encode(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Tokenise what is new in ``pairs``.

        A continuation's tokens are those that context and continuation together have beyond the context's own.
        """
        moved = {}
        for pair in dict.fromkeys(pairs):
            if pair not in self.encodings:
                context = pair[0].rstrip()
                moved[pair] = (context, pair[0][len(context) :] + pair[1])  # trailing spaces belong to the next word
        pieces = [
            text for context, continuation in moved.values() if context for text in (context, context + continuation)
        ]
        texts = list(dict.fromkeys(pieces))
        tokens = dict(zip(texts, self._tokenize(texts), strict=True))
        for pair, (context, continuation) in moved.items():
            if context:
                start = tokens[context]
                self.encodings[pair] = (start, tokens[context + continuation][len(start) :])
            else:
                self.encodings[pair] = self._encode_alone(continuation)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        bos = self.tokenizer.bos_token
        if bos and any(text.startswith(bos) for text in texts):
            return [self.tok_encode(text) for text in texts]  # which adds no second BOS
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        backend.no_truncation()  # what an earlier caller may have left behind
        backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(texts)]  # fast: makes no offsets into the text

    def _encode_alone(self, continuation: str) -> Encoded:
        """Without a context the first token is predicted from BOS (EOS where there is none)."""
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        return (tokens[:1], tokens[1:]) if tokens[:1] == [self.prefix_token_id] else ([self.prefix_token_id], tokens)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Summed log-likelihood of each continuation, and whether it is the greedy one.

        A request that does not fit the context keeps its last ``max_length`` predicted tokens. An empty continuation
        scores 0.
        """
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        sharing: Sharing = {}
        for index, (_, context, continuation) in enumerate(requests):
            tokens = (context + continuation)[-(self.max_length + 1) :]
            if continuation:
                sharing.setdefault(tuple(tokens[:-1]), []).append((index, continuation[-self.max_length :]))
        rows = self._rows(sharing)
        self.bar.total = (self.bar.total or 0) + sum(map(len, rows))
        self.num_calls += 1
        part = f"rows {self.num_calls}"
        answers: list[tuple[float, bool]] = self.begun.parts.get(part, [])
        position = 0
        for batch in self._batches(rows):
            indices = [index for row in batch for tokens in row.inputs for index, _ in sharing[tokens]]
            if position == len(answers):
                answers += self._score_batch(batch, sharing)
                self.begun.note(part, answers)
            for index in indices:
                results[index] = (answers[position][0], bool(answers[position][1]))
                position += 1
            self.bar.update(sum(map(len, batch)))
        return results

    def _rows(self, sharing: Sharing) -> list[Row]:
        """All inputs, those with a context in common side by side; first such rows, then single inputs.

        The longest come first: like lengths together, little padding.
        """
        inputs_of: dict[Tokens, list[Tokens]] = {}
        for tokens, group in sharing.items():
            start = len(tokens) - max(len(continuation) for _, continuation in group)
            inputs_of.setdefault(tokens[:start], []).append(tokens)
        rows = []
        for context, inputs in inputs_of.items():
            row = Row(len(context), [])
            for tokens in inputs:
                if row.inputs and not self._fits(row, tokens):
                    rows.append(row)
                    row = Row(len(context), [])
                row.inputs.append(tokens)
            rows.append(row)
        return sorted(rows, key=lambda row: (len(row.inputs) > 1, len(row)), reverse=True)

    def _fits(self, row: Row, tokens: Tokens) -> bool:
        """Whether one more input of its context may stand in ``row``, which gets no longer than the model's context."""
        return (
            row.start > 0
            and len(row.inputs) < self.batch_size
            and len(row) + len(tokens) - row.start <= self.max_length
            and max(map(len, (*row.inputs, tokens))) <= self.longest_beside
        )

    def _batches(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Rows of up to ``batch_size`` inputs together, in order; single inputs are among themselves."""
        batch: list[Row] = []
        for row in rows:
            full = sum(len(each.inputs) for each in [*batch, row]) > self.batch_size
            if batch and (full or (len(row.inputs) == 1 < len(batch[0].inputs))):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _score_batch(self, rows: list[Row], sharing: Sharing) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation and whether it is the greedy one, in the order of rows and ``sharing``.

        The longest row comes first.
        """
        width = len(rows[0])
        # causal attention: what pads the right end changes nothing before it
        padded = self._padded([row.tokens for row in rows], width)
        # the first position that a target is predicted from: no logits are made before it
        first = min(row.start for row in rows)
        # (batch, width - first, vocabulary)
        logits = self.model(
            input_ids=padded, use_cache=False, logits_to_keep=width - first, **self._apart(rows, width)
        ).logits
        places: list[int] = []
        columns: list[int] = []
        targets: list[int] = []
        lengths: list[int] = []
        for place, row in enumerate(rows):
            end = row.start - first
            for tokens in row.inputs:
                end += len(tokens) - row.start
                for _, continuation in sharing[tokens]:
                    places += [place] * len(continuation)
                    columns += range(end - len(continuation), end)
                    targets += continuation
                    lengths.append(len(continuation))
        target_ids = torch.tensor(targets, device=logits.device)
        # (num_targets, vocabulary)
        picked = logits[torch.tensor(places, device=logits.device), torch.tensor(columns, device=logits.device)]
        scores = token_log_likelihoods(picked, target_ids, what="zero-shot tasks").double().cpu()
        misses = (picked.argmax(-1) != target_ids).double().cpu()
        owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # which request a target belongs to
        totals, num_misses = (
            torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, owner, each) for each in (scores, misses)
        )
        return [(total, missed == 0) for total, missed in zip(totals.tolist(), num_misses.tolist(), strict=True)]

    def _apart(self, rows: list[Row], width: int) -> dict[str, Tensor]:
        """A mask that keeps the inputs of a row apart, and the positions of their tokens; nothing for single inputs."""
        if all(len(row.inputs) == 1 for row in rows):
            return {}
        owner = self._padded([row.owners for row in rows], width).unsqueeze(1)  # (batch, 1, width)
        seen = (owner == 0) | (owner == owner.mT)  # (batch, width, width): by the row's token, of the column's
        mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=self.device)
        mask.masked_fill_(~seen.tril(), torch.finfo(mask.dtype).min)
        return {
            "attention_mask": mask.unsqueeze(1),
            "position_ids": self._padded([row.positions for row in rows], width),
        }

    def _padded(self, lists: list[list[int]], width: int) -> Tensor:
        """``lists`` as one tensor, with zeros at the right end of what is shorter than ``width``."""
        return torch.tensor([[*each, *[0] * (width - len(each))] for each in lists], device=self.device)


def _longest_beside(model: PreTrainedModel) -> float:
    """The longest input that may stand beside others in a row: 0 where it is not known that ``model`` can do this.

    A mask of all layers knows no sliding window.
    """
    config = model.config
    if family_name(config) not in FAMILIES or config._attn_implementation not in ("sdpa", "eager"):
        return 0
    return getattr(config, "sliding_window", None) or float("inf")
