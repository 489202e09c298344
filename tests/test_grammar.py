"""emoji/grammar.py: sentences name what they are about and nothing else; the files of sentences are what they say."""

import importlib.util
import random
import re

import pytest
from tiny import ROOT

from cli import check
from clip import Tokenizer

spec = importlib.util.spec_from_file_location("grammar", ROOT / "emoji" / "grammar.py")
grammar = importlib.util.module_from_spec(spec)
spec.loader.exec_module(grammar)
NAMES = tuple(grammar.names())
STYLES = ("noto", "twemoji", "fluent", "blob")


@pytest.fixture(scope="module")
def sentences():
    return grammar.Grammar(NAMES)


@pytest.mark.parametrize(
    ("name", "plural"),
    [
        ("crab", "crabs"),
        ("fox", "foxes"),
        ("baby", "babies"),
        ("monkey", "monkeys"),
        ("cherry blossom", "cherry blossoms"),
        ("pile of poo", "piles of poo"),
        ("smiling face with halo", "smiling faces with halo"),
        ("person wearing turban", "people wearing turban"),
        ("woman cook", "women cooks"),
        ("old man", "old men"),
        ("maple leaf", "maple leaves"),
        ("cherries", "cherries"),
    ],
)
def test_plurals(name, plural):
    assert grammar.plural(name) == plural


def test_of_names_within_names_the_longest_is_meant():
    text = "a cat face, cats and a dog; my cat’s hot dogs, no dogfish"
    assert grammar.mentions(text, NAMES) == ["cat face", "cat", "dog", "cat", "hot dog"]


def test_articles_fit():
    assert (
        grammar.fill("a {} and a {other} in a unicorn costume", "owl", "crab")
        == "an owl and a crab in a unicorn costume"
    )
    assert grammar.fill("a {}", "owl", articles=False) == "a owl"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sentences_name_their_thing_alone_and_say_style_and_background(sentences, count):
    chance = random.Random(0)
    for i in range(300):
        name = NAMES[i % len(NAMES)]
        text = sentences.sentence(chance, name, count=count, style="fluent", colour="blue")
        assert set(grammar.mentions(text, NAMES)) == {name}
        assert "fluent" in text
        assert "blue" in text


def test_sentences_name_two_things_in_their_order(sentences):
    chance = random.Random(0)
    for _ in range(300):
        left, right = chance.sample(NAMES, 2)
        text = sentences.sentence(chance, left, right)
        found = grammar.mentions(text, NAMES)
        assert found[0] == left
        assert right in found


def test_there_are_many_words(sentences):
    assert len(sentences.vocabulary()) >= 1500
    assert all(part in sentences.parts for text in sentences.parts.values() for part in grammar.parts_of(text))


def test_held_out_sentences_are_never_drawn():
    grammar_of_two = grammar.Grammar(NAMES, "[sentence]\na {} | my {}", held_out=["a {}"])
    assert {grammar_of_two.frame(random.Random(i)) for i in range(20)} == {"my {}"}


def test_files_of_sentences(sentences):
    """Held-out sentences are made of words that the model has read, strange ones hold some that it has not.

    Frames may name one other thing beside the {}, but none that the comparison erases, or keeps from all erasers.
    """
    files = {kind: grammar.frames(f"emoji-{kind}.txt") for kind in ("frames", "held-out", "strange", "beside")}
    everything = [frame for frames in files.values() for frame in frames]
    assert len(everything) == len(set(everything))
    assert [len(files[kind]) >= least for kind, least in (("frames", 150), ("held-out", 70), ("strange", 30))] == [
        True
    ] * 3
    known, spared = sentences.vocabulary(), {*NAMES[1::3], *grammar.frames("emoji-targets.txt")}
    for kind, frames in files.items():
        for frame in frames:
            text = re.sub(r"{\w*}", " ", frame)
            named = grammar.mentions(text, NAMES)
            assert not named or (kind == "frames" and len(named) == 1 and named[0] not in spared), frame
            assert ("{other}" in frame) == (kind == "beside"), frame
            unknown = grammar.words(text) - known - grammar.words(" ".join(named))
            assert (1 <= len(unknown) <= 3) if kind == "strange" else not unknown, (frame, unknown)


def test_check_tries_some_hundred_sentences_some_of_them_about_two_things():
    lines = check.held_out("emoji")
    assert 100 <= len(lines) <= 130
    assert all(line.count("{}") == 1 and "{other}" not in line for line in lines)
    assert "a yellow heart and a {} at the beach" in lines
    assert "watercolor of a {} and an eggplant, soft light" in lines


def test_the_tokenizer_has_read_these_words(sentences):
    tokenizer = Tokenizer(ROOT / "emoji" / "tokenizer" / "vocab.json", ROOT / "emoji" / "tokenizer" / "merges.txt")
    lengths = [len(tokenizer.ids(word)) for word in sentences.vocabulary()]
    assert sum(length <= 2 for length in lengths) > 0.55 * len(lengths)
    assert all(len(tokenizer.ids(word)) == 1 for word in STYLES)
