"""Text sources: what a document is, how documents become one stream, and what is refused."""

import gzip
import json
import os
import socket
import types
from pathlib import Path

import datasets
import pytest

from modegpt.data import hub, texts
from modegpt.data.texts import Documents, load_documents, read_rows, tokenize_stream
from modegpt.errors import UserError

ALPACA = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Sing.", "input": "", "output": "La"}]


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def hub_of(monkeypatch: pytest.MonkeyPatch, rows: list[dict]) -> list[tuple]:
    """Put ``rows`` behind load_dataset and return the list its calls are noted in."""
    calls: list[tuple] = []

    def load_dataset(repository: str, **kwargs) -> datasets.Dataset:
        calls.append((repository, kwargs))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_wikitext_file_equals_hub_rows(tmp_path, monkeypatch):
    rows = ["", " = Title = \n", "", " A line , with @-@ marks . \n", ""]
    path = write(tmp_path / "wiki.test.raw", " \n = Title = \n \n A line , with @-@ marks . \n \n")
    calls = hub_of(monkeypatch, [{"text": row} for row in rows])
    hub = load_documents("wikitext2", path=None, split="test")
    assert load_documents("wikitext2", path=path, split="test").joined() == hub.joined() == "\n\n".join(rows)
    assert calls == [("Salesforce/wikitext", {"split": "test", "name": "wikitext-2-raw-v1"})]


def test_wikitext_folder_is_read_by_split(tmp_path):
    for split in ("train.part", "valid", "test"):
        write(tmp_path / f"wiki.{split}.raw", f"{split}\n")
    firsts = [
        load_documents("wikitext2", path=str(tmp_path), split=split).texts[0]
        for split in ("calibration", "validation", "test")
    ]
    assert firsts == ["train.part\n", "valid\n", "test\n"]
    write(tmp_path / "wiki.test.copy", "again\n")
    with pytest.raises(UserError, match=r"wiki.test.copy, wiki.test.raw"):
        load_documents("wikitext2", path=str(tmp_path), split="test")


@pytest.mark.parametrize("lines", [True, False])
def test_alpaca_file_equals_hub(tmp_path, monkeypatch, lines):
    path = write(tmp_path / "alpaca.json", "\n".join(map(json.dumps, ALPACA)) if lines else json.dumps(ALPACA))
    calls = hub_of(monkeypatch, ALPACA)
    local, hub = (load_documents("alpaca", path=place, split="calibration") for place in (path, None))
    assert local.texts == hub.texts == ("Add.\n1 2\n3", "Sing.\nLa")
    assert calls == [("tatsu-lab/alpaca", {"split": "train"})]
    with pytest.raises(UserError, match="alpaca has no test split"):
        load_documents("alpaca", path=None, split="test")


