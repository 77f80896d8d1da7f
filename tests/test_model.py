"""The model against the authors' code and open_clip, and weights that travel in and out."""

import math
import os
import pickle
from dataclasses import asdict
from pathlib import Path

import open_clip
import open_clip.model
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from superclip import IMAGE_MEAN, IMAGE_STD, PRESETS, InputError, SuperCLIP, SuperCLIPConfig

V, START, END = 60, 58, 59
SMALL = dict(image_size=32, patch_size=8, vision_width=128, vision_layers=2, text_width=64)
SMALL |= dict(text_layers=2, embed_dim=24, context_length=16, vocab_size=V)
OFFICIAL = torch.load(Path(__file__).parent / "official_tiny.pt", weights_only=True)


def small(**changes):
    """A small model away from its initial zeros and ones, so that no wrong weight goes unseen."""
    return stir(SuperCLIP(SuperCLIPConfig(**{**SMALL, **changes})).eval())


@torch.no_grad()
def stir(model):
    for name, p in model.named_parameters():
        if p.ndim == 1 and "class_embedding" not in name:  # biases and norms
            p += 0.1 * torch.randn_like(p)
    return model


def pairs(B=4, T=10, config=None):
    config = config or SuperCLIPConfig(**SMALL)
    V = config.vocab_size
    tokens = torch.randint(1, V - 2, (B, T))
    tokens[:, 0], tokens[:, -1] = V - 2, V - 1
    return torch.randn(B, 3, config.image_size, config.image_size), tokens


def close(mine, other, tolerance=1e-5):
    """Relative to the largest value: what "agrees to 1e-5 relative" means here."""
    assert mine.shape == other.shape
    assert (mine - other).abs().max() <= tolerance * other.abs().max()


@torch.no_grad()
def same_features(model, other, normalize=True, **shape):
    """Of our model on trimmed captions, and open_clip's, which wants the whole context."""
    images, tokens = pairs(config=model.config, **shape)
    padded = F.pad(tokens, (0, other.context_length - tokens.shape[1]))
    close(model.encode_image(images, normalize), other.encode_image(images, normalize))
    close(model.encode_text(tokens, normalize), other.encode_text(padded, normalize))


def open_clip_of(model, custom_text=False):
    """open_clip's own model with the same weights, loaded strictly."""
    kind = open_clip.model.CustomTextCLIP if custom_text else open_clip.model.CLIP
    other = kind(**model.open_clip_config()).eval()
    state = model.state_dict_open_clip()
    if custom_text:
        state = open_clip.model.convert_to_custom_text_state_dict(state)
    other.load_state_dict(state, strict=True)
    return other


# -----------------------------------------------------------------------------
# The towers


def test_a_later_token_changes_no_earlier_one():
    model, (_, tokens) = small(), pairs()
    read = []
    model.text.transformer.register_forward_hook(lambda module, args, out: read.append(out))
    model.encode_text(tokens)
    tokens[:, 6] = tokens[:, 6] % 50 + 1
    model.encode_text(tokens)
    before, after = read
    assert torch.equal(before[:, :6], after[:, :6])
    assert ((before[:, 6:] - after[:, 6:]).abs().amax(dim=2) > 1e-3).all()


def test_the_image_tower_is_not_causal():
    model, (images, _) = small(), pairs()
    tokens = model.visual(images)
    images[:, :, -8:, -8:] += 1  # the last patch
    assert ((model.visual(images) - tokens).abs().amax(dim=2) > 1e-4).all()


def test_what_comes_after_the_end_token_changes_nothing():
    model, (_, tokens) = small(), pairs(T=10)
    features = model.encode_text(tokens)
    for T in (11, 16):
        longer = F.pad(tokens, (0, T - 10))
        torch.testing.assert_close(model.encode_text(longer), features)
        longer[:, 10:] = torch.randint(1, V, (4, T - 10))  # even a second end token
        torch.testing.assert_close(model.encode_text(longer), features)
    tokens[:, 8] = tokens[:, 8] % 50 + 1  # before it, everything does
    assert ((model.encode_text(tokens) - features).abs().amax(dim=1) > 1e-4).all()


