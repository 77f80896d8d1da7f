"""Test the way from the bytes of a file to pixels. Every kind of picture is cropped and resized as
Pillow and torchvision do it."""

import io
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from material import cases, encoded, photo
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop

from common.images import FORMATS, BadSample, centre_square, load_image
from data import crop_box


def assert_looks_like(pixels, picture, box, most=1):
    """Assert that pixels are nearly those of Pillow's crop and antialiased bicubic resize. box: the
    crop, as x0, y0, x1 and y1; most: how much they may differ, as a mean over pixels with
    values up to 255."""
    resized = picture.convert("RGB").resize(pixels.shape[1:], Image.BICUBIC, box)
    assert np.abs(pixels.permute(1, 2, 0).numpy() - np.asarray(resized, int)).mean() < most


# ---- kinds of pictures

GREY = photo(5, mode="L")
WIDE = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 256)  # 16 bits
TURNED = Image.Exif()
TURNED[0x0112] = 6  # turned by a quarter
PICTURES = {  # case -> a file, and its picture, or None if Pillow reads the right one
    "CMYK JPEG": (encoded(photo(5, mode="CMYK")), None),
    "turned JPEG": (encoded(photo(3, (48, 32)), quality=95, exif=TURNED), None),
    "RGBA PNG": (encoded(Image.merge("RGBA", (*photo(5).split(), GREY)), "PNG"), None),
    "transparent palette": (encoded(photo(5).quantize(4), "PNG", transparency=0), None),
    "16 bits PNG": (encoded(WIDE, "PNG"), GREY),
}


@cases("content, picture", PICTURES)
def test_every_kind_of_picture_is_cropped_and_resized_as_pillow_does_it(content, picture):
    """The picture is as a viewer shows it on a white page. The crop is the largest square in the
    centre. An image of Pillow gives the same pixels."""
    picture = ImageOps.exif_transpose(picture or Image.open(io.BytesIO(content))).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)

    pixels = load_image(content, 24)

    assert pixels.shape == (3, 24, 24) and pixels.dtype == torch.uint8
    assert_looks_like(pixels, picture, centre_square(*picture.size))
    assert torch.equal(load_image(Image.open(io.BytesIO(content)), 24), pixels)


# ---- damaged files


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_damaged_file_is_a_bad_sample_whatever_pillow_raises():
    """Bytes are changed at random, most of them in the header."""
    rng = random.Random(0)
    damaged = []
    for i in range(1000):
        content = bytearray(encoded(photo(1), FORMATS[i % 5]))
        for _ in range(3):
            content[rng.randrange(rng.choice((80, len(content))))] = rng.randrange(256)
        damaged.append(content[: rng.choice((len(content), rng.randrange(len(content))))])

    bad = 0
    for content in damaged:
        try:
            load_image(bytes(content), 8)
        except BadSample:
            bad += 1

    assert 500 < bad < 1000


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_file_of_more_than_100_megapixels_is_a_bad_sample():
    """It has 12 KB, and would fill 100 MB. Pillow itself decodes it."""
    content = encoded(Image.new("1", (10_001, 10_000)), "PNG")

    with pytest.raises(BadSample, match="pixels"):
        load_image(content, 8)


def test_a_damaged_palette_is_a_bad_sample():
    """Pillow notices the damage after it has decoded the picture."""
    picture = Image.new("P", (1, 1))
    picture.info["transparency"] = bytes(257)  # of 256 colours

    with pytest.raises(BadSample):
        load_image(picture, 8)


# ---- crops


@pytest.mark.parametrize("width, height", [(400, 300), (60, 40), (31, 90)])
def test_random_crops_have_torchvisions_sizes(width, height):
    """The sizes are the same also if no random crop fits, as in a long picture."""
    numbers = SimpleNamespace(
        uniform=lambda low, high: torch.empty(1).uniform_(low, high).item(),
        randint=lambda low, high: torch.randint(low, high + 1, (1,)).item(),
    )
    image = torch.empty(3, height, width)
    for seed in range(100):
        torch.manual_seed(seed)
        x0, y0, x1, y1 = crop_box(width, height, 0.9, numbers)
        torch.manual_seed(seed)
        expected = RandomResizedCrop.get_params(image, (0.9, 1.0), (3 / 4, 4 / 3))

        assert (y1 - y0, x1 - x0) == expected[2:]


def test_a_random_crop_may_lie_anywhere():
    """In a picture of 8 x 6 pixels, crops begin at every pixel at which they fit."""
    boxes = [crop_box(8, 6, 0.3, random.Random(seed)) for seed in range(3000)]

    for first, last, side in ((0, 2, 8), (1, 3, 6)):  # x0 and x1 in the width, y0 and y1
        found = {(box[last] - box[first], box[first]) for box in boxes}
        assert found == {(size, at) for size, _ in found for at in range(side - size + 1)}


def test_what_is_not_random_is_in_the_centre():
    assert centre_square(60, 40) == (10, 0, 50, 40)
    assert centre_square(30, 90) == crop_box(30, 90, 1.0, None) == (0, 30, 30, 60)
    assert crop_box(30, 90, 0.9, random.Random(0)) == (0, 25, 30, 65)  # none fits
    assert crop_box(1, 1, 0.01, random.Random(1)) == (0, 0, 1, 1)


# ---- JPEG files that are decoded at a fraction of their size


@pytest.mark.parametrize("side", [48, 96, 193, 400])
def test_a_jpeg_decoded_at_a_fraction_keeps_its_detail(side):
    """A side of 193 pixels cannot be divided by 8, so most of the last decoded pixel is padding. An
    image of Pillow is decoded in full, so its pixels differ."""
    picture = photo(side, (side, side), detail=12)
    content = encoded(picture, quality=95)

    pixels = load_image(content, 24)

    assert_looks_like(pixels, picture, (0, 0, side, side), most=5)
    assert not torch.equal(pixels, load_image(Image.open(io.BytesIO(content)), 24))


def test_a_jpeg_decoded_at_a_fraction_is_never_cropped_past_its_edge():
    """Beyond the edge of a white picture there would be black pixels."""
    for seed in range(60):
        white = Image.new("RGB", random.Random(seed).choices(range(60, 400), k=2), "white")
        crop = partial(crop_box, crop_area=0.9, rng=random.Random(seed))

        pixels = load_image(encoded(white), 24, crop)

        assert pixels.min() == 255, white.size
