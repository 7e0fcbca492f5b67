"""The recipe learns, and is deterministic; its batches and schedule are what they say."""

import pytest
import torch

from tools.tiny_world import corpus
from tools.tiny_world.tokenizer import train_tokenizer
from tools.tiny_world.train import (
    ARCHITECTURES,
    RECIPES,
    Recipe,
    build_model,
    draw_batch,
    encode_documents,
    learning_rate,
    next_token_loss,
    train,
)

WINDOW = 32
MICRO = {
    "tiny-olmoe": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "num_experts": 4,
        "vocab_size": 512,
        "max_position_embeddings": WINDOW,
    },
    "tiny-qwen3": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
        "vocab_size": 512,
        "max_position_embeddings": WINDOW,
    },
    "tiny-llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
        "vocab_size": 512,
        "max_position_embeddings": WINDOW,
    },
    "tiny-opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "vocab_size": 512,
        "max_position_embeddings": WINDOW,
    },
}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return corpus.documents("train", num_documents=300)


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents, vocab_size=512, model_max_length=WINDOW, add_bos=True)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_twenty_steps_lower_the_loss_and_repeat_exactly(name, documents, tokenizer):
    ids, starts = encode_documents(documents, tokenizer)
    schedule = {"num_steps": 20, "batch_size": 8, "warmup_steps": 5, "cosine_steps": 30, "cooldown_steps": 5}
    recipe = Recipe(**schedule, balance=RECIPES[name].balance)
    architecture = {**ARCHITECTURES[name], **MICRO[name]}
    runs = []
    for _ in range(2):
        model = build_model(architecture, tokenizer, seed=recipe.seed)
        runs.append(train(model, ids, starts, recipe=recipe, window=WINDOW, log_every=0))
    assert runs[0] == runs[1]
    assert sum(runs[0][-5:]) / 5 < sum(runs[0][:2]) / 2 - 0.5


def test_uneven_use_of_experts_costs(tokenizer):
    model = build_model({**ARCHITECTURES["tiny-olmoe"], **MICRO["tiny-olmoe"]}, tokenizer, seed=0)
    batch = torch.arange(2 * WINDOW).view(2, WINDOW)
    with torch.no_grad():
        plain, even = next_token_loss(model, batch), next_token_loss(model, batch, balance=1.0)
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[:2] = 5 * layer.mlp.gate.weight.new_ones(2, 32)
        plain_uneven, uneven = next_token_loss(model, batch), next_token_loss(model, batch, balance=1.0)
    assert uneven - plain_uneven > even - plain > 1.9, "two experts a token: least where all are used alike"


def test_document_starts_are_where_documents_start(documents, tokenizer):
    ids, starts = encode_documents(documents, tokenizer)
    assert len(starts) == len(documents)
    for document, start in zip(documents[:50], starts[:50].tolist(), strict=True):
        expected = tokenizer(document, add_special_tokens=False).input_ids[:10]
        assert ids[start : start + len(expected)].tolist() == expected


def test_batches_are_windows_of_the_stream(documents, tokenizer):
    ids, starts = encode_documents(documents, tokenizer)

    def draw(share: float, bos: float) -> torch.Tensor:
        recipe = Recipe(batch_size=16, doc_start_share=share, bos_share=bos)
        generator = torch.Generator().manual_seed(1)
        return draw_batch(ids, starts, recipe=recipe, window=WINDOW, bos=tokenizer.bos_token_id, generator=generator)

    begins = {tuple(ids[s : s + WINDOW].tolist()) for s in starts.tolist()}
    assert all(tuple(row) in begins for row in draw(1.0, 0.0).tolist())
    anywhere = {tuple(window.tolist()) for window in ids.unfold(0, WINDOW, 1)}
    assert all(tuple(row) in anywhere for row in draw(0.0, 0.0).tolist())
    assert torch.equal(draw(0.0, 1.0)[:, 1:], draw(0.0, 0.0)[:, :-1])
    assert (draw(0.0, 1.0)[:, 0] == tokenizer.bos_token_id).all()


def test_learning_rate_warms_up_falls_and_cools_down():
    recipe = Recipe(
        num_steps=100,
        warmup_steps=10,
        cosine_steps=170,
        cooldown_steps=10,
        learning_rate=1.0,
        final_learning_rate_share=0.1,
    )
    rates = [learning_rate(step, recipe) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[90] == pytest.approx(0.55)
    assert rates[90:] == pytest.approx([0.55 * (10 - i) / 10 for i in range(10)])


def test_any_text_survives_the_tokenizer(tokenizer):
    text = "Zürich 東京 🦊\tx = 1;\r\n"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
