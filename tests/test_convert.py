"""Weights in and out: the authors' files, OpenAI's, open_clip's, and files that fit nowhere."""

import json
import math
import os
import pickle
import sys
from pathlib import Path

import open_clip
import open_clip.model
import pytest
import safetensors.torch
import torch
from material import error_of, run
from test_model import SMALL, close, open_clip_of, pairs, same_features, small

import data
import eval as evaluation
from data import words_to_tiktoken
from scripts.convert import convert, main, open_clip_config, open_clip_state
from superclip import InputError, SuperCLIPConfig

OFFICIAL = torch.load(Path(__file__).parent / "official_tiny.pt", weights_only=True)
VOCAB = data.tiktoken_text(data.BYTE_TOKENS[:298])  # for a model with 300 tokens
SCALARS = {k: torch.tensor(16) for k in ("input_resolution", "context_length", "vocab_size")}


def save(content, path):
    """Write a .pt or .safetensors file."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


def save_ours(model, path, vocab=VOCAB, **more):
    """Write a checkpoint as train.py does."""
    content = {"model": model.state_dict(), "config": vars(model.config), "vocab": vocab}
    return save({**content, **more}, path)


def vocab_file(folder):
    path = folder / "300.tiktoken"
    path.write_text(VOCAB)
    return path


def open_clip_file(folder, suffix=".pt", **changes):
    """A file of open_clip's weights, and the open_clip model that they are of."""
    other = open_clip_of(small(**changes))
    return save(other.state_dict(), folder / f"weights{suffix}"), other


# -----------------------------------------------------------------------------
# The authors' files


def our_name(name):
    name = name.replace("text_decoder.ln_mlp", "head.ln")
    return name.replace("text_decoder.text_projection", "head.linear")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_three_training_steps_equal_the_authors(prefix, tmp_path):
    """Their weights, converted and loaded: features, logits and losses of three steps. In the first
    step, where their loss masks nothing, also the gradient norm of every parameter."""
    path, state = tmp_path / "official.pt", OFFICIAL["state_dict"]
    if prefix:
        state = {"epoch": 1, "state_dict": {prefix + k: v for k, v in state.items()}}
    torch.save(state, path)
    assert not run(main, path, tmp_path / "out.pt", "--vocab", vocab_file(tmp_path))
    model, tokenizer, _ = evaluation.load(tmp_path / "out.pt")
    assert tokenizer.vocab_size == 300
    model.requires_grad_(True).train()
    for number, step in enumerate(OFFICIAL["steps"]):
        model.zero_grad()
        out = model(step["image"], step["text"])
        close(out["image_features"], step["image_features"])
        close(out["text_features"], step["text_features"])
        close(model.class_logits(step["image"]), step["class_logits"])
        close(out["contrastive_loss"], step["contrastive_loss"])
        close(out["classification_loss"], step["class_loss_masked"])
        out["loss"].backward()
        if number == 0:
            close(step["class_loss"], step["class_loss_masked"])
            theirs = {our_name(k): v for k, v in step["grad_norms"].items()}
            grads = {k: p.grad for k, p in model.named_parameters()}
            assert grads.keys() == theirs.keys()
            for name, grad in grads.items():
                assert grad.norm().item() == pytest.approx(float(theirs[name]), rel=1e-5), name
    assert model.num_captions.item() == 18


def test_the_authors_counters_become_integer_counts(tmp_path):
    """They add up shares of captions over steps of 16,384. Here: two steps, a token in 75 % of the
    captions of each, and a token in 33 captions."""
    state = dict(OFFICIAL["state_dict"])
    state["num_samples"] = torch.full((1, 1), 2.0, dtype=torch.float64)
    state["cap_fq"] = torch.zeros(1, 300, dtype=torch.float64)
    state["cap_fq"][0, 7], state["cap_fq"][0, 8] = 1.5, 33 / 16384 - 1e-9
    model, _ = convert(save({"state_dict": state}, tmp_path / "a.pt"))
    assert model.num_captions.item() == 2 * 16384
    assert (model.token_counts[7].item(), model.token_counts[8].item()) == (24576, 33)
    assert model.token_counts.dtype == model.num_captions.dtype == torch.int64
    assert model.token_weights()[8].item() == pytest.approx(math.log(32769 / 34))


