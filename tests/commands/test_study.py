"""Test the study: how two commands are compared, and that the pages show what the runs say."""

import itertools
import json
from pathlib import Path
from statistics import mean

import pytest
import torch
from children import ROOT, finish

import superclip
import train
from common.cli import InputError
from study import claims, compare, shuffled, warmup

# ---- compare


def test_an_interval_is_students():
    """The differences 1, 2, 3 have a standard deviation of 1. Student's t is 4.303."""
    assert compare.interval([1, 2, 3]) == pytest.approx((2, 4.303 / 3**0.5), rel=1e-3)


def test_the_sign_flip_test_counts_all_patterns_of_signs():
    """The slow formula makes each of the 2**8 patterns. A tie is not ahead."""
    differences = [3.1, -0.5, 0.0, 2.2, 0.7, -1.1, 4.0, 0.7]
    sums = [
        abs(sum(sign * x for sign, x in zip(signs, differences)))
        for signs in itertools.product((1, -1), repeat=8)
    ]

    p = compare.sign_flip(differences)

    assert p == mean(x >= sum(differences) - 1e-6 for x in sums)
    assert compare.sign_flip([1, 2, 3, 4]) == 2 / 2**4  # this pattern and its opposite
    assert compare.ahead(differences) == "5 of 8"


def test_finished_runs_are_kept_and_not_used_for_other_code(monkeypatch, tmp_path):
    """We make up the runs, and what the code of a command is."""
    done = []

    def train_and_score(task):
        done.append(task)
        command, seed, code = task
        scores = {"R@1": {"value": seed / 100, "chance": 0.1}}
        return {"command": command, "seed": seed, "code": code, "scores": scores}

    code = {"train.py": "1", "../fork/train.py": "1"}
    monkeypatch.setattr(compare, "OUT", tmp_path)
    monkeypatch.setattr(compare, "folder_of", lambda command, seed: None)
    monkeypatch.setattr(compare, "train_and_score", train_and_score)
    monkeypatch.setattr(compare, "code_of", code.get)

    argv = ["--a", "train.py", "--b", "../fork/train.py", "--seeds"]
    compare.main([*argv, "5-6"])
    compare.main([*argv, "5-7"])
    code["../fork/train.py"] = "2"
    compare.main([*argv, "5-7"])

    programs = "train.py", "../fork/train.py"
    kept = [(program, seed, "1") for program in programs for seed in (5, 6, 7)]
    again = [("../fork/train.py", seed, "2") for seed in (5, 6, 7)]
    assert sorted(done) == sorted(kept + again)


def test_other_text_is_other_code(monkeypatch, tmp_path):
    """The module may import the one beside it."""
    monkeypatch.chdir(tmp_path)
    names = ("train.py", "model.py", "common/scenes.py", "common/log.py")
    files = [Path(name) for name in (*names, "study/mine.py", "study/base.py")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("x = 1\n")
    codes = {compare.code_of("-m study.mine --my_weight 1")}

    for file in files:
        file.write_text("x = 2\n")
        codes.add(compare.code_of("-m study.mine --my_weight 1"))

    assert len(codes) == 1 + len(files)


def test_a_comparison_trains_both_variants_and_prints_every_score(
    shards, folders, children, monkeypatch, tmp_path, capsys
):
    """We fork the processes, because each new one would take seconds to import torch. A run whose
    code has changed meanwhile is an error."""

    def call(words, folder):
        code, printed = finish(children.start(Path(words[0]).stem, words[1:]))
        assert code == 0, printed

    monkeypatch.setattr(compare, "call", call)
    monkeypatch.setattr(compare, "OUT", tmp_path)
    data = f"--train_data {shards}/train-*.tar --val_data {shards}/val-*.tar --steps 2"
    data += f" --zeroshot_data {folders} --model tiny --batch_size 8 --no-compile"
    argv = ["--a", f"train.py --cls_weight 0 {data}", "--b", f"train.py {data}"]

    compare.main([*argv, "--seeds", "5-6", "--jobs", "1"])

    printed = capsys.readouterr().out
    assert all(name in printed for name in ("R@1", "R@10", folders.name))
    runs = [json.loads(line) for line in open(tmp_path / "runs.jsonl")]
    assert [run["seed"] for run in runs] == [5, 5, 6, 6]
    with pytest.raises(InputError, match="code"):
        compare.train_and_score((argv[1], 5, "the code before"))


# ---- modules


@pytest.fixture
def replaced(monkeypatch):
    """Let train.main train nothing. After the test, restore the functions that a module has
    replaced."""
    monkeypatch.setattr(train, "main", lambda argv: argv)
    monkeypatch.setattr(superclip, "classification_loss", superclip.classification_loss)
    monkeypatch.setattr(train, "count_steps", train.count_steps)


CONTROLS = [(shuffled, ""), (warmup, "--share 0.5 --shuffled")]


@pytest.mark.parametrize("module, options", CONTROLS, ids=["shuffled", "warmup"])
def test_the_control_is_asked_for_the_words_of_another_pair(replaced, module, options):
    """The three captions consist of the words 1, 2 and 3. The tokens 4 and 5 are start and end."""
    captions = torch.tensor([[4, 1, 2, 5], [4, 3, 5, 0], [4, 1, 5, 0]])
    logits, weights = torch.rand(3, 6), torch.rand(6)
    expected = superclip.classification_loss(logits, captions[[1, 2, 0]], weights)

    module.main(options.split())

    assert superclip.classification_loss(logits, captions, weights) == expected


@pytest.mark.parametrize("share, steps", [(0.5, None), (0.7, 8), (0.1, 1)])
def test_a_warmup_is_a_share_of_the_steps(replaced, share, steps):
    """With half of them the schedule is that of train.py."""
    args = train.make_parser().parse_args(["--steps", "12"])
    expected = train.count_steps(args, 1000)

    rest = warmup.main(["--share", str(share), "--cls_weight", "0"])

    length, warmup_steps, eval_every = train.count_steps(args, 1000)
    assert (length, eval_every) == (expected[0], expected[2])
    assert warmup_steps == (steps or expected[1])
    assert rest == ["--cls_weight", "0"]


# ---- claims


def test_the_results_have_the_tables_of_the_study():
    page = (ROOT / "study" / "results.md").read_text("utf-8")

    for table in claims.tables():
        assert f"\n\n{table}\n\n" in page


def test_the_readme_has_the_answers_of_the_study():
    """A row of either page ends in its answer, and is known by its difference."""
    rows = [line.strip("| ").split(" | ") for line in claims.tables()[0].splitlines()[2:]]
    answers = {row[-5]: row[-1] for row in rows}
    page = (ROOT / "README.md").read_text("utf-8")

    shown = [line.strip("| ").split(" | ") for line in page.splitlines() if " ± " in line]

    shown = {row[-4]: row[-1] for row in shown if len(row) > 6}
    assert len(shown) > 3 and shown.items() <= answers.items()


# (mean difference, half of its interval, whether it is planned and significant): the answer
ANSWERS = {
    (1, 2, True): "confirmed",
    (3, 2, False): "suggested",
    (1, 2, False): "not seen",
    (-1, 2, True): "not seen",
    (-3, 2, True): "against",
}


@pytest.mark.parametrize("facts", ANSWERS)
def test_a_claim_has_one_of_four_answers(facts):
    assert claims.answer(*facts) == ANSWERS[facts]
