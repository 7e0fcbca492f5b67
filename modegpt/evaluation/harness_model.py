"""A transformers model as lm-evaluation-harness sees it: same numbers as its own wrapper, less work, nothing hidden."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modegpt.errors import UserError
from modegpt.evaluation.begun import Begun
from modegpt.evaluation.likelihood import input_device, token_log_likelihoods

Encoded = tuple[list[int], list[int]]  # context tokens, continuation tokens


class HarnessModel(HFLM):
    """The harness's Hugging Face model with its own scoring of continuations.

    Compared with the wrapper it derives from: strings are tokenised once each, in one call, and the result is kept for
    the next model with the same tokenizer; requests with equal inputs share one forward pass; logits are made for
    the continuation only, reduced in float32 and summed in float64 whatever the model's dtype; requests cut to the
    context are counted; NaN is an error.

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
        sharing: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}  # input -> (request, tokens to predict)
        for index, (_, context, continuation) in enumerate(requests):
            tokens = (context + continuation)[-(self.max_length + 1) :]
            if continuation:
                sharing.setdefault(tuple(tokens[:-1]), []).append((index, continuation[-self.max_length :]))
        self.bar.total = (self.bar.total or 0) + sum(map(len, sharing))
        inputs = sorted(sharing, key=len, reverse=True)  # like lengths together: little padding
        self.num_calls += 1
        part = f"answers {self.num_calls}"
        answers: list[tuple[float, bool]] = self.begun.parts.get(part, [])
        position = 0
        for start in range(0, len(inputs), self.batch_size):
            batch = inputs[start : start + self.batch_size]
            groups = [sharing[tokens] for tokens in batch]
            indices = [index for group in groups for index, _ in group]
            if position == len(answers):
                answers += self._score_batch(batch, groups)
                self.begun.note(part, answers)
            for index in indices:
                results[index] = (answers[position][0], bool(answers[position][1]))
                position += 1
            self.bar.update(sum(map(len, batch)))
        return results

    def _score_batch(
        self,
        inputs: list[tuple[int, ...]],
        groups: list[list[tuple[int, list[int]]]],
    ) -> list[tuple[float, bool]]:
        """Score a batch.

        Args:
            inputs: token ids, the longest first.
            groups: for each input, (index of the request, continuation) of the requests that share it.

        Returns log-likelihood and whether the continuation is the greedy one, by request in the order of ``groups``.
        """
        width = len(inputs[0])
        # causal attention: what pads the right end changes nothing before it
        padded = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in inputs], device=self.device)
        longest = [max(len(continuation) for _, continuation in group) for group in groups]
        # the first position that a target is predicted from: no logits are made before it
        first = min(len(tokens) - count for tokens, count in zip(inputs, longest, strict=True))
        # (batch, width - first, vocabulary)
        logits = self.model(input_ids=padded, use_cache=False, logits_to_keep=width - first).logits
        rows: list[int] = []
        columns: list[int] = []
        targets: list[int] = []
        lengths: list[int] = []
        for row, (tokens, group) in enumerate(zip(inputs, groups, strict=True)):
            for _, continuation in group:
                rows += [row] * len(continuation)
                columns += range(len(tokens) - len(continuation) - first, len(tokens) - first)
                targets += continuation
                lengths.append(len(continuation))
        target_ids = torch.tensor(targets, device=logits.device)
        # (num_targets, vocabulary)
        picked = logits[torch.tensor(rows, device=logits.device), torch.tensor(columns, device=logits.device)]
        scores = token_log_likelihoods(picked, target_ids, what="zero-shot tasks").double().cpu()
        misses = (picked.argmax(-1) != target_ids).double().cpu()
        owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # which request a target belongs to
        totals, num_misses = (
            torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, owner, each) for each in (scores, misses)
        )
        return [(total, missed == 0) for total, missed in zip(totals.tolist(), num_misses.tolist(), strict=True)]