# -----------------------------------------------------------------------------
# open_clip's and OpenAI's files


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("custom_text", [False, True])
def test_both_layouts_of_open_clip_become_plain_clip(custom_text, suffix, tmp_path):
    """The text tower at the top level and under "text.": configuration and features. The files
    have no word head, so the model has none."""
    other = open_clip_of(small(), custom_text)
    model, vocab = convert(save(other.state_dict(), tmp_path / f"weights{suffix}"))
    assert model.config == SuperCLIPConfig(**SMALL, cls_weight=0)
    assert model.head is None and vocab is None
    same_features(model, other)


def test_a_model_trained_by_open_clip_with_its_optimizer_state(tmp_path):
    other = open_clip_of(small())
    state = {"module." + k: v for k, v in other.state_dict().items()}
    content = {"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"lr": 1e-3}}
    model, _ = convert(save(content, tmp_path / "epoch_3.pt"))
    same_features(model, other)


def test_openais_layout_in_half_precision_means_quick_gelu(tmp_path, capsys):
    """Matrices in float16 and three scalars: features equal those of open_clip's QuickGELU model,
    and parameters are float32."""
    other = open_clip_of(small(quick_gelu=True))
    open_clip.model.convert_weights_to_fp16(other)
    state = other.state_dict()
    assert state["visual.conv1.weight"].dtype == torch.float16
    model, _ = convert(save({**state, **SCALARS}, tmp_path / "ViT.pt"))
    assert model.config.quick_gelu and capsys.readouterr().out == ""
    assert all(p.dtype == torch.float32 for p in model.parameters())
    same_features(model, other.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_without_the_scalars_gelu_is_assumed_in_one_line_unless_a_flag_says_which(
    dtype, tmp_path, capsys
):
    """A float32 copy of OpenAI's weights, and a float16 copy of somebody's."""
    other = open_clip_of(small(quick_gelu=True)).to(dtype)
    path = save(other.state_dict(), tmp_path / "copy.pt")
    model, _ = convert(path)
    said = capsys.readouterr().out
    assert not model.config.quick_gelu
    assert said.count("\n") == 1 and "copy.pt" in said and "--quick_gelu" in said
    same_features(convert(path, quick_gelu=True)[0], other.float())
    assert not convert(path, quick_gelu=False)[0].config.quick_gelu
    assert capsys.readouterr().out == ""


def test_heads_and_activation_come_from_flags_or_from_open_clips_json(tmp_path, capsys):
    """Heads 32 wide: features equal open_clip's if flags say so, or a .json file beside the
    weights. Flags win. A .json file of something else changes nothing."""
    path, other = open_clip_file(tmp_path, vision_heads=4, text_heads=2, quick_gelu=True)
    flags = dict(vision_heads=4, text_heads=2, quick_gelu=True)
    same_features(convert(path, **flags)[0], other)
    config = open_clip_config(SuperCLIPConfig(**SMALL, **flags))
    (tmp_path / "weights.json").write_text(json.dumps(config))
    capsys.readouterr()
    same_features(convert(path)[0], other)
    assert capsys.readouterr().out == ""
    config = convert(path, vision_heads=2, quick_gelu=False)[0].config
    assert (config.vision_heads, config.text_heads, config.quick_gelu) == (2, 2, False)
    for text in ("[1, 2]", '{"vision_cfg": 3}', "{", "\x00"):
        (tmp_path / "weights.json").write_text(text)
        assert convert(path)[0].config == SuperCLIPConfig(**SMALL, cls_weight=0)


def test_what_open_clips_own_json_leaves_out_has_open_clips_default(tmp_path):
    """ViT-B-16.json names no head width and no activation."""
    path, _ = open_clip_file(tmp_path, text_width=128)
    config = open_clip.get_model_config("ViT-B-16")
    assert "head_width" not in config["vision_cfg"] and "quick_gelu" not in config
    (tmp_path / "weights.json").write_text(json.dumps(config))
    model, _ = convert(path)
    assert (model.config.vision_heads, model.config.text_heads) == (2, 8)
    assert not model.config.quick_gelu


def test_mean_and_std_from_flags_change_the_features_of_uint8_images(tmp_path):
    """They end up in the configuration of the checkpoint. Features of uint8 images equal those of
    floats that were normalised with them."""
    path, _ = open_clip_file(tmp_path, vocab_size=300)
    out, flags = tmp_path / "out.pt", "--image_mean 0.5 0.4 0.3 --image_std 0.1 0.2 0.5".split()
    assert not run(main, path, out, "--vocab", vocab_file(tmp_path), *flags)
    model, _, _ = evaluation.load(out)
    assert [*model.config.image_mean, *model.config.image_std] == [0.5, 0.4, 0.3, 0.1, 0.2, 0.5]
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.1, 0.2, 0.5])
    floats = (images / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(model.encode_image(images), model.encode_image(floats))
    clips = convert(path)[0].encode_image(images)
    assert (model.encode_image(images) - clips).abs().max() > 0.01


# -----------------------------------------------------------------------------
# Another image size, a shorter context


@pytest.mark.parametrize("image_size", [16, 48, 56])
def test_positions_are_interpolated_as_in_open_clip(image_size, tmp_path):
    """Features equal those of open_clip's model of that size, filled by its resize_pos_embed."""
    path, other = open_clip_file(tmp_path)
    model, _ = convert(path, image_size=image_size)
    resized = open_clip.model.CLIP(**open_clip_config(model.config)).eval()
    state = dict(other.state_dict())
    open_clip.model.resize_pos_embed(state, resized)
    resized.load_state_dict(state, strict=True)
    assert model.visual.positional_embedding.shape == ((image_size // 8) ** 2 + 1, 128)
    same_features(model, resized)


def test_a_shorter_context_is_a_part_of_the_longer_one(tmp_path):
    """Features of captions that fit are the same. A longer context is refused."""
    path, other = open_clip_file(tmp_path)
    model, _ = convert(path, context_length=12)
    assert model.text.positional_embedding.shape == (12, 64)
    same_features(model, other)
    with pytest.raises(InputError, match="weights.pt.*text.positional_embedding"):
        convert(path, context_length=20)


def test_a_checkpoint_of_this_project_changes_its_sizes_too(tmp_path):
    """Head, statistics and vocabulary stay. The positions are those that open_clip's file gets."""
    model = small(vocab_size=300)
    model.count_tokens(pairs(config=model.config)[1])
    path = save_ours(model, tmp_path / "best.pt", step=3, optimizer={"lr": 1e-3})
    sizes = ("--image_size", 48, "--context_length", 12)
    assert not run(main, path, tmp_path / "out.pt", *sizes)
    again, tokenizer, preprocess = evaluation.load(tmp_path / "out.pt")
    assert (again.config.image_size, tokenizer.context_length) == (48, 12)
    assert preprocess.keywords == {"size": 48} and tokenizer.vocab == VOCAB
    theirs = save(open_clip_state(model), tmp_path / "theirs.pt")
    expected = convert(theirs, image_size=48, context_length=12)[0].state_dict()
    expected = {**model.state_dict(), **expected}
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in again.state_dict().items())


# -----------------------------------------------------------------------------
# Files that do not fit


def misfits():
    """The tensor that a message must name, the weights, and changes of the configuration."""
    state = open_clip_of(small()).state_dict()

    def without(name):
        return {k: v for k, v in state.items() if k != name}

    yield "visual.conv1.weight", without("visual.conv1.weight"), {}
    yield "visual.ln_post.weight", without("visual.ln_post.weight"), {}
    yield "text.token_embedding.weight", without("token_embedding.weight"), {}
    yield "logit_scale", without("logit_scale"), {}
    yield "visual.head.bias", {**state, "visual.head.bias": torch.zeros(3)}, {}
    yield "text.ln_final.bias", {**state, "ln_final.bias": torch.zeros(3)}, {}
    yield "visual.conv1.weight", {**state, "visual.conv1.weight": torch.zeros(3)}, {}
    yield "visual.conv1.weight", {**state, "visual.conv1.weight": torch.zeros(128, 3, 0, 0)}, {}
    yield "visual.proj", {**state, "visual.proj": torch.zeros(())}, {}
    for rows in (1, 16, 18):  # no patches, and no square
        wrong = {**state, "visual.positional_embedding": torch.zeros(rows, 128)}
        yield "visual.positional_embedding", wrong, {}
        yield "visual.positional_embedding", wrong, dict(image_size=48)
    yield "token_counts", {**state, "cap_fq": torch.zeros(1, 60)}, {}
    yield "text.token_embedding.weight", state, dict(vocab_size=70)
    yield "visual.transformer.resblocks.2.", state, dict(vision_layers=3)
    yield "text.transformer.resblocks.1.", state, dict(text_layers=1)
    yield "proj", state, dict(embed_dim=32)
    yield "head.ln.weight", state, dict(cls_weight=1)
    yield "logit_bias", state, dict(loss="sigmoid")


@pytest.mark.parametrize("name, state, changes", list(misfits()))
def test_a_misfit_is_an_input_error_that_names_file_and_tensor(name, state, changes, tmp_path):
    path = save(state, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=f"weights.pt.*({name})") as error:
        convert(path, **changes)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_misfit_in_a_checkpoint_of_this_project_is_an_input_error_too(tmp_path):
    model = small()
    path = save_ours(model, tmp_path / "best.pt")
    content = torch.load(path, weights_only=True)
    for name in ("text.positional_embedding", "head.linear.bias", "num_captions"):
        state = {k: v for k, v in content["model"].items() if k != name}
        with pytest.raises(InputError, match=f"best.pt.*{name}"):
            convert(save({**content, "model": state}, path))
    with pytest.raises(InputError, match="best.pt.*colour"):
        convert(save({**content, "config": {**content["config"], "colour": 3}}, path))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("write", ["torch", "pickle"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(write, tmp_path):
    path, mark = tmp_path / "evil.pt", tmp_path / "mark"
    content = {"state_dict": {**small().state_dict(), "x": Evil(mark)}}
    if write == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(InputError, match="evil.pt .*refused"):
        convert(path)
    assert not mark.exists()


def broken_files(folder):
    """Paths, and a word that the message must have."""
    state = open_clip_state(small())
    whole = save(state, folder / "whole.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    yield folder / "cut.pt", "damaged"
    (folder / "empty.pt").write_bytes(b"")
    yield folder / "empty.pt", "damaged"
    (folder / "prose.pt").write_text("These are no weights.\n")
    yield folder / "prose.pt", "damaged"
    (folder / "photo.pt").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(range(256)))
    yield folder / "photo.pt", "damaged"
    whole = save(state, folder / "whole.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    yield folder / "cut.safetensors", "damaged"
    yield save([torch.zeros(3)], folder / "list.pt"), "no weights"
    yield save(torch.zeros(3), folder / "tensor.pt"), "no weights"
    yield save({"state_dict": 3}, folder / "number.pt"), "no weights"
    yield save({"a": 1, 2: torch.zeros(3)}, folder / "other.pt"), "conv1"
    yield folder / "nowhere.pt", "no file"
    yield folder, "no file"


def test_a_file_without_weights_is_an_input_error_that_names_it(tmp_path):
    wrong = []
    for path, reason in broken_files(tmp_path):
        try:
            convert(path)
            wrong.append(f"{path.name}: converted")
        except InputError as error:
            if str(path) not in str(error) or reason not in str(error):
                wrong.append(f"{path.name}: {error}")
        except Exception as error:
            wrong.append(f"{path.name}: {error!r:.80}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, but OpenAI's files are made of it
def test_a_torchscript_archive_is_an_input_error_that_says_what_to_do(tmp_path):
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(path)
    with pytest.raises(InputError, match="ViT-B-32.pt is a TorchScript archive.*state_dict"):
        convert(path)


def test_safetensors_without_its_package_is_an_input_error(tmp_path, capsys, monkeypatch):
    path, _ = open_clip_file(tmp_path, ".safetensors")
    checkpoint = save_ours(small(), tmp_path / "best.pt")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    reading = error_of(capsys, main, path, tmp_path / "out.pt")
    writing = error_of(capsys, main, checkpoint, tmp_path / "o.safetensors", "--to", "open_clip")
    assert "pip install safetensors" in reading and "pip install safetensors" in writing


# -----------------------------------------------------------------------------
# The vocabulary, and where the output goes


def test_the_checkpoint_carries_clips_vocabulary_by_default(tmp_path):
    path, _ = open_clip_file(tmp_path, vocab_size=49408, text_width=64)
    assert not run(main, path, tmp_path / "out.pt")
    model, tokenizer, _ = evaluation.load(tmp_path / "out.pt")
    text = ["a photo of a cat"]
    assert torch.equal(tokenizer(text, 77), open_clip.get_tokenizer("ViT-B-32")(text))
    assert model.encode_text(tokenizer(text)).shape == (1, 24)


def test_a_vocabulary_of_another_size_is_an_input_error(tmp_path, capsys):
    path, _ = open_clip_file(tmp_path, vocab_size=301)
    ours = save_ours(small(vocab_size=301), tmp_path / "best.pt")
    for source, flags in ((path, ["--vocab", vocab_file(tmp_path)]), (path, []), (ours, [])):
        error = error_of(capsys, main, source, tmp_path / "out.pt", *flags)
        assert source.name in error and "301" in error and "--vocab" in error
    assert not (tmp_path / "out.pt").exists()


def test_vocab_replaces_the_vocabulary_of_a_checkpoint(tmp_path):
    other = data.tiktoken_text(data.BYTE_TOKENS[:256] + data.BYTE_TOKENS[-42:])
    path = save_ours(small(vocab_size=300), tmp_path / "best.pt", vocab=other)
    assert not run(main, path, tmp_path / "same.pt")
    assert evaluation.load(tmp_path / "same.pt")[1].vocab == other
    assert not run(main, path, tmp_path / "out.pt", "--vocab", vocab_file(tmp_path))
    assert evaluation.load(tmp_path / "out.pt")[1].vocab == VOCAB


def test_the_input_is_never_written_over(tmp_path, capsys):
    """Neither by its own name, nor through links, nor by the .json file of open_clip's layout."""
    path = save_ours(small(vocab_size=300), tmp_path / "best.pt")
    before = path.read_bytes()
    (tmp_path / "link.pt").symlink_to(path)
    (tmp_path / "link.json").symlink_to(path)
    relative = os.path.relpath(path)
    for output in (path, relative, tmp_path / "." / "best.pt", tmp_path / "link.pt"):
        assert "best.pt" in error_of(capsys, main, path, output)
        assert "best.pt" in error_of(capsys, main, path, output, "--to", "open_clip")
    as_json = path.rename(tmp_path / "best.json")
    out = tmp_path / "best.safetensors"
    assert "best.json" in error_of(capsys, main, as_json, out, "--to", "open_clip")
    assert as_json.read_bytes() == before and not out.exists()


def test_an_output_that_cannot_be_is_an_input_error(tmp_path, capsys):
    path = save_ours(small(vocab_size=300), tmp_path / "best.pt")
    assert "no folder" in error_of(capsys, main, path, tmp_path / "nowhere" / "out.pt")
    for name in ("out.safetensors", "out.json", "out"):
        assert ".pt" in error_of(capsys, main, path, tmp_path / name)
    assert ".pt" in error_of(capsys, main, path, tmp_path / "out.json", "--to", "open_clip")
    assert os.listdir(tmp_path) == ["best.pt"]


# -----------------------------------------------------------------------------
# Weights out


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_open_clip_loads_what_to_open_clip_writes(loss, suffix, tmp_path, capsys, monkeypatch):
    """The printed lines of Python give a model with the same features, scale and bias, and a
    preprocess with the mean and std of the configuration."""
    monkeypatch.chdir(tmp_path)
    stats = dict(image_mean=(0.5, 0.4, 0.3), image_std=(0.1, 0.2, 0.5))
    model = small(loss=loss, quick_gelu=suffix == ".pt", vocab_size=300, **stats)
    name = f"superclip-{loss}-{suffix[1:]}"
    path = save_ours(model, tmp_path / "best.pt")
    assert not run(main, path, f"{name}{suffix}", "--to", "open_clip")
    assert os.stat(f"{name}{suffix}").st_mode == os.stat(path).st_mode  # readable for others
    printed, scope = capsys.readouterr().out, {}
    exec("\n".join(line[2:] for line in printed.splitlines() if line.startswith("  ")), scope)
    other = scope["model"].eval()
    same_features(model, other)
    assert torch.equal(other.logit_scale, model.logit_scale)
    if loss == "sigmoid":
        assert torch.equal(other.logit_bias, model.logit_bias)
    normalize = scope["preprocess"].transforms[-1]
    assert (tuple(normalize.mean), tuple(normalize.std)) == tuple(stats.values())
    strict = open_clip.create_model(name).eval()
    open_clip.load_checkpoint(strict, f"{name}{suffix}", strict=True)
    same_features(model, strict)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_towers_and_configuration_survive_the_round_trip(suffix, tmp_path):
    """This project -> open_clip -> this project. What shapes do not tell is in the .json file. The
    word head is lost, since open_clip has none."""
    model = small(quick_gelu=True, vision_heads=4, text_heads=2, loss="sigmoid", vocab_size=300)
    path, out = save_ours(model, tmp_path / "best.pt"), tmp_path / f"theirs{suffix}"
    assert not run(main, path, out, "--to", "open_clip")
    assert not run(main, out, tmp_path / "again.pt", "--vocab", vocab_file(tmp_path))
    again, _, _ = evaluation.load(tmp_path / "again.pt")
    assert vars(again.config) == {**vars(model.config), "cls_weight": 0}
    ours = model.state_dict()
    lost = {k for k in ours if k.startswith(("head.", "token_counts", "num_captions"))}
    assert again.state_dict().keys() == ours.keys() - lost
    assert all(torch.equal(v, ours[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize("changes", [{}, dict(cls_weight=0), dict(loss="sigmoid", text_heads=4)])
def test_a_checkpoint_of_this_project_stays_what_it_is(changes, tmp_path, capsys):
    """Configuration, weights and statistics after a conversion that changes nothing."""
    model = small(quick_gelu=True, vocab_size=300, **changes)
    model.count_tokens(pairs(config=model.config)[1])
    assert not run(main, save_ours(model, tmp_path / "last.pt"), tmp_path / "out.pt")
    assert "assumed" not in capsys.readouterr().out
    again, tokenizer, _ = evaluation.load(tmp_path / "out.pt")
    assert again.config == model.config and tokenizer.vocab == VOCAB
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_vocabulary_of_words_is_said_not_to_fit_open_clips_tokenizer(tmp_path, capsys):
    """A note is printed for a word vocabulary, and none for CLIP's."""
    words = data.Tokenizer(words_to_tiktoken(["photo", "red", "ring"]))
    for tokenizer, fits in ((words, False), (data.Tokenizer.from_file("clip"), True)):
        model = small(vocab_size=tokenizer.vocab_size)
        path = save_ours(model, tmp_path / "best.pt", vocab=tokenizer.vocab)
        assert not run(main, path, tmp_path / "out.pt", "--to", "open_clip")
        assert ("tokenizer does not fit" in capsys.readouterr().out) != fits
