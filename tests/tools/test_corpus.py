"""The corpus is a pure function of its seed, the committed files are that function's value, and its grammar agrees."""

import re
from collections import Counter

import pytest

from modegpt.data.embedded import DATA_DIR, text_path
from tools.tiny_world import corpus
from tools.tiny_world import vocabulary as words
from tools.tiny_world.data_files import data_files
from tools.tiny_world.facts import ask, fill


@pytest.fixture(scope="module")
def training_documents() -> list[str]:
    return corpus.documents("train", num_documents=4000)


def test_documents_depend_on_seed_and_split_only():
    first = corpus.documents("train", num_documents=40)
    assert first == corpus.documents("train", num_documents=40)
    assert first == corpus.documents("train", num_documents=80)[:40]
    assert first != corpus.documents("train", num_documents=40, seed=corpus.SEED + 1)
    assert first != corpus.documents("validation", num_documents=40)
    assert corpus.documents("validation", num_documents=40) != corpus.documents("test", num_documents=40)


def test_committed_data_is_regenerated_byte_for_byte():
    expected = data_files()
    committed = {path.name: path.read_bytes() for path in DATA_DIR.iterdir()}
    assert committed == {name: content.encode() for name, content in expected.items()}


def test_committed_data_stays_small():
    assert text_path("train").stat().st_size < 2**20
    with pytest.raises(KeyError, match="train, validation, test"):
        text_path("dev")


def test_world_is_rich_and_its_facts_are_repeated_in_training(training_documents):
    facts = corpus.world_facts()
    assert sum(len(table) for table in facts.values()) > 1500
    said = Counter()
    for text in training_documents:
        subject = re.search(r"\b(" + "|".join(words.WOMEN + words.MEN) + r")\b", text)
        resolved = re.sub(r"(?<=\. )(She|He)\b", subject[1], text) if subject else text
        said.update(
            re.split(r"(?<=\.)\s", resolved)
        )  # a question with its answer is one piece, for it has one full stop
    share = corpus.NUM_DOCUMENTS["train"] / len(training_documents)
    for relation in ("town", "job", "habitat", "material"):
        counts = []
        for fact in facts[relation].values():
            statements = {fill(template, fact) for template in fact.relation.statements}
            answers = {f"{ask(fact, wording)} {fact.value}." for wording in range(len(fact.relation.questions))}
            counts.append(share * sum(said[piece] for piece in statements | answers))
        assert sorted(counts)[len(counts) // 2] >= 40


def test_two_hop_facts_follow_from_single_facts():
    facts = corpus.world_facts()
    for person, fact in facts["home_river"].items():
        assert fact.value == facts["river"][facts["town"][person].value].value


def test_documents_contradict_no_fact(training_documents):
    towns = corpus.world_facts()["town"]
    stated = [found for text in training_documents for found in re.findall(r"The home of (\w+) is in (\w+)\.", text)]
    assert len(stated) > 100
    assert all(towns[person].value == town for person, town in stated)


def test_grammar_agrees(training_documents):
    text = "\n".join(training_documents)
    assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text)
    for singular, plural in words.ANIMALS.items():
        assert not re.search(rf"\bThe {singular} (live|eat|feed|are)\b", text)
        if plural != singular:
            assert not re.search(rf"\b{plural.capitalize()} (lives|eats|feeds|is)\b", text)
    for base, third, past, _ in words.ACTIVITIES:
        assert not re.search(rf"Every morning \w+ (?!{third}\b){base}\b|will (?!{base}\b)({third}|{past})\b", text)


def test_pronouns_match_the_person():
    for text in corpus.documents("train", num_documents=3000):
        for name, pronoun in re.findall(r"^(\w+) [^.\n]*\. (She|He) ", text):
            if name in words.WOMEN + words.MEN:
                assert (pronoun == "She") == (name in words.WOMEN)
