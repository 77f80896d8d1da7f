"""Weights in and out. The oracles are the authors' outputs (official_tiny.pt), open_clip and
transformers."""

import json
import math
import os
from pathlib import Path

import open_clip
import open_clip.model
import pytest
import torch
from material import (
    close,
    error_of,
    open_clip_of,
    pairs,
    photo,
    run,
    same_towers,
    small,
    write_checkpoint,
)
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor

import data
import eval as evaluation
from scripts.convert import main, open_clip_config, open_clip_state, our_name, read_weights
from superclip import SuperCLIP, SuperCLIPConfig

OFFICIAL = torch.load(Path(__file__).parent / "official_tiny.pt", weights_only=True)
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
        vocab = "--vocab", tmp_path / "own.tiktoken"
        assert not run(main, path, tmp_path / "out.pt", *vocab, *flags)
        return evaluation.load(tmp_path / "out.pt")[0]

    return convert


def same_weights(model, state):
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def model_of(path):
    """The model of a file of the authors. Its 300 tokens are too few for a vocabulary of ours, so
    there is none."""
    weights, config, _ = read_weights(path)
    model = SuperCLIP(SuperCLIPConfig(**config))
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("prefix", ["", "module."])
def test_three_training_steps_equal_the_authors(prefix, tmp_path):
    """Their weights, converted and loaded: features, logits and losses of three steps. In the first
    step, where their loss masks nothing, also the gradient norm of every parameter."""
    state = {prefix + k: v for k, v in OFFICIAL["state_dict"].items()}
    model = model_of(save({"epoch": 1, "state_dict": state}, tmp_path / "official.pt"))
    for number, step in enumerate(OFFICIAL["steps"]):
        model.zero_grad()
        out = model(step["image"], step["text"])
        for name in ("image_features", "text_features", "contrastive_loss"):
            close(out[name], step[name])
        close(model.class_logits(step["image"]), step["class_logits"])
        close(out["classification_loss"], step["class_loss_masked"])
        out["loss"].backward()
        if number == 0:
            close(step["class_loss"], step["class_loss_masked"])
            theirs = {our_name(k): float(v) for k, v in step["grad_norms"].items()}
            norms = {k: p.grad.norm().item() for k, p in model.named_parameters()}
            assert norms == pytest.approx(theirs, rel=1e-5)
    assert model.num_captions.item() == 18


def test_the_authors_counters_become_integer_counts(tmp_path):
    """They add up shares of captions over steps of 16,384. Here: two steps, a token in 75 % of the
    captions of each, and a token in 33 captions."""
    state = dict(OFFICIAL["state_dict"])
    state["num_samples"] = torch.full((1, 1), 2.0, dtype=torch.float64)
    state["cap_fq"] = torch.zeros(1, 300, dtype=torch.float64)
    state["cap_fq"][0, 7], state["cap_fq"][0, 8] = 1.5, 33 / 16384 - 1e-9
    model = model_of(save({"state_dict": state}, tmp_path / "a.pt"))
    assert model.num_captions.item() == 2 * 16384
    assert model.token_counts[[7, 8]].tolist() == [24576, 33]
    assert model.token_weights()[8].item() == pytest.approx(math.log(32769 / 34))


@pytest.mark.parametrize("custom_text", [False, True])
def test_both_layouts_of_open_clip_become_plain_clip(custom_text, tmp_path, converted):
    """The text tower at the top level and under "text.", with constants that other files hold."""
    ours = small(**V)
    other = open_clip_of(ours, custom_text)
    state = other.state_dict() | {"text.attn_mask": torch.zeros(16, 16)}
    model = converted(save(state, tmp_path / "weights.pt"))
    assert vars(model.config) == {**vars(ours.config), "cls_weight": 0} and model.head is None
    same_towers(model, other)


def heads_of_32():
    """open_clip's model with heads that are 32 wide and quick GELU, as the weights of a file: in
    OpenAI's files, matrices are float16."""
    other = open_clip_of(small(vision_heads=4, text_heads=2, quick_gelu=True, **V))
    open_clip.model.convert_weights_to_fp16(other)
    return other


