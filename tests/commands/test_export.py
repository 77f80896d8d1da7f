"""scripts/convert.py --to: what it writes loads in open_clip and in transformers, by the lines of
Python that it prints, and gives the same features there."""

import pytest
import torch
from material import error_of, run, write_checkpoint
from oracle import assert_near, assert_same_towers, make_pairs, make_random_model
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

import data
import eval as evaluation
from scripts.convert import main
from superclip import SuperCLIPConfig

VOCAB = data.words_to_tiktoken(["dog"])
STATS = {"image_mean": (0.5, 0.4, 0.3), "image_std": (0.1, 0.2, 0.5)}
HEADS = {"vision_heads": 4, "text_heads": 2}


def run_recipe(printed, folder, monkeypatch):
    """Run the lines of Python that convert has printed, in an empty folder. Returns the names that
    they define."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    names = {}
    exec("\n".join(line[2:] for line in printed.splitlines() if line.startswith("  ")), names)
    return names


def assert_same_but_for_the_head(again, model):
    """Configuration and weights."""
    assert again.config == SuperCLIPConfig(**{**vars(model.config), "cls_weight": 0})
    weights = again.state_dict()
    expected = {name: x for name, x in model.state_dict().items() if name in weights}
    torch.testing.assert_close(dict(weights), expected, rtol=0, atol=0)


# ---- open_clip


@pytest.fixture(params=["softmax", "sigmoid"])
def model_and_vocab(request):
    """A model of which shapes tell little, with a vocabulary of its own."""
    vocab_size = data.Tokenizer(VOCAB).vocab_size
    return make_random_model(
        loss=request.param, quick_gelu=True, vocab_size=vocab_size, **HEADS, **STATS
    )


@torch.no_grad()
def test_open_clip_loads_what_to_open_clip_writes(model_and_vocab, tmp_path, capsys, monkeypatch):
    """A model with the same features, scale and bias, a preprocess with the mean and std of the
    configuration, and a tokenizer with its vocabulary."""
    model = model_and_vocab
    path = write_checkpoint(tmp_path / "best.pt", model, VOCAB)
    monkeypatch.chdir(tmp_path)

    assert not run(main, path, "superclip.pt", "--to", "open_clip")

    names = run_recipe(capsys.readouterr().out, tmp_path / "empty", monkeypatch)
    other = names["model"].eval()
    assert_same_towers(model, other)
    assert other.logit_scale == model.logit_scale
    assert other.logit_bias == model.logit_bias
    normalize = names["preprocess"].transforms[-1]
    assert {"image_mean": tuple(normalize.mean), "image_std": tuple(normalize.std)} == STATS
    assert torch.equal(names["tokenizer"](["a dog"]), data.Tokenizer(VOCAB)(["a dog"], 16))


def test_what_to_open_clip_writes_can_be_converted_back(model_and_vocab, tmp_path):
    """What shapes do not tell, but for mean and std, is in the .json file beside the weights."""
    path = write_checkpoint(tmp_path / "best.pt", model_and_vocab, VOCAB)
    out = tmp_path / "superclip.pt"
    assert not run(main, path, out, "--to", "open_clip")

    flags = ["--image_mean", *STATS["image_mean"], "--image_std", *STATS["image_std"]]
    assert not run(main, out, tmp_path / "again.pt", *flags)

    again, tokenizer, _ = evaluation.load(tmp_path / "again.pt")
    assert_same_but_for_the_head(again, model_and_vocab)
    assert tokenizer.vocab == VOCAB


# ---- transformers

KINDS = {"words and GELU": (VOCAB, False), "CLIP's vocabulary and GELU": (None, True)}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def exported(request, tmp_path_factory):
    """A model, its tokenizer, and the folder that was written for transformers."""
    vocab, quick_gelu = request.param
    tokenizer = data.Tokenizer(vocab or data.clip_vocabulary(), 16)
    vocab_size = tokenizer.vocab_size
    model = make_random_model(vocab_size=vocab_size, quick_gelu=quick_gelu, **HEADS, **STATS)
    path = write_checkpoint(tmp_path_factory.mktemp("export") / "a.pt", model, tokenizer.vocab)
    folder = path.with_name("folder")
    assert not run(main, path, folder, "--to", "transformers")
    return model, tokenizer, folder


@torch.no_grad()
def test_transformers_has_the_same_features(exported):
    """Also of a text that goes on after its end, and the same logits."""
    model, tokenizer, folder = exported
    images, tokens = make_pairs(model)
    tokens[0, 4] = tokenizer.end

    out = CLIPModel.from_pretrained(folder)(tokens, images)

    assert_near(model.encode_image(images), out.image_embeds)
    assert_near(model.encode_text(tokens), out.text_embeds)
    logits = model.logit_scale.exp() * model.encode_image(images) @ model.encode_text(tokens).T
    assert_near(logits, out.logits_per_image)


def test_transformers_has_the_same_pixels(exported):
    model, _, folder = exported
    picture = torch.randint(256, (3, 32, 32), dtype=torch.uint8)

    processor = CLIPImageProcessor.from_pretrained(folder)

    pixels = processor(images=picture, return_tensors="pt").pixel_values[0]
    assert_near(pixels, (picture / 255 - model.visual.mean) / model.visual.std)


@pytest.mark.parametrize("name", ["", "model.safetensors"], ids=["folder", "file"])
def test_what_to_transformers_writes_can_be_converted_back(exported, name, tmp_path):
    """The vocabulary is the one beside the weights, or else CLIP's."""
    model, tokenizer, folder = exported

    assert not run(main, folder / name, tmp_path / "again.pt")

    again, its_tokenizer, _ = evaluation.load(tmp_path / "again.pt")
    assert_same_but_for_the_head(again, model)
    assert its_tokenizer.vocab == tokenizer.vocab


def test_what_transformers_saves_can_be_converted(exported, tmp_path):
    """In the layout of the version that is installed."""
    model, tokenizer, folder = exported
    saved = tmp_path / "saved"
    for part in (CLIPModel, CLIPImageProcessor):
        part.from_pretrained(folder).save_pretrained(saved)
    (tmp_path / "own.tiktoken").write_text(tokenizer.vocab)

    assert not run(main, saved, tmp_path / "again.pt", "--vocab", tmp_path / "own.tiktoken")

    assert_same_but_for_the_head(evaluation.load(tmp_path / "again.pt")[0], model)


def test_a_folder_that_is_not_empty_is_left_alone(exported, capsys):
    _, _, folder = exported
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())

    error = error_of(capsys, main, folder.with_name("a.pt"), folder, "--to", "transformers")

    assert "folder" in error
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    "text", ["a photo of a cat", "It's 42 naïve cafés!", 40 * "x "], ids=["plain", "odd", "long"]
)
@pytest.mark.parametrize("exported", [(None, True)], indirect=True, ids=["CLIP's vocabulary"])
def test_transformers_tokenizes_with_clips_vocabulary(exported, text):
    _, tokenizer, folder = exported

    processor = CLIPProcessor.from_pretrained(folder)

    ids = processor.tokenizer(text, truncation=True).input_ids
    assert ids == tokenizer([text])[0, : len(ids)].tolist()
