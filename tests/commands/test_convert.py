"""scripts/convert.py: weights of other layouts become a checkpoint of this project, and what a file
does not tell is given, or said to be assumed."""

import json

import open_clip
import open_clip.model
import pytest
import torch
from material import error_of, run, write_checkpoint
from oracle import assert_same_towers, make_pairs, make_random_model, open_clip_of

import data
import eval as evaluation
from scripts.convert import main, open_clip_config, open_clip_state

VOCAB = data.words_to_tiktoken(["dog"])
V = {"vocab_size": data.Tokenizer(VOCAB).vocab_size}


def save(content, path):
    torch.save(content, path)
    return path


@pytest.fixture
def converted(tmp_path):
    """A function that converts a file with these flags and loads the result."""
    (tmp_path / "own.tiktoken").write_text(VOCAB)

    def convert(path, *flags):
        vocab = ["--vocab", tmp_path / "own.tiktoken"]
        assert not run(main, path, tmp_path / "out.pt", *vocab, *flags)
        return evaluation.load(tmp_path / "out.pt")[0]

    return convert


def assert_same_weights(model, state):
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def without_head(model):
    """The weights and statistics that plain CLIP has, too."""
    lost = ("head.", "token_counts", "num_captions")
    return {name: x for name, x in model.state_dict().items() if not name.startswith(lost)}


# ---- other layouts


@pytest.mark.parametrize("custom_text", [False, True], ids=["at the top level", "under text."])
def test_weights_of_open_clip_become_plain_clip(custom_text, tmp_path, converted):
    """Its two layouts put the text tower there. Other files hold constants, too."""
    ours = make_random_model(**V)
    other = open_clip_of(ours, custom_text)
    state = other.state_dict() | {"text.attn_mask": torch.zeros(16, 16)}

    model = converted(save(state, tmp_path / "weights.pt"))

    assert vars(model.config) == {**vars(ours.config), "cls_weight": 0}
    assert_same_weights(model, without_head(ours))


def heads_of_32():
    """open_clip's model with heads that are 32 wide and quick GELU, as the weights of a file: in
    OpenAI's files, matrices are float16."""
    other = open_clip_of(make_random_model(vision_heads=4, text_heads=2, quick_gelu=True, **V))
    open_clip.model.convert_weights_to_fp16(other)
    return other


HEADS = ["--vision_heads", 4, "--text_heads", 2]
# Three scalars are in OpenAI's files only, and mean quick GELU and heads that are 64 wide.
SCALARS = {x: torch.tensor(1) for x in ("input_resolution", "context_length", "vocab_size")}
B16 = open_clip.get_model_config("ViT-B-16")
B32 = open_clip.get_model_config("ViT-B-32-quickgelu")
ALL = {"--quick_gelu", "--vision_heads", "--text_heads", "--image_mean", "--image_std"}
STATS = {"--image_mean", "--image_std"}
# case -> (scalars in the file, the .json beside it, flags, the heads of both towers and whether
# GELU is the quick one, the flags of what is assumed)
KNOWLEDGE = {
    "OpenAI's file": (SCALARS, None, [], (2, 2, True), set()),
    "a flag wins": (SCALARS, None, HEADS, (4, 2, True), set()),
    "nothing is known": ({}, None, [], (2, 2, False), ALL),
    "another .json": ({}, {"vision_cfg": 3}, [], (2, 2, False), ALL),
    "heads given": ({}, None, HEADS, (4, 2, False), STATS | {"--quick_gelu"}),
    "GELU, too": ({}, None, [*HEADS, "--quick_gelu"], (4, 2, True), STATS),
    "open_clip's .json": ({}, B16, [], (2, 8, False), STATS),
    "and a flag": ({}, B32, ["--text_heads", 2], (2, 2, True), STATS),
}


@pytest.mark.parametrize("scalars, beside, flags, expected, _", KNOWLEDGE.values(), ids=KNOWLEDGE)
def test_what_shapes_do_not_tell_is_known_from_elsewhere(
    scalars, beside, flags, expected, _, tmp_path, converted
):
    path = save(heads_of_32().state_dict() | scalars, tmp_path / "x.pt")
    path.with_suffix(".json").write_text(json.dumps(beside))

    config = converted(path, *flags).config

    assert (config.vision_heads, config.text_heads, config.quick_gelu) == expected


@pytest.mark.parametrize("scalars, beside, flags, _, assumed", KNOWLEDGE.values(), ids=KNOWLEDGE)
def test_what_is_assumed_is_said(scalars, beside, flags, _, assumed, tmp_path, converted, capsys):
    path = save(heads_of_32().state_dict() | scalars, tmp_path / "x.pt")
    path.with_suffix(".json").write_text(json.dumps(beside))

    converted(path, *flags)

    printed = capsys.readouterr().out
    assert {flag for flag in ALL if flag in printed} == assumed