HEADS = ["--vision_heads", 4, "--text_heads", 2]
# Three scalars are in OpenAI's files only, and mean quick GELU and heads that are 64 wide.
SCALARS = {x: torch.tensor(1) for x in ("input_resolution", "context_length", "vocab_size")}
B16 = open_clip.get_model_config("ViT-B-16")
B32 = open_clip.get_model_config("ViT-B-32-quickgelu")
ALL = {"--quick_gelu", "--vision_heads", "--text_heads", "--image_mean", "--image_std"}
STATS = {"--image_mean", "--image_std"}


@pytest.mark.parametrize(
    "scalars, beside, flags, expected, assumed",
    [
        pytest.param(SCALARS, None, [], (2, 2, True), set(), id="OpenAI's file"),
        pytest.param(SCALARS, None, HEADS, (4, 2, True), set(), id="a flag wins"),
        pytest.param({}, None, [], (2, 2, False), ALL, id="nothing is known"),
        pytest.param({}, {"vision_cfg": 3}, [], (2, 2, False), ALL, id="another .json"),
        pytest.param({}, None, HEADS, (4, 2, False), STATS | {"--quick_gelu"}, id="heads given"),
        pytest.param({}, None, [*HEADS, "--quick_gelu"], (4, 2, True), STATS, id="GELU, too"),
        pytest.param({}, B16, [], (2, 8, False), STATS, id="open_clip's .json"),
        pytest.param({}, B32, ["--text_heads", 2], (2, 2, True), STATS, id="and a flag"),
    ],
)
def test_what_shapes_do_not_tell_is_given_or_said_to_be_assumed(
    scalars, beside, flags, expected, assumed, tmp_path, converted, capsys
):
    other = heads_of_32()
    path = save(other.state_dict() | scalars, tmp_path / "x.pt")
    path.with_suffix(".json").write_text(json.dumps(beside))

    model = converted(path, *flags)

    config = model.config
    assert (config.vision_heads, config.text_heads, config.quick_gelu) == expected
    printed = capsys.readouterr().out
    assert {flag for flag in ALL if flag in printed} == assumed
    if expected == (4, 2, True):
        same_towers(model, other.float())


@pytest.mark.parametrize("image_size, length", [(16, 12), (48, 12), (56, 20)])
def test_positions_are_interpolated_as_in_open_clip(image_size, length, tmp_path, converted):
    """Features equal those of open_clip's model of that size, filled by its resize_pos_embed. Those
    of captions that fit both contexts, the old and the new, are the same."""
    other = open_clip_of(small(**V))
    path = save(other.state_dict(), tmp_path / "weights.pt")
    model = converted(path, "--image_size", image_size, "--context_length", length)
    config = {**vars(model.config), "context_length": 16}
    resized = open_clip.model.CLIP(**open_clip_config(SuperCLIPConfig(**config))).eval()
    state = other.state_dict()
    open_clip.model.resize_pos_embed(state, resized)
    resized.load_state_dict(state, strict=True)
    same_towers(model, resized, T=min(length, 16))
    positions = model.text.positional_embedding
    assert len(positions) == length and (positions[15:] == positions[15:16]).all()


@pytest.mark.parametrize("changes", [{}, dict(cls_weight=0), dict(loss="sigmoid", text_heads=4)])
def test_a_checkpoint_of_this_project_stays_what_it_is(changes, tmp_path, capsys):
    """Configuration, weights, statistics and vocabulary, but for new sizes."""
    model, out = small(quick_gelu=True, **V, **changes), tmp_path / "out.pt"
    model.count_tokens(pairs(model)[1])
    path = write_checkpoint(tmp_path / "last.pt", model, VOCAB)
    assert not run(main, path, out) and "--quick_gelu" not in capsys.readouterr().out
    again, tokenizer, _ = evaluation.load(out)
    assert again.config == model.config and tokenizer.vocab == VOCAB
    same_weights(again, model.state_dict())
    assert not run(main, path, out, "--image_size", 48, "--context_length", 12)
    again, tokenizer, preprocess = evaluation.load(out)
    assert (again.config.image_size, tokenizer.context_length, tokenizer.vocab) == (48, 12, VOCAB)
    resized = ("visual.positional_embedding", "text.positional_embedding")
    same_weights(again, model.state_dict() | {k: again.state_dict()[k] for k in resized})
    assert not run(main, path, out, "--half")
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.testing.assert_close(torch.load(out)["model"], half, rtol=0, atol=0)


