"""Perplexity equals a loop over tokens in float64, whatever the batch, and refuses what it cannot score."""

import copy
import math

import pytest
import torch

from modegpt.data.texts import load_documents, tokenize_stream
from modegpt.errors import UserError
from modegpt.evaluation import likelihood
from modegpt.evaluation.perplexity import metric_name, perplexity, resolve_windows, token_fingerprint
from modegpt.progress import Progress

QUIET = Progress(quiet=True)


@pytest.fixture
def token_ids() -> torch.Tensor:
    return torch.randint(3, 98, (150,), generator=torch.Generator().manual_seed(1))


def naive_nll(model, token_ids: torch.Tensor, window: int) -> list[float]:
    """One token at a time, in float64: each predicted from those before it in its window alone."""
    exact = copy.deepcopy(model).double()
    losses = []
    for start in range(0, len(token_ids) - window + 1, window):
        for position in range(start + 1, start + window):
            logits = exact(token_ids[None, start:position]).logits[0, -1]
            losses.append(-(logits - logits.logsumexp(0))[token_ids[position]].item())
    return losses


@torch.inference_mode()
@pytest.mark.parametrize("window", [16, 50])
def test_equals_the_naive_loop(model, token_ids, window):
    losses = naive_nll(model, token_ids, window)
    result = perplexity(model, token_ids, window=window, batch_tokens=64, progress=QUIET)
    assert result["value"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert result["mean_nll"] == pytest.approx(math.log(result["value"]))
    assert (result["num_windows"], result["num_predicted_tokens"]) == (150 // window, len(losses))


@pytest.mark.parametrize("batch_tokens", [1, 32, 48, 10_000])
def test_batch_and_chunk_do_not_matter(model, token_ids, batch_tokens, monkeypatch):
    reference = perplexity(model, token_ids, window=16, batch_tokens=16, progress=QUIET)["value"]
    monkeypatch.setattr(likelihood, "CHUNK_ELEMENTS", 700)  # 7 rows at a time
    assert perplexity(model, token_ids, window=16, batch_tokens=batch_tokens, progress=QUIET)["value"] == pytest.approx(
        reference, rel=1e-6
    )


def test_tail_is_dropped(model, token_ids):
    whole = perplexity(model, token_ids[:144], window=16, batch_tokens=64, progress=QUIET)
    assert perplexity(model, token_ids, window=16, batch_tokens=64, progress=QUIET) == whole


def test_bfloat16_logits_are_reduced_in_float32(model, token_ids):
    low = copy.deepcopy(model).bfloat16()
    with torch.inference_mode():
        logits = low(token_ids[None, :16]).logits[0, :-1]
    expected = -logits.double().log_softmax(-1).gather(1, token_ids[1:16, None]).mean()
    result = perplexity(low, token_ids[:16], window=16, batch_tokens=16, progress=QUIET)
    assert result["mean_nll"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_are_refused(model, token_ids, bad):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[5] = bad
    with pytest.raises(UserError, match="NaN or infinite while scoring perplexity on windows of 16"):
        perplexity(broken, token_ids, window=16, batch_tokens=64, progress=QUIET)


def test_a_perplexity_beyond_any_number_is_refused_and_the_largest_is_not(model, token_ids, monkeypatch):
    """1.8e308 is the largest float64: e^709.8."""
    for nats, fits in ((709, True), (710, False)):
        monkeypatch.setattr(
            "modegpt.evaluation.perplexity.token_log_likelihoods",
            lambda logits, targets, what, nats=nats: torch.full((len(targets),), -float(nats)),
        )
        if fits:
            assert perplexity(model, token_ids, window=16, batch_tokens=64, progress=QUIET)["mean_nll"] == nats
            continue
        with pytest.raises(UserError, match="the perplexity overflows: 710 nats a token on windows of 16"):
            perplexity(model, token_ids, window=16, batch_tokens=64, progress=QUIET)


CONTEXTS = [(256, [256]), (2048, [2048]), (3000, [2048, 3000]), (4096, [2048, 4096]), (131072, [2048, 4096])]


@pytest.mark.parametrize(("context", "expected"), CONTEXTS)
def test_auto_windows(context, expected):
    assert resolve_windows("auto", context=context, num_tokens=10**6, what="text") == expected


def test_windows_that_do_not_fit_are_refused():
    assert resolve_windows([512, 8192, 512], context=8192, num_tokens=10**6, what="text") == [512, 8192]
    with pytest.raises(UserError, match=r"512 tokens is longer than the model's context of 256"):
        resolve_windows([512], context=256, num_tokens=10**6, what="text")
    for windows in ("auto", [256]):
        with pytest.raises(UserError, match=r"a.txt holds 255 tokens, less than one window of 256"):
            resolve_windows(windows, context=256, num_tokens=255, what="a.txt")


def test_names_and_fingerprints_separate(token_ids):
    assert metric_name("wikitext2", 2048) == "ppl_wikitext2_2048"
    changed = token_ids.clone()
    changed[-1] += 1
    assert token_fingerprint(token_ids) == token_fingerprint(token_ids.int()) != token_fingerprint(changed)


def test_real_model_reads_stories_well(shared_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = shared_dir / "models" / "stories260K"
    stories = load_documents(
        "jsonl", path=str(shared_dir / "data" / "tinystories" / "eval_200.jsonl"), split="test", max_documents=30
    )
    token_ids = tokenize_stream(stories, AutoTokenizer.from_pretrained(directory))
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    # 4.04 story by story; packed windows begin mid-story
    assert 3.8 < perplexity(model, token_ids, window=512, batch_tokens=4096, progress=QUIET)["value"] < 5.0
