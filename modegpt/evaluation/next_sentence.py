"""A zero-shot task made from any text: which of four sentences comes next.

For models whose text is far from the standard tasks, on which they guess. The text is that of the perplexity.
"""

import random
import re
from typing import Any

from modegpt.data.texts import Documents
from modegpt.errors import UserError

TASK = "next_sentence"
CONTEXT_SENTENCES = 2
NUM_CHOICES = 4
LEAST_WORDS = 4
"""Of a sentence to choose; shorter ones ("Yes, she did.") follow anything."""

SENTENCE = re.compile(r"\S.*?[.!?][\"'”\u2019)]*(?=\s|$)", re.DOTALL)


def next_sentence_rows(documents: Documents) -> list[dict[str, Any]]:
    """Rows of ``context`` (two sentences), ``choices`` (four) and ``gold`` (the index of the one that comes next).

    The other three choices answer rows of other documents. Each document is read three sentences at a time, so that
    no sentence is used twice. The wrong choices and the order are drawn with a fixed seed.
    Raises UserError where the text has too few documents of three sentences to choose from.
    """
    answered = []
    for number, text in enumerate(documents):
        sentences = [" ".join(sentence.split()) for sentence in SENTENCE.findall(text)]
        for start in range(0, len(sentences) - CONTEXT_SENTENCES, CONTEXT_SENTENCES + 1):
            *context, answer = sentences[start : start + CONTEXT_SENTENCES + 1]
            if len(answer.split()) >= LEAST_WORDS:
                answered.append((number, " ".join(context), answer))
    if len({number for number, _, _ in answered}) < NUM_CHOICES:
        raise UserError(
            f"evaluation.zeroshot.tasks: {TASK} needs a text of at least {NUM_CHOICES} documents "
            f"of {CONTEXT_SENTENCES + 1} sentences"
        )
    draw = random.Random(0)
    return [
        _row(context, answer, _others(draw, answered, number, answer), draw.randrange(NUM_CHOICES))
        for number, context, answer in answered
    ]


def _others(draw: random.Random, answered: list[tuple[int, str, str]], number: int, answer: str) -> list[str]:
    others: list[str] = []
    for _ in range(1000):
        theirs, _, other = draw.choice(answered)
        if theirs != number and other not in (answer, *others):
            others.append(other)
        if len(others) == NUM_CHOICES - 1:
            return others
    raise UserError(f"evaluation.zeroshot.tasks: {TASK} found too few different sentences in the documents of the text")


def _row(context: str, answer: str, others: list[str], gold: int) -> dict[str, Any]:
    return {"context": context, "choices": [*others[:gold], answer, *others[gold:]], "gold": gold}


def next_sentence_config() -> dict[str, Any]:
    """The task as lm-evaluation-harness has it, without its rows, which are its split ``test``."""
    return {
        "task": TASK,
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "context",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1.0},
    }
