"""scripts/pack.py: options that decide what is read from a list and how images are written."""

import csv
import json

import pytest
from material import photo

import data
from scripts import pack


@pytest.fixture
def photos(tmp_path):
    """Three large photographs, and a list of them with columns for two kinds of captions."""
    rows = [["file", "caption", "alt"]]
    for i in range(3):
        photo(i, (600, 400), detail=60).save(tmp_path / f"{i}.png")
        rows.append([f"{i}.png", f"a long caption of photograph {i}", f"photograph {i}"])
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path


def pack_into(folder, *options):
    """Pack the list beside the folder. Returns the pairs of its shards."""
    pack.main(["--csv", str(folder.with_name("list.csv")), "--out", str(folder), *options])
    return data.Pairs(data.expand([str(folder)]), None, 16, ["txt"])


def test_a_lower_quality_makes_smaller_files(photos):
    pairs = pack_into(photos / "usual")
    worse = pack_into(photos / "worse", "--quality", "40")

    usual_bytes, worse_bytes = (
        sum(len(p.read(row, data.IMAGE)) for row in p.index.tolist()) for p in (pairs, worse)
    )
    assert worse_bytes < 0.6 * usual_bytes


def test_captions_are_those_of_the_column_that_is_named(photos):
    pairs = pack_into(photos / "out", "--caption_column", "alt")

    texts = {pairs.texts(row, "txt")[0] for row in pairs.index.tolist()}
    assert texts == {f"photograph {i}" for i in range(3)}
    fields = json.loads(pairs.read(pairs.index[0].tolist(), data.JSON))
    assert fields["caption"].startswith("a long caption")  # of another column, kept