def test_uint8_images_equal_normalised_floats():
    model = small()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    floats = (images.float() / 255 - mean) / std
    torch.testing.assert_close(model.encode_image(images), model.encode_image(floats))
    torch.testing.assert_close(model.class_logits(images), model.class_logits(floats))


def test_features_have_length_one_unless_asked_otherwise():
    model, (images, tokens) = small(), pairs()
    for encode, x in ((model.encode_image, images), (model.encode_text, tokens)):
        torch.testing.assert_close(encode(x).norm(dim=1), torch.ones(4))
        torch.testing.assert_close(F.normalize(encode(x, normalize=False), dim=1), encode(x))
    out = model(images, tokens)
    torch.testing.assert_close(out["image_features"], model.encode_image(images))
    torch.testing.assert_close(out["text_features"], model.encode_text(tokens))


def test_keeping_all_patches_is_keeping_none_back():
    model, (images, _) = small(), pairs()
    keep = torch.arange(16).expand(4, 16)
    torch.testing.assert_close(model.encode_image(images, keep=keep), model.encode_image(images))
    torch.testing.assert_close(model.class_logits(images, keep), model.class_logits(images))


def test_keeping_some_patches_equals_open_clips_patch_dropout():
    model, (images, tokens) = small(), pairs()
    keep = torch.stack([torch.randperm(16)[:5] for _ in range(4)])
    other = open_clip_of(model)
    other.visual.patch_dropout.register_forward_hook(  # class token, then the patches that are kept
        lambda _, args, x: torch.stack([torch.cat([x[i, :1], x[i, 1:][keep[i]]]) for i in range(4)])
    )
    close(model.encode_image(images, keep=keep), other.encode_image(images, normalize=True))
    with_keep = model(images, tokens, keep=keep)["image_features"]
    torch.testing.assert_close(with_keep, model.encode_image(images, keep=keep))


def test_the_head_reads_the_mean_of_the_patches_without_the_class_token():
    model, (images, _) = small(), pairs()
    x = model.visual(images)[:, 1:]
    x = F.layer_norm(x.sum(dim=1) / 16, (128,), model.head.ln.weight, model.head.ln.bias)
    expected = x @ model.head.linear.weight.T + model.head.linear.bias
    close(model.class_logits(images), expected)


def test_cls_weight_0_is_exactly_clip():
    torch.manual_seed(1)
    clip = SuperCLIP(SuperCLIPConfig(**SMALL, cls_weight=0))
    torch.manual_seed(1)
    superclip = SuperCLIP(SuperCLIPConfig(**SMALL))
    other = open_clip.model.CLIP(**clip.open_clip_config())
    assert clip.head is None
    assert clip.state_dict_open_clip().keys() == other.state_dict().keys()
    images, tokens = pairs()
    out = clip.train()(images, tokens)
    assert torch.equal(out["loss"], out["contrastive_loss"]) and out["classification_loss"] == 0
    # the towers come first, so the head takes no random number from them
    contrastive = superclip(images, tokens)["contrastive_loss"]
    torch.testing.assert_close(out["contrastive_loss"], contrastive, rtol=0, atol=0)
    with pytest.raises(InputError, match="no word head"):
        clip.class_logits(images)


