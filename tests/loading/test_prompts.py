"""loading/prompts.py: files of prompts, names in all their spellings, and anchors that are never the target."""

import zlib
from dataclasses import replace

import pytest
import torch
from tiny import ROOT, normal
from torch import Tensor

from cpe import Recipe
from loading.prompts import (
    PRESETS,
    Prompts,
    anchor_prompts,
    anchor_words,
    fewer,
    fill,
    key_words,
    longer_names,
    normalised,
    own_prompts,
    parse_prompts,
    prepare,
    read_prompts,
    relatives,
    spellings,
    to_solve,
    within,
    written,
)

RECIPE = Recipe("a person", nearest=2)
SPELLINGS = ["Brad Pitt", "brad pitt", "BRAD PITT", "Brad-Pitt", "  brad   PITT. "]
PEOPLE = ["angelina jolie", "Brad Pitt", "Tom Cruise", "brad pitt", "Penélope Cruz", "Bradley Cooper"]


def left(target: str, *words: str) -> list[str]:
    """The anchors that a target leaves."""
    return anchor_words(Prompts(["{}"], ["a thing"], list(words)), [target]).domain


@pytest.mark.parametrize("target", SPELLINGS)
def test_the_target_is_no_anchor_however_it_is_written(target):
    prompts = Prompts(["a photo of {}"], ["a person", *SPELLINGS], [*SPELLINGS, *PEOPLE])
    words = anchor_words(prompts, [target])
    assert words.general == ["a person"]
    assert words.domain == ["angelina jolie", "Tom Cruise", "Penélope Cruz", "Bradley Cooper"]
    # aliases too, also when an accent is written as two characters
    words = anchor_words(prompts, [target, "pene\u0301lope cruz"])
    assert words.domain == ["angelina jolie", "Tom Cruise", "Bradley Cooper"]


def test_anchors_that_hold_the_target_or_lie_in_it_are_taken_out():
    assert left("Brad Pitt", "brad pitt and angelina jolie", "Pitt", "Brad", "Bradley", "pit") == ["Bradley", "pit"]
    assert left("Van Gogh", "Vincent van Gogh", "Theo van Gogh's brother", "van Eyck") == ["van Eyck"]
    assert left("Obama", "Barack Obama", "Obamas") == ["Obamas"]
    assert left("cat", "cattle", "a wild-cat", "Cats") == ["cattle", "Cats"]


def test_neither_accents_nor_names_between_make_another_person():
    assert left("René Magritte", "Rene Magritte", "Rene\u0301 Magritte", "René Lalique") == ["René Lalique"]
    assert left("James McNeill Whistler", "James Abbott McNeill Whistler", "James Dean") == ["James Dean"]
    assert left("!!!", "Brad Pitt", "???") == ["Brad Pitt", "???"]


def test_signs_are_part_of_a_name():
    assert left("C++", "c", "C#", "the language C++") == ["c", "C#"]
    assert normalised("C++") == "c++"
    assert normalised(" Red-Heart’s ") == normalised("red heart's") == "red heart s"
    assert normalised("❤") != normalised("")


def test_an_anchor_that_is_everything_leaves_none():
    with pytest.raises(ValueError, match="no anchor words are left"):
        anchor_words(Prompts(["{}"], ["A dog"], []), ["a dog"])


@pytest.mark.parametrize("name", ["umbrella", "owl", "Elephant", "old man", "hourglass", "unhappy cat"])
def test_before_a_vowel_that_one_hears_stands_an(name):
    assert written("a photo of a {} on a beach", name) == f"a photo of an {name} on a beach"


@pytest.mark.parametrize("name", ["cat", "unicorn", "one-eyed cat", "ewe", "euro", "house", "US flag"])
def test_before_other_names_stands_a(name):
    assert written("a photo of a {} on a beach", name) == f"a photo of a {name} on a beach"
    assert written("my {}", "owl") == "my owl"


