"""The study: pairs share seed and world, no seed chooses its own rate, finished runs are kept and
never taken for runs of other code, and the page is what the runs say."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from children import finish
from material import small_model

import data
import superclip
import train
from cli import InputError
from eval import DIVERGED
from study import compare, groups, no_idf, objects, plan
from study.compare import Interval, Side, Study, World, next_rates, read_command

PAIR = [read_command(text, "", World(16)) for text in ("train.py --cls_weight 0", "train.py")]


def run_of(**values):
    """A finished run with these scores in percent."""
    scores = {name: {"value": value / 100, "chance": 0.1} for name, value in values.items()}
    return {"scores": scores, "seconds": 1.0, "commit": "abc"}


# ---- differences


def test_an_interval_is_students_and_pairs_seeds():
    a = Side(None, {1e-3: [run_of(x=value) for value in (10, 50, 90)]})
    b = Side(None, {1e-3: [run_of(x=value) for value in (11, 52, 93)]})

    found = compare.difference([a, b], "x")

    # the differences 1, 2, 3 have a standard deviation of 1, and t is 4.303
    assert found == pytest.approx((2, 4.3027 / math.sqrt(3)), abs=1e-3)
    assert not found.excludes_0()


def test_what_survives_is_found_from_the_largest_p_down():
    """p is 0.03, 0.04 and 0.5. Of two, 0.04 passes as the second (0.05), and takes 0.03 with it. Of
    three, each fails: 0.05 / 3, 0.1 / 3 and 0.05."""
    intervals = [Interval(t, 2.7764) for t in (3.298, 2.999, 0.741)]

    assert plan.survivors(intervals[:2]) == 2
    assert plan.survivors(intervals) == 0


# ---- the search for a learning rate


def test_no_seed_chooses_its_own_rate():
    goals = {1: [100, 0, 0], 2: [0, 60, 60]}
    side = Side(None, {rate: [run_of(x=goal) for goal in goals[rate]] for rate in goals})

    # without seed 0 the means are 0 and 60, and without one of the others 50 and 30
    assert side.rates() == [2, 1, 1]


@pytest.mark.parametrize(
    ("means", "more"),
    [([1, 3, 2, 0], []), ([1, 2, 3, 4], [16]), ([5, 5, 1, 0], [0.5]), ([*range(8)], [])],
    ids=["inside", "at an end", "of equal ones the lowest", "eight are enough"],
)
def test_a_search_goes_on_while_its_best_rate_is_at_an_end(means, more):
    goals = {2**i: [mean, mean] for i, mean in enumerate(means)}

    assert next_rates(goals) == more


@pytest.fixture
def pretend(monkeypatch):
    """Runs and worlds are made up: CLIP's best rate is 1e-4, SuperCLIP's 4e-4. Returns the list of
    the runs that were made."""
    made = []

    def make_scenes(folder, settings, seed):
        folder.mkdir()
        (folder / "drawn").write_text(f"{settings} settings, seed {seed}")

    def train_and_score(command, world, out_dir):
        drawn = world and (world / "drawn").read_text()
        made.append((command.line(), command.seed, drawn))
        optimum = 1e-4 if "--cls_weight 0 " in command.line() else 4e-4
        value = 90 - 10 * abs(math.log2(command.rate() / optimum)) + command.seed
        return run_of(**dict.fromkeys(plan.SCORES, value))

    monkeypatch.setattr(compare, "train_and_score", train_and_score)
    monkeypatch.setattr(compare, "make_scenes", make_scenes)
    return made


def test_both_sides_get_the_same_seeds_and_worlds_and_a_search_of_their_own(pretend, tmp_path):
    study = Study(tmp_path, 2, tmp_path / "runs.jsonl")

    a, b = study.experiment(PAIR, 3, search=True, probe=False)

    assert [*b.tried] == pytest.approx([8.75e-5, 1.75e-4, 3.5e-4, 7e-4])
    assert [*a.tried] == pytest.approx([4.375e-5, *b.tried])
    assert len(pretend) == 3 * (5 + 4)
    assert sorted({(seed, world) for _, seed, world in pretend}) == [
        (0, "16 settings, seed 0"),
        (1, "16 settings, seed 1"),
        (2, "16 settings, seed 2"),
    ]


def test_a_command_with_a_seed_of_its_own_is_refused():
    with pytest.raises(InputError, match="--seed"):
        read_command("train.py --seed 3", "", World())


# ---- one run

HEADER = {"step": 0, "header": dict.fromkeys(compare.FACTS)}
LOG = "\n".join(map(json.dumps, [HEADER, {"step": 1, "zeroshot": run_of(x=50)["scores"]}]))


@pytest.fixture
def called(monkeypatch):
    """Commands write what they would, but compute nothing. Returns the list of them."""
    lines = []

    def call(words):
        lines.append(" ".join(map(str, words)))
        option = dict(zip(words, words[1:]))
        if "--json" in option:
            option["--json"].write_text(json.dumps({"class token": {"value": 0.25}}))
        else:
            Path(option["--out_dir"], "log.jsonl").write_text(LOG)
        return DIVERGED if option.get("--learning_rate") == "1" else ""

    monkeypatch.setattr(compare, "call", call)
    return lines


def test_a_run_trains_and_probes_in_its_world(called, tmp_path):
    command = PAIR[0].at(1e-3, seed=3, probe=True)

    run = compare.train_and_score(command, Path("world3"), str(tmp_path))

    training, probing = called
    assert "--seed 3 " in training and "--train_data world3/train-" in training
    assert "--train world3/zeroshot/colour_shape --test world3/zeroshot/held_out" in probing
    assert [compare.value_of(run, name) for name in ("x", "probe")] == [50, 25]


def test_a_run_that_diverged_scores_0(called, tmp_path):
    command = PAIR[0].at(1, seed=0, probe=False)

    run = compare.train_and_score(command, Path("world0"), str(tmp_path))

    assert compare.value_of(run, "x") == 0


# ---- code


CODE = """'It trains'
x = 1  # it is a comment
"""
FILES = ("train.py", "superclip.py", "scripts/scenes.py", "study/mine.py")


@pytest.mark.parametrize(
    ("name", "old", "new", "runs"),
    [
        ("train.py", "a comment", "another", 0),
        ("train.py", "It trains", "It trained", 0),
        *[(name, "x = 1", "x = 2", 2) for name in FILES],
    ],
    ids=["a comment", "a docstring", *FILES],
)
def test_runs_of_other_code_are_not_found(pretend, monkeypatch, tmp_path, name, old, new, runs):
    monkeypatch.chdir(tmp_path)
    for file in map(Path, FILES):
        file.parent.mkdir(exist_ok=True)
        file.write_text(CODE)
    pair = [read_command("-m study.mine", "--train_data a.tar", None)] * 2

    for text in (CODE, CODE.replace(old, new)):
        pretend.clear()
        Path(name).write_text(text)
        Study(tmp_path, 2, tmp_path / "runs.jsonl").experiment(pair, 2, search=False, probe=False)

    assert len(pretend) == runs


PROGRAM = '''"""It trains nothing. Once, its seed 1 is killed with the comparison."""
import os, pathlib, signal, sys, time

option = dict(zip(sys.argv, sys.argv[1:]))
killed = pathlib.Path(__file__).with_name("killed")
if option["--seed"] == "1" and not killed.exists():
    killed.touch()
    while not pathlib.Path(__file__).with_name("runs.jsonl").read_text():
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
pathlib.Path(option["--out_dir"], "log.jsonl").write_text(LOG)
'''


@pytest.fixture
def fork(tmp_path):
    """A folder with a train.py of another project."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "scenes.py").touch()
    (tmp_path / "train.py").write_text(PROGRAM.replace("LOG", repr(LOG)))
    return tmp_path


