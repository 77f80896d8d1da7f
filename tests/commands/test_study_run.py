"""A run of the study: its steps are train.py's, and its scores are right. Tiny runs of each kind of
data."""

import json
import math
import multiprocessing
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from material import COLOURS, TOKENIZER, Seer, png

import data
import train
from eval import read_checkpoint
from scripts import pack
from study import compare, run

TINY_RUN = {**run.RUN, "captions": "long", "samples": 64, "learning_rate": 1e-3}


def test_the_studys_steps_are_train_pys(shallow, few_looks, tmp_path):
    """20 steps on the same scenes, with one thread and without crops: weights and losses are equal
    to the bit."""
    run.prepare_scenes(tmp_path, 256, train=100, val=10)
    table = run.Table(tmp_path / "scenes-256-train.pt")
    tokenizer = data.Tokenizer(table.vocab)
    spec = {**run.RUN, "batch_size": 4, "samples": 80, "learning_rate": 3.5e-4, "seed": 5}
    command = (
        f"--train_data {tmp_path}/world-256/train-*.tar --val_data none --out_dir {tmp_path}/out "
        "--captions json.short json.long --model tiny --batch_size 4 --learning_rate 3.5e-4 "
        "--weight_decay 0.1 --crop_area 1 --seed 5 --steps 20 --workers 0 --log_every 1"
    )

    model = run.make_model(spec, tokenizer.vocab_size)
    losses, dtype = run.optimise(model, tokenizer, table, spec)
    train.main([*command.split(), "--dtype", dtype])

    weights = read_checkpoint(tmp_path / "out" / "last.pt")["model"]
    rows = [json.loads(line) for line in open(tmp_path / "out" / "log.jsonl")]
    last = [row for row in rows if row.get("step") == 20 and "loss" in row][-1]
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert losses == {name: last[name] for name in losses}


def test_groups_are_compared_within_themselves():
    whole = run.make_model({**run.RUN, "group": None}, 50)
    parted = run.make_model({**run.RUN, "group": 4}, 50)
    images, texts = torch.randn(2, 8, 128) / 12

    loss = parted.compare(images, texts)["contrastive_loss"]

    first = whole.compare(images[:4], texts[:4])["contrastive_loss"]
    second = whole.compare(images[4:], texts[4:])["contrastive_loss"]
    assert torch.allclose(loss, (first + second) / 2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param(
            dict(search="mean", cls_weight=0.0), {"R@1", "R@5", "R@10", "colour_shape"}, id="search"
        ),
        pytest.param(
            dict(group=8, captions="short", label_captions="long"),
            {"R@1", "colour_shape", "held_out", "probe shape", "choose swap"},
            id="groups with dual captions",
        ),
    ],
)
def test_a_run_on_scenes_is_scored_and_kept(
    shallow, few_looks, tmp_path, monkeypatch, changes, expected
):
    monkeypatch.setattr(run, "RANKED", 50)
    run.prepare_scenes(tmp_path, 16, train=100, val=50)
    spec = {**TINY_RUN, "settings": 16, **changes}

    result = run.run((spec, tmp_path), tmp_path / "model.pt")

    assert expected <= result["scores"].keys()
    assert read_checkpoint(tmp_path / "model.pt")["arguments"] == spec
    assert json.loads(json.dumps(result)) == result


@pytest.fixture
def objects(folders, tmp_path):
    """A folder of train/CLASS/ and test/CLASS/, as --objects takes it."""
    for split in ("train", "test"):
        shutil.copytree(folders, tmp_path / "objects" / split)
    return tmp_path / "objects"


def test_an_object_lies_in_a_corner_and_its_captions_name_it(objects, tmp_path):
    run.prepare_objects(tmp_path, 4, objects)

    table = run.Table(tmp_path / "objects-4-val.pt")
    tokenizer = data.Tokenizer(table.vocab)
    for image, tokens, fact in zip(table.images, table.tokens, table.facts):
        colour = torch.tensor(COLOURS[fact["object"].split()[1]])  # of the photograph
        corners = {(x, y): image[:, y:, x:][:, :32, :32] for x in (3, 37) for y in (3, 37)}
        shown = [
            [x / 72, y / 72, (x + 32) / 72, (y + 32) / 72]
            for (x, y), part in corners.items()
            if abs(part.double().mean(dim=(1, 2)) - colour).max() < 20
        ]
        setting, *texts = [tokenizer.decode(ids) for ids in tokens]
        assert shown == [fact["box"]]
        assert setting == fact["setting"]
        assert all(setting in text and fact["object"] in text for text in texts)