# -----------------------------------------------------------------------------
# Against the paper: parameter counts


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_are_the_papers():
    with torch.device("meta"):
        base = SuperCLIP(SuperCLIPConfig.preset("ViT-B-16"))
        large = SuperCLIP(SuperCLIPConfig.preset("ViT-L-16"))
    assert count(base.visual) == 86_192_640
    assert count(base.text) == 63_428_096
    assert count(base.head) == 37_996_288
    assert count(base) == 187_617_025 == 86_192_640 + 63_428_096 + 37_996_288 + 1
    assert count(large) == 478_384_641
    assert count(large.head) / (count(large) - count(large.head)) == pytest.approx(0.12, abs=0.005)
    assert count(base.head) / (count(base) - count(base.head)) == pytest.approx(0.25, abs=0.005)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_open_clips_model_of_that_name(name):
    ours, theirs = SuperCLIPConfig.preset(name), open_clip.get_model_config(name)
    with torch.device("meta"):
        model = SuperCLIP(ours)
        mine = model.open_clip_config()
        if theirs is None:
            assert name == "tiny"
            return
        other = open_clip.model.CLIP(**theirs)
        shapes = {k: v.shape for k, v in other.state_dict().items()}
    assert {k: v.shape for k, v in model.state_dict_open_clip().items()} == shapes
    heads = theirs["text_cfg"]["heads"], theirs["vision_cfg"].get("head_width", 64)
    assert (mine["text_cfg"]["heads"], mine["vision_cfg"]["head_width"]) == heads


def test_an_impossible_configuration_is_an_input_error():
    with pytest.raises(InputError, match="unknown model 'ViT-X'.*ViT-B-16"):
        SuperCLIPConfig.preset("ViT-X")
    for wrong in (dict(image_size=30), dict(vision_heads=3), dict(text_heads=5), dict(loss="mse")):
        with pytest.raises(InputError):
            SuperCLIPConfig(**{**SMALL, **wrong})


# -----------------------------------------------------------------------------
# Against the authors' code


def official_file(folder, wrap=""):
    path, state = folder / "official.pt", OFFICIAL["state_dict"]
    if wrap:
        state = {"epoch": 1, "name": "x", "state_dict": {wrap + k: v for k, v in state.items()}}
    torch.save(state, path)
    return path


def our_name(name):
    name = name.replace("text_decoder.ln_mlp", "head.ln")
    return name.replace("text_decoder.text_projection", "head.linear")


@pytest.mark.parametrize("wrap", ["", "module."])
def test_three_training_steps_equal_the_authors(wrap, tmp_path):
    """Features, logits, losses and, where the losses agree, every parameter's gradient norm."""
    model = SuperCLIP.from_pretrained(official_file(tmp_path, wrap)).train()
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


def test_official_counters_become_integer_counts(tmp_path):
    """They add up shares of captions over steps of 16,384: here 2 steps, 75 % and 33 of them."""
    state = dict(OFFICIAL["state_dict"])
    state["num_samples"] = torch.full((1, 1), 2.0, dtype=torch.float64)
    state["cap_fq"] = torch.zeros(1, 300, dtype=torch.float64)
    state["cap_fq"][0, 7], state["cap_fq"][0, 8] = 1.5, 33 / 16384 - 1e-9
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    model = SuperCLIP.from_pretrained(tmp_path / "a.pt")
    assert model.num_captions.item() == 2 * 16384
    assert (model.token_counts[7].item(), model.token_counts[8].item()) == (24576, 33)
    assert model.token_counts.dtype == model.num_captions.dtype == torch.int64
    assert model.token_weights()[8].item() == pytest.approx(math.log(32769 / 34))


# -----------------------------------------------------------------------------
# Against open_clip


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_small_towers_equal_open_clips(quick_gelu):
    model = small(quick_gelu=quick_gelu, patch_size=16)
    other = open_clip_of(model)
    same_features(model, other)
    same_features(model, other, normalize=False)
    same_features(model, other, T=16)  # the whole context
    wrong = small(quick_gelu=not quick_gelu, patch_size=16)
    wrong.load_state_dict(model.state_dict())
    with pytest.raises(AssertionError):  # the activation makes a difference that this test sees
        same_features(wrong, other)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_full_vit_b_32_equals_open_clips(quick_gelu):
    model = SuperCLIP(SuperCLIPConfig.preset("ViT-B-32", quick_gelu=quick_gelu, cls_weight=0))
    stir(model.eval())
    with torch.device("meta"):
        name = "ViT-B-32-quickgelu" if quick_gelu else "ViT-B-32"
        other = open_clip.model.CLIP(**open_clip.get_model_config(name))
    state = model.state_dict_open_clip()
    other.load_state_dict(state, strict=True, assign=True)
    other.attn_mask = torch.full((77, 77), -torch.inf).triu(1)  # a buffer, and so was on meta
    same_features(model, other.eval(), B=2, T=77)


