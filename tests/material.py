"""What several test files are made of: a small model, small pictures, small shards."""

import io
import json
import re
import tarfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
from cli import run_command
from data import words_to_tiktoken
from scripts.convert import open_clip_config, open_clip_state
from superclip import SuperCLIP, SuperCLIPConfig

TINY = dict(image_size=16, patch_size=4, vision_width=64, vision_layers=1, text_width=64)
TINY |= dict(text_layers=1, embed_dim=16)  # one head a tower; 16 patches
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220), "grey": (120,) * 3}


def png(colour, rng):
    """A noisy square of one colour, as the bytes of a PNG file."""
    noise = rng.integers(-30, 30, (20, 20, 3))
    buffer = io.BytesIO()
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def photo(seed=0, size=(40, 30), mode="RGB", detail=6):
    """A smooth random picture, so that JPEG and resizing change it little."""
    pixels = np.random.default_rng(seed).integers(0, 256, (detail, detail, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.BICUBIC).convert(mode)


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """members: list of (name, content as bytes, or a type of member that has no content)."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
                info.type, info.linkname, content = content, "a.jpg", b""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def write_shard(path, samples):
    """samples: a list of {extension: bytes}."""
    samples = enumerate(samples)
    return write_tar(path, [(f"{i:04d}.{x}", sample[x]) for i, sample in samples for x in sample])


def coloured(path, *captions):
    """A shard with a pair for each caption: a square of the colour that it names first, or red."""
    names = [re.search("|".join(COLOURS), caption.lower() + " red")[0] for caption in captions]
    pictures = [png(COLOURS[name], np.random.default_rng(i)) for i, name in enumerate(names)]
    return write_shard(path, [{"png": p, "txt": c.encode()} for p, c in zip(pictures, captions)])


# ---- for tests that evaluate a checkpoint

WORDS = "a photo picture of the red green blue grey square ring thing".split()
TOKENIZER = data.Tokenizer(words_to_tiktoken(WORDS))


def make_model(**changes):
    """A model with random weights, ready for inference."""
    torch.manual_seed(0)
    config = {**TINY, "vocab_size": TOKENIZER.vocab_size, **changes}
    return SuperCLIP(SuperCLIPConfig(**config)).eval()


def write_checkpoint(path, model, vocab=TOKENIZER.vocab):
    content = {"model": model.state_dict(), "config": asdict(model.config), "vocab": vocab}
    torch.save(content, path)
    return path


def run(main, *argv):
    """Run a command as a user does. Returns its exit code."""
    with pytest.raises(SystemExit) as ended:
        run_command(lambda _: main([str(a) for a in argv]))
    return ended.value.code


def error_of(capsys, main, *argv):
    """The sentence with which a command ends if the user has made a mistake."""
    capsys.readouterr()
    assert run(main, *argv) == 2, argv
    errors = capsys.readouterr().err.strip().splitlines()
    assert not any(line.startswith("Traceback") for line in errors)
    return errors[-1]


def result_of(capsys, main, path, *argv):
    """What a command writes with --json, and what it prints."""
    capsys.readouterr()
    assert not run(main, *argv, "--json", path)
    return json.loads(path.read_text()), capsys.readouterr().out


# ---- for tests of pages


def numbers_of(page):
    """The JSON that a page of scripts/report.py or scripts/demo.py carries."""
    text = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text(), re.S)
    return json.loads(text[1])


def same(numbers, tensor, tolerance=1e-3):
    return (torch.tensor(numbers, dtype=tensor.dtype) - tensor).abs().max() <= tolerance


def requests_of(browser):
    """The addresses that a browser has asked for since it was asked this before."""
    messages = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if "requestWillBeSent" in m["method"]]
    return {url for url in sent if not url.startswith("data:")}


# ---- for tests that compare with open_clip

SMALL = dict(image_size=32, patch_size=8, vision_width=128, vision_layers=2, text_width=128)
SMALL |= dict(text_layers=2, embed_dim=24, context_length=16, vocab_size=60)


@torch.no_grad()
def small(**changes):
    """A model with random biases and norms. At their initial zeros and ones, a bias in the wrong
    place would change nothing."""
    model = SuperCLIP(SuperCLIPConfig(**{**SMALL, **changes})).eval()
    for name, p in model.named_parameters():
        if p.ndim == 1 and "class_embedding" not in name:
            p += 0.1 * torch.randn_like(p)
    return model


def pairs(model, B=4, T=10):
    """Random images (B, 3, S, S) and captions (B, T) that start and end as captions do."""
    V, S = model.config.vocab_size, model.config.image_size
    tokens = torch.randint(1, V - 2, (B, T))
    tokens[:, 0], tokens[:, -1] = V - 2, V - 1
    return torch.randn(B, 3, S, S), tokens


def close(mine, other):
    """No element differs by more than 1e-5 of the largest one."""
    assert mine.shape == other.shape
    assert (mine - other).abs().max() <= 1e-5 * other.abs().max()


def open_clip_of(model, custom_text=False):
    """open_clip's CLIP with the same weights, in one of its two layouts."""
    import open_clip.model  # here, because that takes two seconds, also in processes of tests

    kind = open_clip.model.CustomTextCLIP if custom_text else open_clip.model.CLIP
    state, other = open_clip_state(model), kind(**open_clip_config(model.config)).eval()
    if custom_text:
        state = open_clip.model.convert_to_custom_text_state_dict(state)
    other.load_state_dict(state, strict=True)
    return other


@torch.no_grad()
def same_towers(model, other, **shape):
    """Image and text features of our model equal those of open_clip's, before and after they are
    normalised. Ours gets trimmed captions, open_clip's the same ones padded to the context."""
    images, tokens = pairs(model, **shape)
    padded = F.pad(tokens, (0, other.context_length - tokens.shape[1]))
    for normalize in (False, True):
        close(model.encode_image(images, normalize), other.encode_image(images, normalize))
        close(model.encode_text(tokens, normalize), other.encode_text(padded, normalize))
