"""Words that a model does not know, and prompts that have such words."""

import json

import pytest
from material import TOKENIZER, make_model, result_of

import data
import eval as evaluation
from data import words_to_tiktoken
from scripts import scenes


def trained_on(n, **counts):
    """A small model, whose training had n captions, and so many with each of these words."""
    model = make_model()
    model.num_captions += n
    model.token_counts += n
    for word, count in counts.items():
        model.token_counts[TOKENIZER.encode(word)] = count
    return model


CLIP = data.Tokenizer.from_file("clip")
NOT_THERE = "not in the vocabulary"
# A model, and what is to be said of the words that it does not know
UNKNOWN = {
    "only a vocabulary": (None, {"teal": NOT_THERE}),
    "rare": (trained_on(50_000, red=100, blue=101), {"red": "100 of 50,000", "teal": NOT_THERE}),
    "rare among many": (
        trained_on(10**6, red=200, blue=201),
        {"red": "200 of 1,000,000", "teal": NOT_THERE},
    ),
    "never shown": (trained_on(500, red=0), {"red": "0 of 500", "teal": NOT_THERE}),
    # A new head counts nothing yet, and the text tower may well know the words.
    "nothing counted": (make_model(), {"teal": NOT_THERE}),
    "plain CLIP": (make_model(cls_weight=0), {"teal": NOT_THERE}),
}


@pytest.mark.parametrize("model, said", UNKNOWN.values(), ids=UNKNOWN)
def test_words_that_a_model_hardly_knows_are_named(model, said):
    """Once each, and signs are no words."""
    unknown = evaluation.unknown_words(TOKENIZER, ["Red, blue!", "TEAL -- teal"], model)

    assert [*unknown] == [*said]
    for word, reason in said.items():
        assert reason in unknown[word]


def test_the_share_of_known_words_counts_each_as_often_as_it_occurs():
    """Signs are no words."""
    share = evaluation.share_of_known_words(TOKENIZER, ["Red, red teal!", "blue"])

    assert share == 3 / 4


def test_clip_spells_any_word_and_calls_none_unknown():
    assert evaluation.unknown_words(CLIP, ["qwxyz"], make_model(cls_weight=0)) == {}


TEMPLATES = {
    "all known": (TOKENIZER, ["a photo of {}!", "the {}"], ["a photo of {}!", "the {}"]),
    "some known": (TOKENIZER, ["an etching of {}", "the {}"], ["the {}"]),
    "none known": (TOKENIZER, ["an etching of {}", "Bild: {}"], ["{}"]),
    "the name alone": (TOKENIZER, ["{}"], ["{}"]),
    "CLIP's vocabulary": (CLIP, ["an etching of {}"], ["an etching of {}"]),
}


@pytest.mark.parametrize("tokenizer, given, used", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_with_unknown_words_are_left_out(tokenizer, given, used):
    assert evaluation.usable_templates(tokenizer, given) == used


def test_all_default_templates_suit_the_built_in_scenes():
    """Their scores are means over four prompts, also with "the", which training never shows."""
    tokenizer = data.Tokenizer(scenes.vocabulary())

    assert evaluation.usable_templates(tokenizer) == [*evaluation.TEMPLATES]


def test_zeroshot_asks_with_the_templates_that_it_knows_and_says_so(folders, tmp_path, capsys):
    """In a validation and as a command, which also names the unknown words of the classes."""
    words = ["red", "green", "blue", "a", "picture", "of"]  # and not "photo"
    vocab = words_to_tiktoken(words)
    tokenizer = data.Tokenizer(vocab)
    model = make_model(vocab_size=tokenizer.vocab_size).requires_grad_(False)
    checkpoint = tmp_path / "model.pt"
    evaluation.write_checkpoint(checkpoint, model, vocab)
    (tmp_path / "names.txt").write_text("blue\ngreen\ncrimson\n")
    dataset = evaluation.ClassFolders(folders, 16)
    names = ["blue", "green", "crimson"]

    alone = evaluation.zeroshot(model, tokenizer, dataset, names)
    argv = ["--checkpoint", checkpoint, "--images", folders, "--classes", tmp_path / "names.txt"]
    path = tmp_path / "result.json"
    result, printed = result_of(capsys, evaluation.main, path, "zeroshot", *argv, "--workers", 0)

    used = ["a picture of a {}.", "a {}."]
    asked = evaluation.zeroshot(model, tokenizer, dataset, names, used)
    assert result == json.loads(json.dumps({"templates": used, **alone})) and alone == asked
    assert all(f"\n  {template}\n" in printed for template in used) and "photo" not in printed
    assert "'crimson' is not in the vocabulary" in printed and "'green'" not in printed