# -----------------------------------------------------------------------------
# Weights in


def save(content, path):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


def test_a_checkpoint_of_this_project(tmp_path):
    heads = dict(quick_gelu=True, text_heads=4)
    for changes in ({}, dict(cls_weight=0), dict(loss="sigmoid"), heads):
        model = small(**changes)
        if model.head is not None:
            model.count_tokens(pairs()[1])
        content = {"model": model.state_dict(), "config": asdict(model.config), "step": 3}
        again = SuperCLIP.from_pretrained(save(content, tmp_path / "last.pt"))
        assert again.config == model.config
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("custom_text", [False, True])
def test_open_clips_layouts_and_a_new_head_that_is_said_to_be_new(
    custom_text, suffix, tmp_path, capsys
):
    other = open_clip_of(small(), custom_text)
    path = save(other.state_dict(), tmp_path / f"weights{suffix}")
    model = SuperCLIP.from_pretrained(path)
    assert "weights" in (said := capsys.readouterr().out) and "new" in said and "head" in said
    assert model.config == SuperCLIPConfig(**SMALL)
    same_features(model.eval(), other)
    assert model.head.linear.weight.std().item() == pytest.approx(128**-0.5, rel=0.1)
    assert model.num_captions.item() == 0
    plain = SuperCLIP.from_pretrained(path, cls_weight=0)
    assert plain.head is None and capsys.readouterr().out == ""