STATE = open_clip_state(small(**V))
LACKS = {name: tensor for name, tensor in STATE.items() if "conv1" not in name}


def with_part(name, tensor):
    return {**STATE, name: tensor}


@pytest.mark.parametrize(
    "content, named",
    [
        pytest.param(LACKS, "conv1", id="a tensor is missing"),
        pytest.param(with_part("visual.conv1.weight", torch.zeros(128, 3, 0, 0)), "conv1", id="0"),
        pytest.param(
            with_part("visual.positional_embedding", torch.zeros(18, 128)),
            "positional",
            id="patches make no square",
        ),
        pytest.param(
            with_part("cap_fq", torch.zeros(1, V["vocab_size"])),
            "token_counts",
            id="without a head",
        ),
        pytest.param(
            with_part("cap_fq", torch.zeros(1, V["vocab_size"], dtype=torch.complex64)),
            "",
            id="complex counts",
        ),
        pytest.param(
            open_clip_state(small(vocab_size=V["vocab_size"] + 1)),
            "--vocab",
            id="another vocabulary",
        ),
        pytest.param([1, 2], "state_dict", id="a list"),
        pytest.param({"state_dict": [1, 2]}, "state_dict", id="a list of weights"),
        pytest.param({"text_projection.weight": 5}, "conv1", id="a number"),
        pytest.param({3: torch.zeros(1)}, "conv1", id="no names"),
        pytest.param(
            {"a.q_proj.weight": torch.zeros(2, 2), "a.k_proj.weight": torch.zeros(2)},
            "k_proj",
            id="query without key",
        ),
        pytest.param(
            with_part("visual.proj", torch.zeros(128, 24).to_sparse()), "proj", id="sparse"
        ),
    ],
)
def test_a_file_that_does_not_fit_is_one_sentence_that_names_it(content, named, tmp_path, capsys):
    (tmp_path / "own.tiktoken").write_text(VOCAB)
    path = save(content, tmp_path / "weights.pt")
    out = tmp_path / "x.pt"
    flags = ["--vocab", tmp_path / "own.tiktoken"]
    if named == "":  # such a tensor is no weight, and is left out
        assert not run(main, path, out, *flags)
        return

    message = error_of(capsys, main, path, out, *flags)

    assert "weights.pt" in message and named in message and len(message) < 400
    assert not out.exists()


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, but OpenAI's files are made of it
def test_a_file_of_another_kind_is_one_sentence_that_says_what_to_do(tmp_path, capsys):
    path = tmp_path / "weights.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(path)
    (tmp_path / "x.safetensors").write_bytes(b"no weights")

    assert "state_dict" in error_of(capsys, main, path, tmp_path / "x.pt")
    assert "x.safetensors" in error_of(capsys, main, tmp_path / "x.safetensors", tmp_path / "x.pt")


def test_a_size_that_the_patches_do_not_divide_is_a_mistake(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "a.pt", small(**V), VOCAB)

    assert "image_size" in error_of(capsys, main, path, tmp_path / "x.pt", "--image_size", 33)


def test_a_run_that_can_be_resumed_is_not_replaced(tmp_path, capsys):
    """The optimizer is in last.pt alone, so a file without one may be written over."""
    path = write_checkpoint(tmp_path / "a.pt", small(**V), VOCAB)
    last, best = tmp_path / "last.pt", tmp_path / "best.pt"
    save({**torch.load(path), "optimizer": {}}, last)
    save(torch.load(path), best)
    before = last.read_bytes()

    assert "last.pt" in error_of(capsys, main, path, last)
    assert last.read_bytes() == before
    assert not run(main, path, best)