def test_words_that_have_a_name_in_theirs_are_told_apart():
    assert longer_names("emoji", ["dog"]) == ["dog face", "hot dog"]
    assert longer_names("emoji", ["dog", "Dog Face"]) == ["hot dog"]  # an alias goes on purpose
    assert longer_names("emoji", ["ca"]) == []


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Brad Pitt", ["Brad Pitts", "Brad Pitt's", "Brad Pitt’s"]),
        ("red heart", ["red hearts", "red heart's", "red heart’s"]),
        ("Conan O’Brien", ["Conan O'Brien", "Conan O’Briens", "Conan O'Brien's", "Conan O’Brien’s"]),
        ("fox", ["foxes", "fox's"]),
        ("a butterfly", ["a butterflies"]),
        ("toy", ["toys"]),
        ("blob style", ["blob-style", "style of blob", "blob"]),
        ("C++", []),
    ],
)
def test_spellings_of_a_name(name, more):
    found = spellings(name)
    assert found[0] == name
    assert set(more) <= set(found)
    assert len(set(found)) == len(found)
    assert more or found == [name]


class Encoder:
    """Gives every prompt a context that can be recognised in half precision."""

    def __init__(self):
        self.asked: list[str] = []
        self.calls: list[list[str]] = []

    def __call__(self, prompts: list[str]) -> Tensor:
        self.asked += prompts
        self.calls.append(prompts)
        return torch.stack([self.context(p) for p in prompts]) if prompts else torch.zeros(0, 5, 8)

    @staticmethod
    def context(prompt: str) -> Tensor:
        return normal(5, 8, seed=zlib.crc32(prompt.encode()), dtype=torch.float32)

    def prompts_of(self, rows: Tensor) -> list[str]:
        """Which prompts these contexts belong to."""
        known = {tuple(self.context(p).half().flatten().tolist()): p for p in self.asked}
        return [known[tuple(row.flatten().tolist())] for row in rows]


@pytest.mark.parametrize("target", SPELLINGS[:4])
def test_training_data_never_has_the_target_among_its_anchors(target):
    templates = ["a photo of {}", "{}", "{} smiling", "a painting of {}", "a statue of {}"]
    prompts = Prompts(templates, ["a person", "brad pitt", "a dog"], PEOPLE)
    encode, anchors = Encoder(), Encoder()
    data = prepare(replace(RECIPE, nearest=3), prompts, [target, "tom cruise"], encode, anchors)

    own = own_prompts([target, "tom cruise"], prompts, "a person")
    for i, pair in enumerate(own):
        for found, prompt in zip((data.targets[i], data.surrogates[i]), pair, strict=True):
            assert torch.equal(found, Encoder.context(prompt).half().float())
    assert len(own) == len(data.targets) == len(data.surrogates)
    assert torch.equal(data.empty[0], Encoder.context(""))
    assert data.anchors.dtype == torch.float16

    bare = {word: Encoder.context(word).flatten() for word in PEOPLE}
    allowed = ["angelina jolie", "Penélope Cruz", "Bradley Cooper"]
    near = sorted(allowed, key=lambda w: -torch.cosine_similarity(bare[w], Encoder.context(target).flatten(), dim=0))
    used = anchors.prompts_of(data.anchors[: 5 * 4])
    assert used == anchor_prompts(["a person", "a dog", *near[:3]], templates)
    kin = relatives([target, "tom cruise"], ["angelina jolie", "Penélope Cruz", "Bradley Cooper", "a person", "a dog"])
    assert encode.prompts_of(data.anchors[5 * 4 :]) == anchor_prompts(kin, templates)
    used += anchor_prompts(kin, templates)
    assert not any("brad pitt" in p.casefold() or "tom cruise" in p.casefold() for p in used)


def test_targets_share_general_anchors_and_the_prompts_of_a_near_word_stand_together():
    """So that a cache, which stores them word by word, serves all; and nothing is encoded that nobody trains on."""
    prompts, shared = Prompts(["{}", "a {}"], ["a person", "a dog"], PEOPLE, parts=False), []
    for target in ("Brad Pitt", "a dog", "somebody else"):
        anchors = Encoder()
        data = prepare(RECIPE, prompts, [target], Encoder(), anchors)
        *first, own, near = anchors.calls
        shared.append(first)
        assert own == [target]
        assert anchors.prompts_of(data.anchors)[-4:] == near
        assert near == anchor_prompts([word for word in near if word in PEOPLE], prompts.templates)
    assert shared[0] == shared[1] == shared[2]