def test_a_run_that_fails_is_named_with_its_last_line(fork):
    program = fork / "train.py"
    program.write_text("import sys\nprint('first')\nsys.exit('its last line')")
    side = f"{program} --train_data a.tar"

    with pytest.raises(InputError, match=f"{program}.*its last line"):
        compare.main(["--a", side, "--b", side, "--out", str(fork)])


def test_a_killed_comparison_goes_on(fork):
    command = f"{fork}/train.py --train_data a.tar"
    argv = ["--a", command, "--b", f"{command} --my_weight 1", "--out", str(fork)]
    argv += ["--seeds", "2", "--jobs", "1"]
    runs = fork / "runs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        compare.main(argv)
    before = runs.read_text()

    compare.main(argv)

    lines = runs.read_text()
    assert lines.startswith(before) and before.count("\n") == 2
    assert sorted(json.loads(line)["seed"] for line in lines.splitlines()) == [0, 0, 1, 1]


def test_groups_compare_each_image_with_its_group(monkeypatch):
    monkeypatch.setattr(superclip, "contrastive_loss", superclip.contrastive_loss)
    monkeypatch.setattr(train, "main", lambda argv: argv)
    model = small_model()
    images, texts = F.normalize(torch.randn(2, 8, 16), dim=2)

    def loss_of(images, texts):
        return model.pairs_together(images, texts, {})["contrastive_loss"]

    expected = sum(map(loss_of, images.split(4), texts.split(4))) / 2

    rest = groups.main("--group 4 --steps 9".split())

    assert rest == ["--steps", "9"]
    torch.testing.assert_close(loss_of(images, texts), expected)