def run_recipe(printed, folder, monkeypatch):
    """Run the lines of Python that convert has printed, in an empty folder. Returns the names that
    they define."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    names = {}
    exec("\n".join(line[2:] for line in printed.splitlines() if line.startswith("  ")), names)
    return names


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_open_clip_loads_what_to_open_clip_writes(
    loss, suffix, tmp_path, capsys, converted, monkeypatch
):
    """The printed lines of Python, run in an empty folder, give a model with the same features,
    scale and bias, a preprocess with the mean and std of the configuration, and a tokenizer with
    its vocabulary. Converted back, all but the word head is there again: what shapes do not tell is
    in the .json file."""
    stats = dict(image_mean=(0.5, 0.4, 0.3), image_std=(0.1, 0.2, 0.5))
    model = small(loss=loss, quick_gelu=True, vision_heads=4, text_heads=2, **V, **stats)
    path = write_checkpoint(tmp_path / "best.pt", model, VOCAB)
    out = tmp_path / f"superclip-{loss}{suffix}"
    monkeypatch.chdir(tmp_path)
    assert not run(main, path, out.name, "--to", "open_clip")
    assert os.stat(out).st_mode == os.stat(path).st_mode  # readable for others
    scope = run_recipe(capsys.readouterr().out, tmp_path / "empty", monkeypatch)
    other = scope["model"].eval()
    same_towers(model, other)
    normalize = scope["preprocess"].transforms[-1]
    assert (tuple(normalize.mean), tuple(normalize.std)) == tuple(stats.values())
    assert torch.equal(scope["tokenizer"](["a dog"]), data.Tokenizer(VOCAB)(["a dog"], 16))
    again = converted(out, "--image_mean", *stats["image_mean"], "--image_std", *stats["image_std"])
    assert vars(again.config) | stats == {**vars(model.config), "cls_weight": 0}
    lost = ("head.", "token_counts", "num_captions")
    same_weights(again, {k: v for k, v in model.state_dict().items() if not k.startswith(lost)})


@torch.no_grad()
@pytest.mark.parametrize("quick_gelu, is_clip", [(False, False), (True, True)])
def test_transformers_loads_what_to_transformers_writes(quick_gelu, is_clip, tmp_path):
    """Same features, also of a text that goes on after its end, same pixels and, if the vocabulary
    is CLIP's, same tokens. What transformers saves then becomes the same model again, but for the
    word head. The vocabulary is beside the weights, or else CLIP's."""
    tokenizer = data.Tokenizer(data.clip_vocabulary() if is_clip else VOCAB, 16)
    changes = dict(quick_gelu=quick_gelu, vision_heads=4, text_heads=2)
    changes |= dict(image_mean=(0.5, 0.4, 0.3), image_std=(0.1, 0.2, 0.5))
    model = small(vocab_size=tokenizer.vocab_size, **changes)
    path, folder = tmp_path / "a.pt", tmp_path / "folder"
    write_checkpoint(path, model, tokenizer.vocab)
    assert not run(main, path, folder, "--to", "transformers")
    assert run(main, path, folder, "--to", "transformers") == 2  # the folder is not empty
    other = CLIPModel.from_pretrained(folder)
    images, tokens = pairs(model)
    tokens[0, 4] = tokenizer.end
    out = other(tokens, images)
    close(model.encode_image(images), out.image_embeds)
    close(model.encode_text(tokens), out.text_embeds)
    close(model.logit_scale.exp() * out.image_embeds @ out.text_embeds.T, out.logits_per_image)
    processor = (CLIPProcessor if is_clip else CLIPImageProcessor).from_pretrained(folder)
    picture = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    pixels = processor(images=picture, return_tensors="pt").pixel_values[0]
    close(pixels, (picture / 255 - model.visual.mean) / model.visual.std)
    for text in ("a photo of a cat", "It's 42 naïve cafés!", 40 * "x ") if is_clip else ():
        ids = processor.tokenizer(text, truncation=True).input_ids
        assert ids == tokenizer([text])[0, : len(ids)].tolist()
    for part in (other, processor):
        part.save_pretrained(folder)  # the second time in the layout of this version
    assert not run(main, folder / "model.safetensors" if is_clip else folder, path)
    again, its_tokenizer, _ = evaluation.load(path)
    assert again.config == SuperCLIPConfig(**{**vars(model.config), "cls_weight": 0})
    assert its_tokenizer.vocab == tokenizer.vocab
    same_weights(again, {k: v for k, v in model.state_dict().items() if k in again.state_dict()})