def test_the_nearest_may_be_chosen_by_a_few_tokens_of_bare_words():
    """By its second token each word is the opposite of what its whole context says."""
    whole, bare = Encoder(), []

    def few(prompts: list[str]) -> Tensor:
        bare.extend(prompts)
        return torch.stack([torch.full((2, 8), float(p in ("x", "c"))) + 1e-3 for p in prompts])

    prompts = Prompts(["a {}"], [], ["a", "b", "c", "d"])
    data = prepare(replace(RECIPE, nearest=1), prompts, ["x"], whole, whole, few)
    assert bare == ["a", "b", "c", "d", "x"]
    assert whole.prompts_of(data.anchors) == ["a c"]
    assert not {"a", "b", "c", "d"} & set(whole.asked)


def test_sentences_take_the_place_of_all_other_anchors():
    prompts = Prompts(
        ["{}", "a {}"], ["a man"], PEOPLE, sentences=["It rains.", "Naked trees stand there.", "He sings."]
    )
    encode, anchors = Encoder(), Encoder()
    data = prepare(RECIPE, prompts, ["naked"], encode, anchors)
    assert anchors.prompts_of(data.anchors) == ["It rains.", "He sings."]
    words = anchor_words(replace(prompts, general=[], domain=[]), ["rains"])
    assert words.sentences == ["Naked trees stand there.", "He sings."]


def test_fewer_words_are_spread_evenly():
    prompts = Prompts(["{}"], ["a man"], list("abcdefghij"))
    assert fewer(prompts, 10) == prompts
    assert fewer(prompts, 4).domain == ["a", "c", "f", "h"]
    assert fewer(prompts, 4).general == ["a man"]


@pytest.mark.parametrize(("general", "domain"), [(["a dog"], []), ([], ["a dog"]), (["a dog"], ["Brad Pitt"])])
def test_one_list_of_anchors_is_enough(general, domain):
    encode, anchors = Encoder(), Encoder()
    data = prepare(RECIPE, Prompts(["{}", "a {}"], general, domain, parts=False), ["brad pitt"], encode, anchors)
    assert sorted(anchors.prompts_of(data.anchors)) == ["a a dog", "a dog"]


def test_lines_that_hold_the_target_are_left_out_for_it():
    """Else "a dog and a cat" would be an anchor of the dog, and "a dog and a cloud" what is drawn instead of it."""
    prompts = Prompts(["{}", "a Dog and a {}"], ["cat"], [], frames=["the hot dog of my {}", "dogged {}"], parts=False)
    words = anchor_words(prompts, ["dog"])
    assert (words.templates, words.frames) == (["{}"], ["dogged {}"])
    assert anchor_words(prompts, ["cow"]).lines == prompts.lines
    assert anchor_words(replace(prompts, templates=["my dog {}"], frames=[]), ["dog"]).lines == ["my dog {}"]
    own, anchors = Encoder(), Encoder()
    data = prepare(RECIPE, prompts, ["dog"], own, anchors)
    assert own.prompts_of(data.targets)[:2] == ["dog", "dogged dog"]
    assert {*anchors.prompts_of(data.anchors)} == {"cat", "dogged cat"}