def test_without_idf_all_words_weigh_the_same(monkeypatch):
    monkeypatch.setattr(superclip, "idf", superclip.idf)
    monkeypatch.setattr(train, "main", lambda argv: argv)
    model = small_model(vocab_size=6)
    model.token_counts += torch.arange(6)

    no_idf.main([])

    assert model.token_weights().tolist() == [0, 1, 1, 1, 0, 0]


# ---- worlds, runs and the page


def test_a_world_of_photographs_is_made_of_shards_and_class_folders(folders, monkeypatch, tmp_path):
    for name, n in (("TRAIN", 8), ("VAL", 2), ("CLASSIFIED", 4)):
        monkeypatch.setattr(objects, name, n)
    for side in ("train", "test"):
        (tmp_path / side).symlink_to(folders)

    objects.make_objects(tmp_path / "world", tmp_path, 16, seed=0)

    world = data.Shards([f"{tmp_path}/world/train-00000.tar"], ["json.long"])
    texts = [world.captions(i)[0] for i in range(len(world))]
    assert len(texts) == 8
    assert all(re.search("a (red|green|blue)", text) for text in texts)
    names = [path.parent.name for path in tmp_path.glob("world/zeroshot/object/*/*.jpg")]
    assert len(names) == 4 and {*names} <= {"red", "green", "blue"}


def test_a_comparison_trains_both_variants_and_prints_every_score(
    shards, folders, children, monkeypatch, tmp_path, capsys
):
    """The processes are forked, because each would take seconds to import torch."""

    def call(words):
        code, printed = finish(children.start("train", words[1:]))
        return printed if code else ""

    monkeypatch.setattr(compare, "call", call)
    common = f"--train_data {shards}/train-*.tar --val_data {shards}/val-*.tar --steps 20"
    common += f" --zeroshot_data {folders} --model tiny --batch_size 8"
    argv = ["--a", "train.py --cls_weight 0", "--b", "train.py", "--common", common]

    compare.main([*argv, "--seeds", "2", "--jobs", "1", "--out", str(tmp_path)])

    printed = capsys.readouterr().out
    assert all(name in printed for name in ("R@1", folders.name))


def test_the_page_shows_complete_rows_only(pretend, tmp_path):
    path = tmp_path / "runs.jsonl"
    plan.sides_of(Study(tmp_path, 2, path), "batch8")
    complete = plan.complete_rows(Study(tmp_path, 0, path))
    path.write_text(path.read_text().rpartition('{"command"')[0])  # without the last run

    assert [*complete] == ["batch8"]
    assert plan.complete_rows(Study(tmp_path, 0, path)) == {}


def test_the_page_does_not_mix_codes(pretend, monkeypatch, tmp_path):
    """A run of this train.py, and then one of a module in a fork, whose train.py is another."""
    path = tmp_path / "runs.jsonl"
    Study(tmp_path, 1, path).work([PAIR[0]])
    run = json.loads(path.read_text())
    fork = {**run, "program": "-m study.groups", "code": f"another-{run['code']}"}
    path.write_text(f"{json.dumps(run)}\n{json.dumps(fork)}\n")

    study = Study(tmp_path, 0, path)

    assert study.key(PAIR[0]) not in study.runs


def test_the_page_is_what_the_published_runs_say(tmp_path):
    found = plan.complete_rows(Study(tmp_path, 0, plan.RUNS))

    assert plan.RESULTS.read_text() == plan.page(found)