def test_features_of_openais_weights_are_those_of_open_clip(tmp_path, converted):
    other = heads_of_32()

    model = converted(save(other.state_dict() | SCALARS, tmp_path / "x.pt"), *HEADS)

    assert_same_towers(model, other.float())


@pytest.mark.parametrize("image_size", [16, 48])
def test_positions_are_interpolated_as_in_open_clip(image_size, tmp_path, converted):
    """Features equal those of open_clip's model of that size, filled by its resize_pos_embed."""
    other = open_clip_of(make_random_model(**V))
    path = save(other.state_dict(), tmp_path / "weights.pt")

    model = converted(path, "--image_size", image_size)

    resized = open_clip.model.CLIP(**open_clip_config(model.config)).eval()
    state = other.state_dict()
    open_clip.model.resize_pos_embed(state, resized)
    resized.load_state_dict(state, strict=True)
    assert_same_towers(model, resized)


# ---- a checkpoint of this project

CHANGES = {
    "SuperCLIP": {},
    "plain CLIP": {"cls_weight": 0},
    "sigmoid": {"loss": "sigmoid", "text_heads": 4},
}


@pytest.fixture(params=CHANGES.values(), ids=CHANGES)
def trained(request, tmp_path):
    """A model that has counted captions, and its checkpoint."""
    model = make_random_model(quick_gelu=True, **V, **request.param)
    model.count_tokens(make_pairs(model)[1])
    return model, write_checkpoint(tmp_path / "last.pt", model, VOCAB)


def test_a_checkpoint_stays_what_it_is(trained, tmp_path, capsys):
    """Configuration, weights, statistics and vocabulary, and nothing is assumed."""
    model, path = trained

    assert not run(main, path, tmp_path / "out.pt")

    again, tokenizer, _ = evaluation.load(tmp_path / "out.pt")
    assert again.config == model.config
    assert tokenizer.vocab == VOCAB
    assert_same_weights(again, model.state_dict())
    assert "--quick_gelu" not in capsys.readouterr().out


def test_a_checkpoint_of_another_size_changes_its_positions_alone(trained, tmp_path):
    model, path = trained

    assert not run(main, path, tmp_path / "out.pt", "--image_size", 48)

    again, tokenizer, _ = evaluation.load(tmp_path / "out.pt")
    assert again.config.image_size == 48
    assert tokenizer.vocab == VOCAB
    resized = "visual.positional_embedding"
    weights = again.state_dict()
    assert_same_weights(again, model.state_dict() | {resized: weights[resized]})


# ---- files that do not fit

STATE = open_clip_state(make_random_model(**V))


def with_part(name, tensor):
    return {**STATE, name: tensor}


# case -> (content of the file, what the message names)
MISFITS = {
    "a tensor is missing": (
        {name: tensor for name, tensor in STATE.items() if "conv1" not in name},
        "conv1",
    ),
    "patches make no square": (
        with_part("visual.positional_embedding", torch.zeros(18, 128)),
        "positional",
    ),
    "counts without a head": (
        with_part("cap_fq", torch.zeros(1, V["vocab_size"])),
        "token_counts",
    ),
    "another vocabulary": (
        open_clip_state(make_random_model(vocab_size=V["vocab_size"] + 1)),
        "vocabulary",
    ),
    "a list": ([1, 2], "state_dict"),
}


@pytest.mark.parametrize("content, named", MISFITS.values(), ids=MISFITS)
def test_a_file_that_does_not_fit_is_one_sentence_that_names_it(content, named, tmp_path, capsys):
    (tmp_path / "own.tiktoken").write_text(VOCAB)
    path = save(content, tmp_path / "weights.pt")
    out = tmp_path / "x.pt"

    message = error_of(capsys, main, path, out, "--vocab", tmp_path / "own.tiktoken")

    assert "weights.pt" in message and named in message and len(message) < 400
    assert not out.exists()


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, but OpenAI's files are made of it
def test_an_archive_of_code_is_refused_with_what_to_do(tmp_path, capsys):
    path = tmp_path / "weights.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(path)

    assert "state_dict" in error_of(capsys, main, path, tmp_path / "x.pt")


def test_a_safetensors_file_that_is_none_is_named(tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"no weights")

    assert "x.safetensors" in error_of(capsys, main, tmp_path / "x.safetensors", tmp_path / "x.pt")


def test_a_size_that_the_patches_do_not_divide_is_a_mistake(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "a.pt", make_random_model(**V), VOCAB)

    assert "image_size" in error_of(capsys, main, path, tmp_path / "x.pt", "--image_size", 33)


def test_nothing_is_written_over(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "a.pt", make_random_model(**V), VOCAB)
    before = path.read_bytes()

    assert "a.pt" in error_of(capsys, main, path, path)
    assert path.read_bytes() == before
