"""The measured numbers in docs/speed.md are those that scripts.bench has written, kept in
docs/bench/."""

import json
import re

import pytest
from children import ROOT

SPEED = (ROOT / "docs" / "speed.md").read_text()
KEPT = sorted((ROOT / "docs" / "bench").glob("*.json"))


def spread(values, unit=""):
    """Median, lowest and highest value as the page writes them."""
    digits = 0 if max(values) >= 10 else 2
    low, median, high = (f"{x:.{digits}f}" for x in values)
    return f"{median}{unit} ({low}-{high})"


def texts_of(row):
    """What the page must say of a row."""
    texts = []
    if "images/s" in row:
        texts.append(f"{row['images/s']:,.0f}")
    elif max(row["seconds"]) < 1:
        texts.append(spread([1000 * x for x in row["seconds"]], " ms"))
    else:
        texts.append(spread(row["seconds"], " s"))
    [ratio] = [value for key, value in row.items() if key.startswith("ratio")]
    if ratio != [1, 1, 1]:  # to itself
        texts.append(spread(ratio))
    return texts


CELLS = []
for path in KEPT:
    for row in json.loads(path.read_text())[1:]:
        name = row.get("step") or row["data"]
        if "matrix" not in name:
            CELLS += [(f"{path.stem}: {name}", text) for text in texts_of(row)]


@pytest.mark.parametrize("name, text", CELLS, ids=[f"{name} {text}" for name, text in CELLS])
def test_a_measured_number_stands_on_the_page(name, text):
    assert text in SPEED


def test_every_spread_on_the_page_was_measured():
    found = set(re.findall(r"\d[\d.]*(?: s| ms)? \(\d[\d.]*-\d[\d.]*\)", SPEED))

    assert found
    assert found <= {text for _, text in CELLS}