def test_c4_from_hub_and_from_a_packed_shard(tmp_path, monkeypatch):
    rows = [{"text": "one"}, {"text": "two"}, {"text": "three"}]
    calls = hub_of(monkeypatch, rows)
    with gzip.open(tmp_path / "c4.json.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    local = load_documents("c4", path=str(tmp_path / "c4.json.gz"), split="calibration", max_documents=2)
    assert local.texts == load_documents("c4", path=None, split="calibration", max_documents=2).texts == ("one", "two")
    load_documents("c4", path=None, split="test")
    shards = [call[1]["data_files"]["train"] for call in calls]
    assert shards == ["en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"]


def test_tiny_reads_the_embedded_text(tmp_path, monkeypatch):
    path = tmp_path / "corpus.jsonl"
    write(path, '{"text": "A fox."}\n{"text": "A hen."}\n')
    asked = []
    monkeypatch.setattr(texts, "text_path", lambda split: asked.append(split) or path)
    assert load_documents("tiny", path=None, split="validation").joined() == "A fox.\n\nA hen."
    assert asked == ["validation"]
    with pytest.raises(UserError, match="takes no path"):
        load_documents("tiny", path="x.txt", split="test")


def test_text_file_is_one_document(tmp_path):
    assert load_documents("text", path=write(tmp_path / "a.txt", "a\n\nb\n"), split="test").texts == ("a\n\nb\n",)


def test_max_documents_stops_before_a_bad_row(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "ok"}\n{"words": 1}\n')
    assert len(load_documents("jsonl", path=path, split="test", max_documents=1)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "ok"}\n\n{"words": 1}\n', r"line 3 has no field 'text'; it has 'words'"),
        ('{"text": "ok"}\n{"text": 4}\n', r"line 2: field 'text' is int, not str"),
        ('{"text": "ok"}\nnot json\n', r"line 2 is not valid JSON"),
        ('{"text": "ok"}\n"a string"\n', r"line 2 is not a JSON object"),
        ('[{"text": "ok"}, {"words": 1}]', r"item 2 has no field 'text'"),
        ("", "no text in"),
        ('{"text": "ok"}\n' + '{"text":' * 50_000, r"line 2 is not a row of text: it is nested too deeply"),
        ('{"text": "ok"}\n{"text": "\\ud800 a"}\n', r"line 2 holds half of a character \(a lone surrogate"),
        ('{"text": "ok"}\n{"text": "a", "more": ["\\uDFFF"]}\n', r"line 2 holds half of a character"),
        ('{"text": " "}\n', "no text in"),
    ],
)
def test_bad_rows_are_named(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        load_documents("jsonl", path=write(tmp_path / "a.jsonl", content), split="test")


@pytest.mark.parametrize("wrong", [{"input": 5}, {"input": ["a"]}, {"output": None}, {"instruction": {}}])
def test_alpaca_entries_that_are_no_strings_are_named(tmp_path, wrong):
    path = write(tmp_path / "a.json", json.dumps([ALPACA[0], ALPACA[0] | wrong]))
    with pytest.raises(UserError, match=rf"item 2: field '{next(iter(wrong))}' is"):
        load_documents("alpaca", path=path, split="calibration")
    path = write(tmp_path / "b.json", json.dumps([ALPACA[0] | {"input": None}]))
    assert load_documents("alpaca", path=path, split="calibration").texts == ("Add.\n3",)


def test_a_byte_order_mark_is_no_text(tmp_path):
    rows = json.dumps({"text": "A \ud83e\udd8a fox."})
    for source, content in (("jsonl", rows), ("jsonl", f"[{rows}]"), ("text", "A fox."), ("wikitext2", "A fox.")):
        plain, marked = (
            load_documents(source, path=write(tmp_path / name, mark + content), split="test")
            for name, mark in (("plain", ""), ("marked", "\ufeff"))
        )
        assert plain == marked
    with gzip.open(tmp_path / "marked.gz", "wt", encoding="utf-8-sig") as file:
        file.write("A hen.")
    assert load_documents("text", path=str(tmp_path / "marked.gz"), split="test").texts == ("A hen.",)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for source in ("text", "jsonl", "wikitext2", "alpaca", "c4"):
        with pytest.raises(UserError, match="it is a pipe or a device, not a file"):
            load_documents(source, path=str(tmp_path / "pipe"), split="calibration")


def test_bad_files_are_named(tmp_path):
    for source in ("jsonl", "text", "wikitext2", "alpaca", "c4"):
        with pytest.raises(UserError, match=r"cannot read .*absent.*No such file"):
            load_documents(source, path=str(tmp_path / "absent"), split="calibration")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8 text"):
        load_documents("text", path=str(tmp_path / "latin"), split="test")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"abc" * 1000)[:20])
    with pytest.raises(UserError, match=r"cannot read .*cut.gz"):
        load_documents("text", path=str(tmp_path / "cut.gz"), split="test")
    with pytest.raises(UserError, match="needs a file"):
        load_documents("jsonl", path=None, split="test")
    with pytest.raises(UserError, match="unknown text source 'wiki'; choose one of tiny, wikitext2"):
        load_documents("wiki", path=None, split="test")