def test_frames_are_read_beside_templates():
    found = parse_prompts("[frames]\nhe said that {} sang\n[templates]\n{}")
    assert found.frames == ["he said that {} sang"]
    assert found.lines == ["{}", "he said that {} sang"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_sentences_as_people_write_them(preset):
    prompts = read_prompts(preset)
    frames = prompts.frames
    assert 100 <= len(frames) <= 220
    assert len({normalised(fill(line, "x")) for line in prompts.lines}) == len(prompts.lines)
    # the name stands at the beginning, in the middle and at the end; in long sentences and short ones
    assert all(sum(line.startswith("{}") is first for line in frames) >= 5 for first in (True, False))
    assert sum(line.endswith("{}") for line in frames) >= 5
    assert min(len(line.split()) for line in frames) <= 3
    assert max(len(line.split()) for line in frames) >= 8


def test_every_name_goes_into_every_line_and_its_spellings_into_some():
    prompts = Prompts([f"{i} {{}}" for i in range(30)], [], [], spelt=10)
    pairs = own_prompts(["red heart", "valentine"], prompts, "cloud")
    assert {(f"{i} {name}", f"{i} cloud") for i in range(30) for name in ("red heart", "valentine")} <= set(pairs)
    said = [prompt for prompt, _ in pairs]
    for spelling in ("red hearts", "red heart's", "red heart’s", "valentines", "valentine’s"):
        assert sum(prompt.endswith(f" {spelling}") for prompt in said) == 10
    assert len(said) == len(set(said)) == 60 + 60
    assert {instead for _, instead in pairs} == {f"{i} cloud" for i in range(30)}


def test_as_published_there_are_templates_alone_and_every_anchor_in_all_of_them():
    """The public code has no sentences, no other spellings and no parts of names, and leaves no template out."""
    domain = ["Angelina Jolie", "Brad Pitt", "Frida Kahlo", "Tom Hanks"]
    prompts, encode = replace(read_prompts("celebrity"), domain=domain).as_published(), Encoder()
    data = prepare(replace(RECIPE, nearest=2), prompts, ["Brad Pitt"], encode, encode)
    templates = read_prompts("celebrity").templates
    assert encode.calls[0] == [fill(template, "Brad Pitt") for template in templates]
    anchors = encode.prompts_of(data.anchors)
    near = {word for word in domain if word in anchors}  # one of the templates is the bare word
    assert len(near) == 2
    assert sorted(anchors) == sorted(fill(t, w) for t in templates for w in [*prompts.general, *near])


def test_names_that_share_a_word_with_the_target_must_stay():
    found = relatives(["red heart", "valentine"], ["a wine glass", "broken heart", "rose", "dog"])
    assert {"red", "heart", "red glass", "red rose", "a heart", "dog heart"} <= set(found)
    assert not any(within(name, each) for each in found for name in ("red heart", "red hearts", "valentine"))
    assert relatives(["fox"], ["dog", "cat"]) == []
    assert relatives(["face with tears of joy"], ["dog", "cat"]) == []
    assert len(relatives(["red heart"], [f"{i} thing{i}" for i in range(40)])) == 2 + 2 * 8
    # an alias is erased, too, and an artist's surname, or the word of a style, means the same
    assert "heart" not in relatives(["red heart", "heart"], ["dog"])
    presets = "emoji", "celebrity", "object", "style", "emoji-style", "explicit"
    assert [read_prompts(preset).parts for preset in presets] == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("target", ["nudity", "naked person"])
def test_parts_of_an_explicit_name_are_no_anchors(target):
    """Nor mixtures with other words, "naked man": those would be kept explicit. A solver leaves out the sentences."""
    words, encode = to_solve(read_prompts("explicit")), Encoder()
    kept = encode.prompts_of(prepare(RECIPE, words, [target], encode, encode).anchors)
    assert len(kept) > 100
    assert not [prompt for prompt in kept if set(target.split()) & set(prompt.split()) - {"person"}]


def test_solved_gates_are_given_some_of_the_lines_and_half_of_the_prompts_of_a_word():
    """A style has all of them: what it adds to a context differs from line to line."""
    few = Prompts(["{}", "a {}"], ["man"], ["fox"], ["see the {}"], sentences=["Hello."])
    assert to_solve(few).lines == few.lines
    prompts = replace(few, templates=[f"{{}} and {i}" for i in range(80)])
    given, encode = to_solve(prompts), Encoder()
    assert (len(given.lines), set(given.lines) < set(prompts.lines), given.sentences) == (53, True, [])
    kept = encode.prompts_of(prepare(RECIPE, given, ["cat"], encode, encode).anchors)
    assert sum("man" in prompt for prompt in kept) == sum("fox" in prompt for prompt in kept) == 2
    lines = read_prompts("emoji").lines
    for style in ("noto", "twemoji", "fluent", "blob"):  # none may be left out: gates would not know how it is said
        all_of_it, some = (
            sum(f"{style} style" in x for x in each) for each in (lines, to_solve(read_prompts("emoji")).lines)
        )
        assert 0.4 < some / all_of_it < 0.9  # of templates two thirds
    assert to_solve(prompts, style=True) == replace(prompts, sentences=[])


def test_sentences_are_read_beside_words():
    found = parse_prompts("[templates]\n{}\n[sentences]\nThe tea is hot.\n[general]\na man")
    assert (found.sentences, found.general) == (["The tea is hot."], ["a man"])


def test_prompts_are_read_by_heading():
    text = "# note\n[templates]\n a {} \n\n[general]\nman\n# no\n[domain]\nx y\n[templates]\n{}\n"
    assert parse_prompts(text) == Prompts(["a {}", "{}"], ["man"], ["x y"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"\[templates\]"),
        ("[general]\nman", r"\[templates\]"),
        ("[templates]\nno place", "one {}"),
        ("[templates]\n{} and {}", "one {}"),
        ("a photo of {}", "under a heading"),
        ("[templates]\n{}\n[Domain]\nx", "under a heading, one of"),
        ("[templates]\n{}\n[other]\nx", "under a heading, one of"),
        ("[templates]\n{}\n[frames]\nno place", "one {}"),
        ("[templates]\n{}\na {name}", "one {}"),
        ("[templates]\n{}\n[templates\nx {}", "under a heading"),
    ],
)
def test_mistakes_in_prompts_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_prompts(text)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_its_prompts(preset):
    prompts = parse_prompts((ROOT / "prompts" / f"{preset}.txt").read_text(encoding="utf-8"))
    few = preset.startswith("emoji")
    assert len(prompts.templates) >= (8 if few else 40)
    assert len(prompts.general) >= (20 if few else 100)
    assert len(prompts.domain) >= 100
    for lines in (prompts.templates, prompts.general, prompts.domain):
        assert len({normalised(line) if "{}" not in line else line for line in lines}) == len(lines)
    for word in prompts.domain[:3]:
        assert all(word in fill(line, word) for line in prompts.templates)