def test_a_run_on_objects_is_scored(shallow, objects, tmp_path):
    run.prepare_objects(tmp_path, 4, objects)
    spec = {**TINY_RUN, "data": "objects", "settings": 4, "batch_size": 4}

    scores = run.run((spec, tmp_path))["scores"]

    facts = run.Table(tmp_path / "objects-4-val.pt").facts
    sharing = Counter(fact["setting"] for fact in facts)
    blind = sum(1 / sharing[fact["setting"]] for fact in facts) / len(facts)
    assert math.isclose(scores["R@1"]["floor"], blind, rel_tol=1e-4)
    assert scores["zero-shot object"]["n"] == 12
    assert scores["probe object"]["n"] == 6
    assert scores["place, window 3 x 3"]["n"] == 12


@pytest.mark.parametrize(
    ("loudness", "value"), [(1, 1.0), (-1, 0.0)], ids=["looks at it", "looks away"]
)
def test_the_place_of_an_object_is_where_its_photograph_lies(loudness, value):
    """Four of 5 x 5 windows, or of 4 x 4, have their centre on a red photograph in a corner."""
    images = torch.zeros(4, 3, 72, 72, dtype=torch.uint8)
    facts = []
    for image, (x, y) in zip(images, ((3, 3), (37, 3), (3, 37), (37, 37))):
        image[0, y : y + 32, x : x + 32] = 255
        box = [x / 72, y / 72, (x + 32) / 72, (y + 32) / 72]
        facts.append({"object": "a red", "box": box})
    table = SimpleNamespace(images=images, facts=facts)

    scores = run.place_scores(Seer(loudness), TOKENIZER, table)

    small, large = scores["place, window 2 x 2"], scores["place, window 3 x 3"]
    assert (small["value"], small["chance"], small["n"]) == (value, 4 / 25, 4)
    assert (large["value"], large["chance"], large["n"]) == (value, 4 / 16, 4)


def test_a_new_product_shares_neither_file_nor_title_with_one_before_it():
    products = ("a Shoe", "b shoe", "a Hat", "c Belt", "d Bag", "e Cap")  # file and title
    facts = [{"sha256": product[0], "captions": [product[2:]]} for product in products]

    assert run.new_products(facts, range(6), {"belt", "e"}) == [0, 4]


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        pytest.param(False, {"zero-shot colour", "patch probe type", "words of type"}, id="run"),
        pytest.param("mean", {"R@1", "zero-shot type"}, id="search"),
    ],
)
def test_a_run_on_products_is_scored(shallow, tmp_path, monkeypatch, search, expected):
    monkeypatch.setattr(pack, "measure_speed", lambda device, dtype: 1e11)  # takes seconds
    monkeypatch.setattr(run, "VAL", 0.5)
    monkeypatch.setattr(run, "RANKED", 10)
    (tmp_path / "images").mkdir()
    rows = ["image,caption,type,colour,group"]
    for i, colour in enumerate(20 * [*COLOURS]):
        kind = f"{'ab'[i // 40]}-ring"
        picture = png(COLOURS[colour], np.random.default_rng(i))
        (tmp_path / "images" / f"{i}.png").write_bytes(picture)
        rows.append(f"{i}.png,{colour} {kind} {i},{kind}s,{colour},things")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    run.prepare_products(tmp_path, 256, tmp_path)
    spec = {**TINY_RUN, "data": "products", "batch_size": 8, **compare.DUAL, "search": search}

    scores = run.run((spec, tmp_path))["scores"]

    assert expected <= scores.keys()


def test_average_precision_by_hand():
    scores = torch.tensor([1, 4, 2, 3])
    right = torch.tensor([False, True, True, False])  # at ranks 1 and 3

    assert run.average_precision(scores, right) == (1 / 1 + 2 / 3) / 2


def test_work_makes_two_runs_of_64_samples(server, objects, tmp_path, monkeypatch):
    """In processes of its own, from data that it prepares."""
    context = multiprocessing.get_context("forkserver")  # a spawned one would have to import torch
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda _: context)
    study = compare.Study(tmp_path / "runs.jsonl")
    tiny = dict(data="objects", settings=4, batch_size=4, samples=64, learning_rate=1e-3)
    part = compare.Part("", compare.BEST_MEAN, 1, ("R@1",), [compare.both("tiny", **tiny)])

    compare.work(study, {"tiny": part}, {"objects": {"source": objects}}, jobs=1)

    results = [json.loads(line) for line in open(tmp_path / "runs.jsonl")]
    assert sorted(result["spec"]["cls_weight"] for result in results) == [0.0, 1.0]
    assert all("R@1" in r["scores"] and r["commit"] and r["date"] for r in results)
    assert study.todo(part) == []