def test_unreachable_hub_says_how_to_pass_a_file():
    # the test session is offline (conftest), so this is the libraries' real refusal
    with pytest.raises(
        UserError, match=r"cannot load Salesforce/wikitext from the hub .*calibration=wikitext2 calibration.path=FILE"
    ):
        load_documents("wikitext2", path=None, split="test")


def test_hub_access_goes_offline_only_while_unreachable(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)

    def refuse(*args, **kwargs):
        raise socket.gaierror("no such name")

    monkeypatch.setattr(hub.socket, "create_connection", refuse)
    with hub.hub_access("x", "remedy"):
        assert huggingface_hub.constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    monkeypatch.setattr(
        hub.socket, "create_connection", lambda *args, **kwargs: types.SimpleNamespace(close=lambda: None)
    )
    with hub.hub_access("x", "remedy"):
        assert not huggingface_hub.constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
    with pytest.raises(RuntimeError), hub.hub_access("x", "remedy"):
        raise RuntimeError("not about the hub")
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_the_hub_s_reason_is_cut_between_words(monkeypatch):
    monkeypatch.setattr(hub, "_hub_answers", lambda endpoint: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    words = [f"word{number}" for number in range(100)]
    with pytest.raises(UserError) as raised, hub.hub_access("x", "remedy"):
        raise OSError(" ".join(words))
    reason = str(raised.value).removeprefix("cannot load x from the hub (").removesuffix(" ...); remedy")
    assert len(reason) < 300 and reason.split() == words[: len(reason.split())]


def test_rows_know_their_place(tmp_path):
    path = write(tmp_path / "a.jsonl", '\n{"text": "a"}\n')
    assert read_rows(path) == [(f"{path}, line 2", {"text": "a"})]


def test_stream_is_tokenised_once_with_one_bos(shared_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "stories260K")
    ids = tokenize_stream(Documents(source="x", texts=("One day.", "The end.")), tokenizer)
    assert ids.tolist() == tokenizer("One day.\n\nThe end.")["input_ids"]
    assert (ids == tokenizer.bos_token_id).sum() == 1


def test_streams_are_remembered_by_text_and_tokenizer(monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def words(*vocabulary):
        backend = Tokenizer(
            models.WordLevel({word: index for index, word in enumerate(("?", *vocabulary))}, unk_token="?")
        )
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")

    monkeypatch.setattr(texts, "_streams", {})
    said = Documents(source="x", texts=("a b", "a"))
    first, other = words("a", "b"), words("b", "a")
    assert tokenize_stream(said, first).tolist() == [1, 2, 1]
    assert tokenize_stream(said, other).tolist() == [2, 1, 2], "another tokenizer reads it its own way"
    tokenize_stream(said, first).zero_()
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", None)
    assert tokenize_stream(said, words("a", "b")).tolist() == [1, 2, 1], (
        "remembered, and not what a caller made of its copy"
    )
    monkeypatch.undo()
    monkeypatch.setattr(texts, "_streams", {})
    for number in range(2 * texts.REMEMBERED_STREAMS):
        tokenize_stream(Documents(source="x", texts=("a " * (number + 1),)), first)
    assert [stream.numel() for stream in texts._streams.values()] == list(
        range(texts.REMEMBERED_STREAMS + 1, 2 * texts.REMEMBERED_STREAMS + 1)
    )


def test_real_files_hold_what_is_published(shared_dir):
    data = shared_dir / "data"
    wiki = load_documents("wikitext2", path=str(data / "wikitext2"), split="test")
    assert len(wiki) == 4358 and len(wiki.joined().split()) == 241211
    assert len(load_documents("alpaca", path=str(data / "alpaca" / "alpaca_5000.json"), split="calibration")) == 5000
    assert len(load_documents("jsonl", path=str(data / "tinystories" / "eval_200.jsonl"), split="test")) == 200
