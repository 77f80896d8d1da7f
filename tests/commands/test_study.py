"""Test the study. No scored seed chooses a learning rate. Finished runs are kept, and are not used
for other code. The tables on the page agree with the runs."""

import itertools
import json
import math
import re
import shutil
from pathlib import Path
from statistics import mean

import pytest
import torch
from children import ROOT, finish
from material import small_model

import superclip
import train
from common import scenes
from common.checkpoint import DIVERGED
from common.cli import InputError
from common.tokenizer import Tokenizer
from study import compare, no_idf, plan, shuffled, some_words, warmup
from study.compare import read_command


def run_of(command, **values):
    """Return the run of a command. values: its scores in percent."""
    key = {"command": command.text(), "rate": command.rate, "seed": command.seed}
    scores = {name: {"value": value / 100, "chance": 0.1} for name, value in values.items()}
    key |= {"code": command.code(), "probe": [*command.probe]}
    return {**key, "scores": scores, "seconds": 1.0}


def test_an_interval_is_students():
    """The differences 1, 2, 3 have a standard deviation of 1. Student's t is 4.303."""
    assert compare.interval([1, 2, 3]) == pytest.approx((2, 4.303 / 3**0.5), rel=1e-3)


def test_the_sign_flip_test_counts_all_patterns_of_signs():
    """The slow formula makes each of the 2**8 patterns. A tie is not ahead."""
    differences = [3.1, -0.5, 0.0, 2.2, 0.7, -1.1, 4.0, 0.7]
    means = [
        abs(sum(sign * x for sign, x in zip(signs, differences)))
        for signs in itertools.product((1, -1), repeat=8)
    ]

    p = compare.sign_flip(differences)

    assert p == mean(x >= sum(differences) - 1e-6 for x in means)
    assert compare.sign_flip([1, 2, 3, 4]) == 2 / 2**4  # this pattern and its opposite
    assert compare.ahead(differences) == "5 of 8"