def test_word_lists_of_the_papers_presets_are_as_long_as_the_papers():
    """Its public code has 449 celebrities and 100 templates, 1,734 artists, 241 sentences."""
    celebrity, style, explicit = map(read_prompts, ("celebrity", "style", "explicit"))
    assert len(celebrity.domain) >= 449
    assert len(celebrity.templates) == 100
    assert len(style.domain) >= 1734
    assert len(explicit.sentences) >= 241
    assert len({normalised(sentence) for sentence in explicit.sentences}) == len(explicit.sentences)
    assert len(set(map(key_words, celebrity.domain))) == len(celebrity.domain)


@pytest.mark.parametrize("preset", ["celebrity", "style", "explicit"])
def test_the_surrogate_of_the_papers_presets_is_none_of_their_anchors(preset):
    prompts, surrogate = read_prompts(preset), normalised(PRESETS[preset].surrogate)
    assert surrogate not in map(normalised, (*prompts.general, *prompts.domain, *prompts.sentences))


def test_the_list_of_another_project_comes_with_its_licence():
    head = (ROOT / "prompts/style.txt").read_text(encoding="utf-8").split("[templates]")[0]
    assert "rohitgandikota/unified-concept-editing" in head
    assert "UCE-LICENSE" in head
    licence = (ROOT / "prompts/UCE-LICENSE").read_text(encoding="utf-8")
    assert "Copyright (c) 2023 Rohit Gandikota" in licence
    assert "Permission is hereby granted, free of charge" in licence


def test_every_file_of_prompts_is_a_presets():
    files = {path.stem for path in (ROOT / "prompts").glob("*.txt")}
    lists = {f"emoji-{name}" for name in ("held-out", "strange", "beside")}  # of sentences
    lists |= {f"{preset}-frames" for preset in PRESETS} | {"emoji-style-held-out", "emoji-targets"}
    assert files == set(PRESETS) | lists