WORDS = "a photo of the red dog women's t-shirt 日 本 !! -- x".split()
TEXTS = [
    "A photo of the RED dog",
    "women’s t-shirt!!",
    "red-dog, a--b",
    "日本 dog日",
    "a purple dog.",
    "hotdog bred a!!!",
    "dog's x- - -x",
    "e\u0301cole",
    "dog" * 30,
    "",
    "a\tphoto \n of",
    "हिन्दी १२",
    "dog\u0301!",
]


@torch.no_grad()
def test_transformers_tokenizes_and_classifies_with_a_vocabulary_of_words(
    tmp_path, capsys, monkeypatch
):
    """Equal ids, and the printed pipeline gives this project's scores. The picture has the model's
    size, because transformers crops and resizes in its own way."""
    tokenizer = data.Tokenizer(data.words_to_tiktoken(WORDS), 16)
    model = small(vocab_size=tokenizer.vocab_size)
    path = write_checkpoint(tmp_path / "a.pt", model, tokenizer.vocab)
    picture = photo(0, (32, 32))
    names = ["red dog", "women's t-shirt"]
    monkeypatch.chdir(tmp_path)

    assert not run(main, path, "folder", "--to", "transformers")

    classify = run_recipe(capsys.readouterr().out, tmp_path / "empty", monkeypatch)["classify"]
    answers = classify(picture, candidate_labels=names, hypothesis_template="a photo of a {}.")
    images = model.encode_image(data.load_image(picture, 32)[None])
    texts = model.encode_text(tokenizer([f"a photo of a {name}." for name in names]))
    scores = (model.logit_scale.exp() * images @ texts.T).softmax(dim=1)[0].tolist()
    assert {x["label"]: x["score"] for x in answers} == pytest.approx(
        dict(zip(names, scores)), 1e-4
    )

    theirs = AutoTokenizer.from_pretrained(tmp_path / "folder")
    for text in TEXTS:
        ids = [tokenizer.start, *tokenizer.encode(text), tokenizer.end]
        assert theirs(text).input_ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=True).strip() == tokenizer.decode(ids)


def test_an_average_of_weights(tmp_path, capsys):
    """By hand: 0.75 * 2 + 0.25 * 4 = 2.5. Counts stay, and so does a head that the other lacks."""
    paths = tmp_path / "in.pt", tmp_path / "out.pt", "--share", 0.25, "--average"
    model, other, plain = small(**V), small(**V), small(cls_weight=0, **V)
    for m, value in ((model, 2), (other, 4), (plain, 4)):
        for p in m.parameters():
            torch.nn.init.constant_(p, value)
        m.count_tokens(pairs(m)[1])
    write_checkpoint(paths[0], model, VOCAB)
    for m, head in ((other, 2.5), (plain, 2)):
        assert not run(main, *paths, write_checkpoint(tmp_path / "other.pt", m, VOCAB))
        averaged = evaluation.load(tmp_path / "out.pt")[0]
        for name, p in averaged.named_parameters():
            assert (p == (head if name.startswith("head.") else 2.5)).all(), name
        assert torch.equal(averaged.token_counts, model.token_counts)
    words = data.words_to_tiktoken(["cat"])
    for m, vocab in ((small(quick_gelu=True, **V), VOCAB), (other, words)):
        path = write_checkpoint(tmp_path / "unfit.pt", m, vocab)
        assert "unfit.pt" in error_of(capsys, main, *paths, path)


def test_models_with_the_same_mean_can_be_averaged(tmp_path):
    """Whether it comes from a flag or from a checkpoint."""
    path = write_checkpoint(tmp_path / "a.pt", small(image_mean=(0.5, 0.5, 0.5), **V), VOCAB)
    other = save(open_clip_state(small(**V)), tmp_path / "b.pt")
    flags = ["--vocab", tmp_path / "own.tiktoken", "--image_mean", 0.5, 0.5, 0.5]
    (tmp_path / "own.tiktoken").write_text(VOCAB)

    assert not run(main, path, tmp_path / "out.pt", "--average", other, *flags)

    assert evaluation.load(tmp_path / "out.pt")[0].config.image_mean == (0.5, 0.5, 0.5)