def test_the_default_rate_is_taken_if_it_is_about_as_good_as_the_best():
    """A rate is good if its score is within one point of the best. The default rate, which is 4, is
    taken if it is good. Otherwise the lowest good rate is taken."""
    assert compare.choose({2: 90.9, 4: 90.0, 8: 89.0}, 4) == 4
    assert compare.choose({2: 90.1, 4: 89.0, 8: 91.0}, 4) == 2


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Return the list of commands that were run. Their scores are made up. The best learning rate
    is 2e-4, and a rate of half or twice as much scores ten points less."""
    done = []

    def train_and_score(command):
        done.append(command)
        return run_of(command, colour_shape=70 - 10 * abs(math.log2(command.rate / 2e-4)))

    monkeypatch.setattr(compare, "OUT", tmp_path)
    monkeypatch.setattr(compare, "find_or_make_scenes", lambda folder, seed: None)
    monkeypatch.setattr(compare, "train_and_score", train_and_score)
    return done


def test_seeds_that_choose_a_rate_are_not_scored_and_no_run_is_made_twice(pretend):
    """At first the best rate is the lowest one. So a rate below it is tried, 1.25e-4. The command
    that names its learning rate keeps it. Only scored runs are made again for a probe."""
    argv = ["--a", "train.py --learning_rate 1e-4", "--b", "train.py"]
    argv += ["--rates", "0-1", "--by", "colour_shape", "--seeds", "15-17"]

    for probe in ([], [], ["--probe", "fit", "test"]):
        compare.main(argv + probe)

    runs = [(command.rate, command.seed) for command in pretend]
    choosing = [(rate, seed) for rate in (1.25e-4, 2.5e-4, 5e-4, 1e-3) for seed in (0, 1)]
    scored = [(rate, seed) for rate in (1e-4, 2.5e-4) for seed in (15, 16, 17)]
    assert sorted(runs) == sorted(choosing + 2 * scored)


def test_a_comparison_stops_when_the_code_changes(pretend, monkeypatch):
    run = run_of(read_command("train.py")) | {"code": "new"}
    monkeypatch.setattr(compare, "train_and_score", lambda command: run)

    with pytest.raises(InputError, match="code has changed"):
        compare.main(["--a", "train.py", "--b", "train.py --cls_weight 0"])


def test_a_rate_is_judged_by_the_score_that_is_named_or_by_the_mean_without_probes():
    run = run_of(read_command("train.py"), **{"colour": 30, "R@1": 50, "probe, class token": 99})

    assert compare.goal(run, "R@1") == 50
    assert compare.goal(run) == 40
    assert compare.goal(run_of(read_command("train.py")), "R@1") == 0  # it has diverged


@pytest.mark.parametrize("options", ["--cls_weight=0 --my_weight 1", "--init_from=x.pt"])
def test_a_command_has_the_learning_rate_that_train_py_gives_it(options):
    command = read_command("train.py", options)

    assert command.rate == train.parse(options.split()[:1]).learning_rate


def test_a_run_has_its_seed_in_its_options_and_its_key_has_not():
    text = "train.py --train_data 'fold{seed}/*.tar'"
    command = read_command(text).at(1e-3, seed=3)._replace(probe=("fold{seed}/fit", "x"))

    words = " ".join(command.words("out"))
    probe_words = " ".join(command.probe_words("out"))

    assert "--train_data fold3/*.tar --learning_rate 0.001 --seed 3 " in words
    assert "--train fold3/fit --test x " in probe_words
    assert command.text() == text


def test_other_text_is_other_code(monkeypatch, tmp_path):
    """The module may import the one beside it."""
    monkeypatch.chdir(tmp_path)
    names = ("train.py", "model.py", "common/scenes.py", "common/log.py")
    files = [Path(name) for name in (*names, "study/mine.py", "study/base.py")]
    command = read_command("-m study.mine")
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("x = 1\n")
    codes = {command.code()}

    for file in files:
        file.write_text("x = 2\n")
        codes.add(command.code())

    assert len(codes) == 1 + len(files)


def test_a_comparison_trains_both_variants_and_prints_every_score(
    shards, folders, children, monkeypatch, tmp_path, capsys
):
    """We fork the processes, because each new one would take seconds to import torch. The first run
    is reported as diverged, so it has no scores and is not probed."""

    def call(words, folder):
        code, printed = finish(children.start(Path(words[0]).stem, words[1:]))
        assert code == 0, printed
        return DIVERGED if len(children.started) == 1 else printed

    monkeypatch.setattr(compare, "call", call)
    monkeypatch.setattr(compare, "OUT", tmp_path)
    common = f"--train_data {shards}/train-*.tar --val_data {shards}/val-*.tar --steps 2"
    common += f" --zeroshot_data {folders} --model tiny --batch_size 8 --no-compile"
    argv = ["--a", "train.py --cls_weight 0", "--b", "train.py", "--common", common]
    probe = ["--probe", str(folders), f"{folders}/../{folders.name}-test"]
    shutil.copytree(folders, probe[2])

    compare.main([*argv, *probe, "--seeds", "5-6", "--jobs", "1"])

    printed = capsys.readouterr().out
    names = ("R@1", "R@10", folders.name, "probe, class token", "probe, untrained patch mean")
    assert all(name in printed for name in names)
    first, *others = map(json.loads, open(tmp_path / "runs.jsonl"))
    assert first["scores"] == {} and all(run["scores"] for run in others)


# ---- modules


@pytest.fixture
def model(monkeypatch):
    """Return a small model. train.main trains nothing here. After the test, the functions that a
    module has replaced are restored."""
    monkeypatch.setattr(train, "main", lambda argv: argv)
    for name in ("classification_loss", "idf"):
        monkeypatch.setattr(superclip, name, getattr(superclip, name))
    monkeypatch.setattr(train, "count_steps", train.count_steps)
    return small_model(vocab_size=6)


# The three captions consist of the words 1, 2 and 3. The tokens 4 and 5 are start and end.
CAPTIONS = torch.tensor([[4, 1, 2, 5], [4, 3, 5, 0], [4, 1, 5, 0]])


def test_without_idf_all_words_weigh_the_same(model):
    model.count_tokens(CAPTIONS)

    no_idf.main([])

    weights = superclip.idf(model.num_captions, model.token_counts)
    assert weights.tolist() == [0, 1, 1, 1, 0, 0]


CONTROLS = [(shuffled, ""), (warmup, "--share 0.5 --shuffled")]


@pytest.mark.parametrize("module, options", CONTROLS, ids=["shuffled", "warmup"])
def test_the_control_is_asked_for_the_words_of_another_pair(model, module, options):
    logits, weights = torch.rand(3, 6), torch.rand(6)
    expected = superclip.classification_loss(logits, CAPTIONS[[1, 2, 0]], weights)

    module.main(options.split())

    assert superclip.classification_loss(logits, CAPTIONS, weights) == expected


@pytest.mark.parametrize("share, steps", [(0.5, None), (0.7, 8), (0.1, 1)])
def test_a_warmup_is_a_share_of_the_steps(model, share, steps):
    """With half of them the schedule is that of train.py."""
    args = train.make_parser().parse_args(["--steps", "12"])
    expected = train.count_steps(args, 1000)

    rest = warmup.main(["--share", str(share), "--cls_weight", "0"])

    length, warmup_steps, eval_every = train.count_steps(args, 1000)
    assert (length, eval_every) == (expected[0], expected[2])
    assert warmup_steps == (steps or expected[1])
    assert rest == ["--cls_weight", "0"]


@pytest.mark.parametrize("kind, caption", [("colours", "red pink"), ("shapes", "star heart")])
def test_a_head_that_hears_some_words_is_asked_for_no_others(model, kind, caption):
    words = Tokenizer(scenes.vocabulary())
    whole, part = words(["a red star and a pink heart on plain teal", caption], 16).split(1)
    logits = torch.rand(1, words.vocab_size)
    weights = torch.ones(words.vocab_size)
    weights[[superclip.PAD, -2, -1]] = 0.0
    expected = superclip.classification_loss(logits, part, weights)

    some_words.main(["--hears", kind])

    assert superclip.classification_loss(logits, whole, weights) == expected


# ---- the published study

LINES = plan.PAGE.read_text("utf-8").splitlines()
DIFFERENCE = r"[\d.]+ ± \d+\.\d+"


def test_the_page_of_tables_is_what_plan_writes():
    assert plan.text_of(plan.TABLES).splitlines() == LINES


def test_the_tables_of_the_results_are_those_of_the_study():
    """One table is from older runs, so it is not among them."""
    page = (ROOT / "study" / "results.md").read_text("utf-8")
    tables = [table for table in page.split("\n\n") if table.startswith("|")]

    lines = [line for table in tables for line in table.splitlines() if "older runs" not in table]

    assert len(lines) > 30 and {*lines} <= {*LINES}


@pytest.mark.parametrize("page", ["README.md", "docs/data.md", "study/results.md"])
def test_each_difference_on_a_page_is_in_a_table_of_the_study(page):
    text = (ROOT / page).read_text("utf-8")
    older = " ".join(re.findall(r"(?m)^\| .+ \|$", text)) if "results" in page else ""

    differences = re.findall(DIFFERENCE, text)

    assert {*differences} <= {*re.findall(DIFFERENCE, " ".join(LINES) + older)}


def test_the_readme_has_the_answers_of_the_study():
    """A row of either page ends in its answer, and is known by its difference."""
    rows = [line.strip("| ").split(" | ") for line in LINES[: LINES.index("## Planned question")]]
    answers = {row[4]: row[-1] for row in rows if len(row) == 9}
    text = (ROOT / "README.md").read_text("utf-8")

    shown = [line.strip("| ").split(" | ") for line in text.splitlines() if " ± " in line]

    shown = {row[-4]: row[-1] for row in shown if len(row) > 6}
    assert len(shown) > 8
    assert shown.items() <= answers.items()


def test_the_costs_on_the_page_are_those_of_speed_md():
    page = (ROOT / "docs" / "speed.md").read_text("utf-8")

    assert all(cost in page for cost in plan.COST[2].split(", or "))


@pytest.mark.parametrize("arm", plan.ARMS)
def test_an_arm_has_all_its_seeds_and_the_rate_that_the_rule_chooses(arm):
    """Other arms than recipes and Flickr8k may have no scored runs. All scored runs of an arm have
    the same learning rate. The rates of recipes have a test of their own."""
    scored = [run for run in plan.runs_of(arm) if run["seed"] >= plan.FIRST_SCORED]
    seeds = ([], [*range(15, 25)], [*range(15, 30)])
    if arm.endswith(plan.TUNED):
        seeds = ([*range(30, 45)],)
    elif arm.endswith("Flickr8k"):
        seeds = ([*range(30, 40)],)

    rate, goals = plan.rates_of(arm)

    assert sorted(run["seed"] for run in scored) in seeds
    assert {run["rate"] for run in scored} <= {rate}
    if plan.TUNED not in arm:
        assert None in (rate, goals or None) or rate == compare.choose(goals, 5e-4)


@pytest.mark.parametrize("model", plan.MODELS)
def test_a_recipe_is_the_best_cell_of_the_search(model):
    """Seeds 0 and 1 score fifteen cells, whose best one is at no edge of the rates. The four best
    cells have six seeds, and the best of these four is scored."""
    cells = plan.search_of(model)
    first = plan.grid_of(model)
    four = sorted(first, key=first.get)[-4:]
    sums = {cell: sum(cells[cell].values()) for cell in four}
    arm = f"{model}, {plan.TUNED}"

    recipe = plan.RECIPES[model]

    assert first.keys() == {*itertools.product(plan.SHARES, plan.RATES)}
    assert plan.RATES[0] < max(first, key=first.get)[1] < plan.RATES[-1]
    assert {cell for cell in cells if sorted(cells[cell]) == [*range(6)]} == {*four}
    assert recipe == max(sums, key=sums.get)
    assert plan.rates_of(arm)[0] == recipe[1]


def test_clip_has_chosen_the_length_on_flickr8k():
    arms = {n: f"CLIP, Flickr8k, choice, {n} epochs" for n in (5, 10, 15)}
    goals = {n: plan.rates_of(arm)[1][5e-4] for n, arm in arms.items()}

    assert plan.LENGTH == max(goals, key=goals.get)


def test_holm_compares_each_p_with_what_is_left():
    """With four questions the limits are 0.0125, 0.0167, 0.025 and 0.05, in the order of the p."""
    assert plan.holm({11: 0.02, 12: 0.005, 13: 0.01, 14: 0.04}) == [12, 13, 11, 14]
    assert plan.holm({11: 0.03, 12: 0.005, 13: 0.01, 14: 0.04}) == [12, 13]
    assert plan.holm({11: 0.02, 12: 0.5, 13: 0.5, 14: 0.5}) == []


# (mean difference, half of its interval, whether it is planned and holds): the answer
ANSWERS = {
    (1, 2, True): "confirmed",
    (3, 2, False): "suggested",
    (1, 2, False): "not seen",
    (-1, 2, False): "not seen",
    (-1, 2, True): "against",
    (-3, 2, False): "against",
}


@pytest.mark.parametrize("facts", ANSWERS)
def test_a_claim_has_one_of_four_answers(facts):
    assert plan.answer(*facts) == ANSWERS[facts]
