"""The study: pairs share seed and world, no scored seed has chosen a rate, finished runs are kept
and never taken for runs of other code, and the page is what the runs say."""

import json
import math
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from children import finish
from material import small_model

import scenes
import superclip
import train
from checkpoint import DIVERGED
from cli import InputError, interrupt
from study import compare, fast_tower, mean_patches, no_idf, plan, shop, shuffled, some_words
from study.compare import Side, Study, read_command
from tokenizer import Tokenizer


def run_of(**values):
    """What a run keeps of its log, with these scores in percent."""
    scores = {name: {"value": value / 100, "chance": 0.1} for name, value in values.items()}
    return {"scores": scores, "seconds": 1.0, "commit": "abc"}


# ---- differences


def test_an_interval_is_students_and_pairs_seeds():
    a = Side(None, {}, [run_of(x=value) for value in (10, 50, 90)])
    b = Side(None, {}, [run_of(x=value) for value in (11, 52, 93)])

    # the differences 1, 2, 3 have a standard deviation of 1, and t is 4.303: 4.303 / sqrt(3) is 2.5
    assert compare.cell([a, b], "x") == "50.0 -> 52.0, +2.0 ± 2.5"


# ---- the search for a learning rate


# {rate: percent}, and the rate that is taken if the default is 4
CHOICES = {
    "the default is within a point of the best": ({2: 90.9, 4: 90.0, 8: 89.0}, 4),
    "it is not, and the lowest is": ({2: 90.1, 4: 89.0, 8: 91.0}, 2),
    "the default was not tried": ({1: 20.0, 2: 25.0}, 2),
}