def test_a_model_trained_by_open_clip_with_its_optimizer_state(tmp_path):
    other = open_clip_of(small())
    state = {"module." + k: v for k, v in other.state_dict().items()}
    content = {"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"lr": 1e-3}}
    same_features(SuperCLIP.from_pretrained(save(content, tmp_path / "e3.pt")).eval(), other)


def test_openais_layout_in_half_precision_means_quick_gelu(tmp_path):
    other = open_clip_of(small(quick_gelu=True))
    open_clip.model.convert_weights_to_fp16(other)  # matrices; norms and embeddings stay fp32
    state = other.state_dict()
    assert state["visual.conv1.weight"].dtype == torch.float16
    openai = {k: torch.tensor(16) for k in ("input_resolution", "context_length", "vocab_size")}
    model = SuperCLIP.from_pretrained(save({**state, **openai}, tmp_path / "ViT.pt"))
    assert model.config.quick_gelu
    assert all(p.dtype == torch.float32 for p in model.parameters())
    same_features(model.eval(), other.float())


def test_positions_are_interpolated_as_in_open_clip(tmp_path):
    other = open_clip_of(small())
    path = save(other.state_dict(), tmp_path / "weights.pt")
    for image_size in (16, 48, 56):
        model = SuperCLIP.from_pretrained(path, image_size=image_size)
        bigger = open_clip.model.CLIP(**model.open_clip_config()).eval()
        state = dict(other.state_dict())
        open_clip.model.resize_pos_embed(state, bigger)
        bigger.load_state_dict(state, strict=True)
        assert model.visual.positional_embedding.shape == ((image_size // 8) ** 2 + 1, 128)
        same_features(model.eval(), bigger)


def test_a_shorter_context_is_a_part_of_the_longer_one(tmp_path):
    other = open_clip_of(small())
    path = save(other.state_dict(), tmp_path / "weights.pt")
    model = SuperCLIP.from_pretrained(path, context_length=12).eval()
    assert model.text.positional_embedding.shape == (12, 64)
    same_features(model, other)
    with pytest.raises(InputError, match="text.positional_embedding"):
        SuperCLIP.from_pretrained(path, context_length=20)


def test_the_number_of_heads_can_be_told_for_it_cannot_be_read(tmp_path):
    model = small(vision_heads=4, text_heads=2)
    path = save(model.state_dict_open_clip(), tmp_path / "weights.pt")
    again = SuperCLIP.from_pretrained(path, vision_heads=4, text_heads=2).eval()
    same_features(again, open_clip_of(model))


def misfits():
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
    yield "visual.proj", {**state, "visual.proj": torch.zeros(())}, {}
    yield "text.token_embedding.weight", state, dict(vocab_size=70)
    yield "visual.transformer.resblocks.2.", state, dict(vision_layers=3)
    yield "text.transformer.resblocks.1.", state, dict(text_layers=1)
    yield "proj", state, dict(embed_dim=32)


@pytest.mark.parametrize("name, state, changes", list(misfits()))
def test_a_misfit_is_an_input_error_that_names_file_and_tensor(name, state, changes, tmp_path):
    path = save(state, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=f"weights.pt.*({name})"):
        SuperCLIP.from_pretrained(path, **changes)


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
        SuperCLIP.from_pretrained(path)
    assert not mark.exists()


def broken_files(folder):
    state = small().state_dict_open_clip()
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
    yield save([torch.zeros(3)], folder / "list.pt"), "list.pt"
    yield save(torch.zeros(3), folder / "tensor.pt"), "tensor.pt"
    yield save({"a": 1}, folder / "other.pt"), "conv1"
    yield folder / "nowhere.pt", "no file"
    yield folder, "no file"


def test_a_file_that_holds_no_weights_is_an_input_error(tmp_path):
    wrong = []
    for path, reason in broken_files(tmp_path):
        try:
            SuperCLIP.from_pretrained(path)
            wrong.append(f"{path.name}: taken")
        except InputError as error:
            if str(path) not in str(error) or reason not in str(error):
                wrong.append(f"{path.name}: {error}")
        except Exception as error:
            wrong.append(f"{path.name}: {error!r:.80}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and OpenAI's files are made of it
def test_a_torchscript_archive_is_an_input_error_that_says_what_to_do(tmp_path):
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(path)
    with pytest.raises(InputError, match="ViT-B-32.pt is a TorchScript archive.*state_dict"):
        SuperCLIP.from_pretrained(path)


# -----------------------------------------------------------------------------
# Weights out


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_open_clip_loads_what_save_pretrained_writes(loss, suffix, tmp_path):
    model = small(loss=loss, quick_gelu=suffix == ".pt")
    name = f"superclip-{loss}-{suffix[1:]}"
    model.save_pretrained(tmp_path / f"{name}{suffix}")
    open_clip.add_model_config(tmp_path / f"{name}.json")
    other = open_clip.create_model(name, pretrained=str(tmp_path / f"{name}{suffix}")).eval()
    same_features(model, other)
    assert torch.equal(other.logit_scale, model.logit_scale)
    if loss == "sigmoid":
        assert torch.equal(other.logit_bias, model.logit_bias)
    strict = open_clip.create_model(name).eval()
    open_clip.load_checkpoint(strict, str(tmp_path / f"{name}{suffix}"), strict=True)
    same_features(model, strict)


def test_what_save_pretrained_writes_comes_back(tmp_path):
    """Also what tensors' shapes do not tell, for it stands in the .json beside them."""
    model = small(quick_gelu=True, vision_heads=4, text_heads=2, loss="sigmoid")
    model.save_pretrained(tmp_path / "out.pt")
    again = SuperCLIP.from_pretrained(tmp_path / "out.pt")
    assert again.config == model.config