@pytest.mark.parametrize("goals, rate", CHOICES.values(), ids=CHOICES)
def test_the_default_rate_is_taken_if_it_is_about_as_good_as_the_best(goals, rate):
    assert compare.choose(goals, 4) == rate


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Runs and worlds are made up. A run tells its world. The best rate is 2e-4, and one of half as
    much or twice as much scores ten points less."""
    monkeypatch.setattr(compare, "OUT", tmp_path)

    def make_scenes(folder, seed):
        folder.mkdir(parents=True)
        (folder / "drawn").write_text(f"seed {seed}")

    def train_and_score(command, out_dir):
        value = 70 - 10 * abs(math.log2(command.rate / 2e-4))
        run = run_of(colour_shape=value)
        return {**run, "drawn": (command.world() / "scenes" / "drawn").read_text()}

    monkeypatch.setattr(compare, "train_and_score", train_and_score)
    monkeypatch.setattr(compare, "make_scenes", make_scenes)


def test_seeds_that_chose_a_rate_are_not_scored(pretend, tmp_path):
    """One rate is for all of them. It is searched around the one that a command names, too."""
    commands = ["train.py --learning_rate 2.5e-4", "train.py"]
    options = ["--a", commands[0], "--b", commands[1], "--rates", "--seeds", "3"]
    args = compare.make_options().parse_args(options)
    study = Study(tmp_path / "runs.jsonl")

    sides = study.answer([partial(compare.side_of, study, text, args) for text in commands], 2)

    for side in sides:
        searched = [[run["seed"] for run in runs] for runs in side.tried.values()]
        assert searched == 4 * [[*range(5)]]
        found = [(run["rate"], run["drawn"]) for run in side.runs]
        assert found == [(2.5e-4, f"seed {seed}") for seed in (5, 6, 7)]


@pytest.mark.parametrize("options", ["--cls_weight=0 --my_weight 1", "--init_from=x.pt"])
def test_a_command_has_the_learning_rate_that_train_py_gives_it(options):
    command = read_command(f"train.py {options}")

    assert command.rate == train.parse(options.split()[:1]).learning_rate


# ---- one run

FACTS = dict.fromkeys(["device", "dtype", "torch", "commit", "date"])
HEADER = {"step": 0, "header": FACTS}
SCORE = {"value": 0.5, "chance": 0.1, "n": 8, "interval": [0.2, 0.8]}
WAYS = {
    "image_to_text": {"R@1": {**SCORE, "value": 0.1}, "R@10": SCORE},
    "text_to_image": {"R@1": {**SCORE, "value": 0.3}, "R@10": SCORE},
}
ROW = {"step": 1, "zeroshot": {"w/x": SCORE}, "validation": WAYS}


def test_every_score_of_a_run_is_kept():
    run = {"scores": compare.scores_of(ROW)}

    values = [compare.value_of(run, name) for name in ("R@1", "R@10", "x")]
    assert values == pytest.approx([20, 50, 50])
    assert run["scores"]["x"] == SCORE


def test_a_run_has_its_seed_in_its_options_and_its_key_has_not():
    text = "train.py --train_data 'fold{seed}/*.tar'"
    command = read_command(text).at(1e-3, seed=3)

    words = " ".join(command.words("out"))

    assert "--train_data fold3/*.tar --learning_rate 0.001 --seed 3 " in words
    assert command.text() == text


# ---- code

FILES = ("train.py", "model.py", "scenes.py", "study/mine.py")


@pytest.mark.parametrize("name", FILES)
def test_other_text_is_other_code_and_another_line_end_is_not(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    for file in FILES:
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_bytes(b"x = 1\n")
    command = read_command("-m study.mine")
    before = command.code()

    Path(name).write_bytes(b"x = 1\r\n")
    assert command.code() == before
    Path(name).write_bytes(b"x = 2\n")
    assert command.code() != before


PROGRAM = '''"""It trains nothing. Once, its seed 6 is killed with the comparison."""
import os, pathlib, signal, sys, time

option = dict(zip(sys.argv, sys.argv[1:]))
killed = pathlib.Path(__file__).with_name("killed")
if option["--seed"] == "6" and not killed.exists():
    killed.touch()
    while not pathlib.Path(__file__).with_name("runs.jsonl").read_text():
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
pathlib.Path(option["--out_dir"], "log.jsonl").write_text(LOG)
'''


@pytest.fixture
def fork(monkeypatch, tmp_path):
    """A folder with a train.py of another project, and with the runs."""
    folder = tmp_path / "a fork"
    folder.mkdir()
    monkeypatch.setattr(compare, "OUT", folder)
    log = "\n".join(map(json.dumps, [HEADER, ROW]))
    (folder / "train.py").write_text(PROGRAM.replace("LOG", repr(log)))
    return folder


def test_a_run_that_fails_is_named_with_its_last_line(fork):
    program = fork / "train.py"
    program.write_text("import sys\nprint('first')\nsys.exit('its last line')")
    side = f"'{program}' --train_data a.tar"

    with pytest.raises(InputError, match=f"{program}.*its last line"):
        compare.main(["--a", side, "--b", side])


def test_a_run_that_diverged_scores_0(fork, tmp_path):
    program = fork / "train.py"
    program.write_text(f"{program.read_text()}sys.exit({DIVERGED!r})")
    (fork / "killed").touch()  # it has been already

    run = compare.train_and_score(read_command(f"'{program}' --train_data a.tar"), str(tmp_path))

    assert compare.value_of(run, "x") == 0 and compare.goal(run) == 0


def test_a_killed_comparison_goes_on(fork):
    command = f"'{fork}/train.py' --train_data a.tar"
    argv = ["--a", command, "--b", f"{command} --my_weight 1", "--seeds", "2", "--jobs", "1"]
    runs = fork / "runs.jsonl"
    signal.signal(signal.SIGTERM, interrupt)  # as run_command does it
    with pytest.raises(KeyboardInterrupt):
        compare.main(argv)
    before = runs.read_text()

    compare.main(argv)

    lines = runs.read_text()
    assert lines.startswith(before) and before.count("\n") == 2
    assert sorted(json.loads(line)["seed"] for line in lines.splitlines()) == [5, 5, 6, 6]


# ---- modules


@pytest.fixture
def model(monkeypatch):
    """A small model. What a module replaces comes back after the test, and it trains nothing."""
    monkeypatch.setattr(train, "main", lambda argv: argv)
    for owner, name in (
        (superclip, "classification_loss"),
        (superclip, "idf"),
        (superclip.SuperCLIP, "image_features"),
        (train, "make_optimizer"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    return small_model(vocab_size=6)


# Three captions of the words 1, 2 and 3. Two of the six tokens are start and end.
CAPTIONS = torch.tensor([[4, 1, 2, 5], [4, 3, 5, 0], [4, 1, 5, 0]])


def test_without_idf_all_words_weigh_the_same(model):
    model.count_tokens(CAPTIONS)

    no_idf.main([])

    assert model.token_weights().tolist() == [0, 1, 1, 1, 0, 0]


def test_a_shuffled_head_is_asked_for_the_words_of_another_pair(model):
    model.count_tokens(CAPTIONS)
    images = torch.rand(3, 3, 16, 16)
    logits = model.class_logits(images)
    losses = []
    for image, caption in ((0, 1), (1, 2), (2, 0)):
        pair = logits[[image]], CAPTIONS[[caption]]
        losses.append(superclip.classification_loss(*pair, model.token_weights()))

    shuffled.main([])

    found = model(images, CAPTIONS)["classification_loss"]
    torch.testing.assert_close(found, sum(losses) / 3)


@pytest.mark.parametrize("kind, caption", [("colours", "red pink"), ("shapes", "star heart")])
def test_a_head_that_hears_some_words_is_asked_for_no_others(model, kind, caption):
    """Its loss is that of a caption that has no other words."""
    words = Tokenizer(scenes.vocabulary())
    whole, part = words(["a red star and a pink heart on plain teal", caption], 16).split(1)
    logits = torch.rand(1, words.vocab_size)
    weights = torch.ones(words.vocab_size)
    weights[superclip.PAD] = 0.0
    weights[-2:] = 0.0
    expected = superclip.classification_loss(logits, part, weights)

    some_words.main(["--hears", kind])

    assert superclip.classification_loss(logits, whole, weights) == expected


def test_a_feature_can_be_the_mean_of_the_patches(model):
    images = torch.rand(2, 3, 16, 16)
    tokens = model.visual(images)
    patches = [tokens[:, i] @ model.visual.proj for i in range(1, tokens.shape[1])]

    mean_patches.main([])

    found = model.encode_image(images, normalize=False)
    torch.testing.assert_close(found, sum(patches) / len(patches))


def test_a_fast_image_tower_has_twice_the_rate_and_the_same_decay(model):
    usual = train.make_optimizer(model, 1e-3, 0.2)
    expected = {}
    tower = {*model.visual.parameters()}
    for group in usual.param_groups:
        for p in group["params"]:
            expected[p] = group["peak"] * (2 if p in tower else 1), group["weight_decay"]

    fast_tower.main([])

    groups = train.make_optimizer(model, 1e-3, 0.2).param_groups
    found = {p: (group["peak"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found == expected


def test_a_comparison_trains_both_variants_and_prints_every_score(
    shards, folders, children, monkeypatch, tmp_path, capsys
):
    """The processes are forked, because each would take seconds to import torch."""

    def call(words, folder):
        code, printed = finish(children.start("train", words[1:]))
        return printed if code else ""

    monkeypatch.setattr(compare, "call", call)
    monkeypatch.setattr(compare, "OUT", tmp_path)
    common = f"--train_data {shards}/train-*.tar --val_data {shards}/val-*.tar --steps 2"
    common += f" --zeroshot_data {folders} --model tiny --batch_size 8 --no-compile"
    argv = ["--a", "train.py --cls_weight 0", "--b", "train.py", "--common", common]

    compare.main([*argv, "--seeds", "2", "--jobs", "1"])

    printed = capsys.readouterr().out
    assert all(name in printed for name in ("R@1", "R@10", folders.name))


# ---- the shop's photographs


@pytest.fixture
def products():
    """400 products. From 101 to 399 each but one has a twin with its title, and 40 of the pictures
    are there twice."""
    rows = []
    for i in range(400):
        row = {"image": f"{i}.jpg", "caption": f"title {min(i, 500 - i)}"}
        row["type"] = "Tshirts" if i % 2 else "Tops"
        row["content"] = b"%d" % (i % 360)
        rows.append(row)
    return rows


def test_products_with_equal_titles_or_pictures_are_on_one_side(products):
    parts = shop.split(products, seed=0)

    for name in ("caption", "content"):
        sides = [{row[name] for row in part} for part in parts]
        assert all(sides)
        assert sum(map(len, sides)) == len(set.union(*sides))
    titles = [row["caption"] for row in products]
    assert all(titles.count(row["caption"]) == 1 for row in parts[1])


def test_another_seed_is_another_split(products):
    first, other, again = [shop.split(products, seed) for seed in (5, 6, 5)]

    assert first == again
    assert {row["image"] for row in first[0]} != {row["image"] for row in other[0]}


def test_a_split_has_a_folder_for_each_type(products, monkeypatch, tmp_path):
    monkeypatch.setattr(shop, "OUT", tmp_path / "shop")
    monkeypatch.setattr(shop, "SEEDS", [5])
    (tmp_path / "images").mkdir()
    names = ["image", "caption", "type"]
    lines = [",".join(names)]
    for row in products:
        (tmp_path / "images" / row["image"]).write_bytes(row["content"])
        lines.append(",".join(map(row.get, names)))
    (tmp_path / "pairs.csv").write_text("\n".join(lines))

    shop.main([str(tmp_path)])

    _, _, classified = shop.split(products, seed=5)
    for theirs, name in shop.TYPES.items():
        found = {path.name for path in (shop.OUT / "5" / "type" / name).iterdir()}
        assert found == {row["image"] for row in classified if row["type"] == theirs}


# ---- the plan and its page


def study_of(folder, *runs):
    """A study of runs that are made up. A run: its arm, rate and seed, and scores by name."""
    study = Study(folder / "runs.jsonl", any_code=True)
    for name, rate, seed, scores in runs:
        command = read_command(plan.ARMS[name].command).text()
        study.add({"command": command, "rate": rate, "seed": seed, **run_of(**scores)})
    return study


def searched(rates, score):
    """Runs of the seeds that choose the rate of A24/S: {rate: its score in percent}."""
    return [("A24/S", rate, seed, {score: x}) for rate, x in rates.items() for seed in range(3)]


SEARCHES = {  # {rate: percent}, and what is tried next, or None if the search has ended
    "the best lies inside": ({2.5e-4: 50, 5e-4: 60, 1e-3: 40}, None),
    "the best is the lowest": ({2.5e-4: 60, 5e-4: 50, 1e-3: 40}, 1.25e-4),
    "the best is the highest": ({2.5e-4: 40, 5e-4: 50, 1e-3: 60}, 2e-3),
    "a bound is reached": ({2.5e-4: 0, 5e-4: 10, 1e-3: 20, 2e-3: 30, 4e-3: 40}, None),
}


@pytest.mark.parametrize("score", ["colour_shape", "R@1"])
@pytest.mark.parametrize("rates, beyond", SEARCHES.values(), ids=SEARCHES)
def test_a_search_goes_on_until_the_best_rate_lies_inside(tmp_path, rates, beyond, score):
    """R@1 judges if no rate names anything."""
    study = study_of(tmp_path, *searched(rates, score))

    try:
        goals = plan.search(study, "A24/S")
    except compare.NotRun:
        assert {command.rate for command in study.wanted} == {beyond}
    else:
        assert beyond is None
        assert goals == rates


def test_a_row_is_searched_and_then_scored(pretend, tmp_path):
    """The best rate is between 1.25e-4 and 2.5e-4, where a search from 5e-4 arrives."""
    plan.main(["--run", "A24/S"])

    runs = [json.loads(line) for line in open(compare.OUT / "runs.jsonl")]
    chosen = {run["seed"] for run in runs if run["rate"] == 2.5e-4}
    assert chosen == {0, 1, 2, *range(15, 25)}
    assert {run["rate"] for run in runs if run["seed"] < 3} == {1.25e-4, 2.5e-4, 5e-4, 1e-3}


def test_only_a_primary_question_is_bold_and_its_interval_is_wider(tmp_path):
    """Ten seeds of one row, with differences whose mean is 10 and whose standard deviation is 3."""
    runs = []
    for row in ("D6", "A24"):
        for arm, base in (("C", 20), ("S", 30)):
            for rate in (2.5e-4, 5e-4, 1e-3):
                for seed in range(3):
                    value = base if rate == 5e-4 else 0
                    runs.append((f"{row}/{arm}", rate, seed, dict(type=value, colour_shape=value)))
            for seed in range(15, 25):
                extra = 3 * 0.9**0.5 * (-1) ** seed if arm == "S" else 0
                value = base + extra
                runs.append((f"{row}/{arm}", 5e-4, seed, dict(type=value, colour_shape=value)))
    study = study_of(tmp_path, *runs)

    primary = plan.cell(study, "type: D6/S - D6/C")
    other = plan.cell(study, "A24/S - A24/C")

    # 3.36 * 3 * sqrt(1/10 + 2,000/24,000), and 2.262 * 3 / sqrt(10)
    assert (primary, other) == ("**+10.0 ± 4.3**", "+10.0 ± 2.1")


def test_runs_of_two_commits_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "RUNS", tmp_path / "runs.jsonl")
    key = {"command": "train.py", "rate": 5e-4, "code": ""}
    lines = [{**key, "seed": seed, **run_of(), "commit": f"c{seed}"} for seed in (0, 1)]
    plan.RUNS.write_text("\n".join(map(json.dumps, lines)))

    with pytest.raises(InputError, match="commits"):
        plan.main([])


def test_the_pages_are_what_the_published_runs_say(monkeypatch, tmp_path):
    """They are, if they come back after all cells but the first of each line were emptied."""
    published = {}
    for name in ("RESULTS", "RATES"):
        text = getattr(plan, name).read_text()
        published[tmp_path / name] = text
        monkeypatch.setattr(plan, name, tmp_path / name)
        labels = "|".join(map(re.escape, [*plan.LINES, *plan.ARMS]))
        (tmp_path / name).write_text(re.sub(rf"^(\| (?:{labels}) \|).*", r"\1", text, flags=re.M))

    plan.main([])

    for path, text in published.items():
        assert path.read_text() == text
