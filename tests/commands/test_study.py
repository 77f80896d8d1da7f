"""The study: pairs share seed and world, no seed chooses its own rate, finished runs are kept and
never taken for runs of other code, and the page is what the runs say."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from children import ROOT
from material import TOKENIZER, make_model, photo

import data
import superclip
import train
from study import compare, groups, no_idf, objects, plan
from study.compare import Difference, Side, Study, World, best_rate, next_rates, read_command

PAIR = [read_command(text, "", World()) for text in ("train.py --cls_weight 0", "train.py")]


def run_of(**values):
    """A finished run with these scores in percent."""
    scores = {name: {"value": value / 100, "chance": 0.1} for name, value in values.items()}
    return {"scores": scores, "seconds": 1.0}


# ---- differences


def test_an_interval_is_students_and_pairs_seeds():
    a = Side(None, {1e-3: [run_of(x=value) for value in (10, 50, 90)]})
    b = Side(None, {1e-3: [run_of(x=value) for value in (11, 52, 93)]})

    found = compare.difference([a, b], "x")

    # the differences 1, 2, 3 have a standard deviation of 1, and t is 4.303
    assert found == pytest.approx((50, 52, 2, 4.3027 / math.sqrt(3)), abs=1e-3)
    assert not found.excludes_0()


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_quantiles_are_those_of_students_distribution(n):
    t = torch.linspace(0, compare.QUANTILES[n - 2], 100_001, dtype=torch.double)
    scale = math.gamma(n / 2) / math.gamma((n - 1) / 2) / math.sqrt((n - 1) * math.pi)

    inside = 2 * torch.trapezoid(scale * (1 + t**2 / (n - 1)) ** (-n / 2), t).item()

    assert inside == pytest.approx(0.95, abs=1e-5)


@pytest.mark.parametrize(("t", "p"), [(0, 1), (1.5332, 0.2), (2.7764, 0.05), (4.6041, 0.01)])
def test_the_probability_of_a_difference_is_that_of_the_tables(t, p):
    assert plan.p_of(Difference(0, 0, -t, compare.QUANTILES[3])) == pytest.approx(p, abs=1e-4)


def test_what_survives_is_found_from_the_largest_p_down():
    """p is 0.03, 0.04 and 0.5. Of two, 0.04 passes as the second (0.05), and takes 0.03 with it. Of
    three, each fails: 0.05 / 3, 0.1 / 3 and 0.05."""
    cells = [Difference(0, 0, t, compare.QUANTILES[3]) for t in (3.298, 2.999, 0.741)]

    assert plan.survivors(cells[:2]) == 2
    assert plan.survivors(cells) == 0


def test_a_run_that_diverged_scores_0():
    side = Side(None, {1e-3: [run_of(x=50), {"scores": {}, "seconds": 1.0}]})

    assert [compare.value_of(run, "x") for run in side.runs()] == [50, 0]


# ---- the search for a learning rate


def test_no_seed_chooses_its_own_rate():
    goals = {1: [100, 0, 0], 2: [0, 60, 60]}

    # without seed 0 the means are 0 and 60, and without one of the others 50 and 30
    assert [best_rate(goals, seed) for seed in range(3)] == [2, 1, 1]


@pytest.mark.parametrize(
    ("means", "more"),
    [
        pytest.param([1, 3, 2, 0], [], id="inside"),
        pytest.param([4, 3, 2, 0], [0.5], id="the lowest"),
        pytest.param([1, 2, 3, 4], [16], id="the highest"),
        pytest.param([5, 5, 1, 0], [0.5], id="of equal ones the lowest"),
        pytest.param([0, 1, 2, 3, 4, 5, 6, 7], [], id="eight are enough"),
    ],
)
def test_a_search_goes_on_while_its_best_rate_is_at_an_end(means, more):
    goals = {2**i: [mean, mean] for i, mean in enumerate(means)}

    assert next_rates(goals) == more


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Runs are made up: CLIP's best rate is 1e-4, SuperCLIP's 4e-4. Returns the list of those that
    were made."""
    made = []

    def train_and_score(command, world, out_dir):
        made.append((command.line(), command.seed, world))
        optimum = 1e-4 if "--cls_weight 0 " in command.line() else 4e-4
        value = 90 - 10 * abs(math.log2(command.rate() / optimum)) + command.seed
        names = ("R@1", "colour_shape", "held_out", "object", "probe")
        return run_of(**dict.fromkeys(names, value))

    monkeypatch.setattr(compare, "train_and_score", train_and_score)
    monkeypatch.setattr(World, "draw", lambda world, out, seed: f"{world} {seed}")
    return made


def test_both_sides_get_the_same_seeds_and_worlds_and_a_search_of_their_own(pretend, tmp_path):
    study = Study(tmp_path, 2, tmp_path / "runs.jsonl")

    a, b = study.experiment(PAIR, 3, search=True, probe=False)

    assert [f"{rate:.3g}" for rate in b.tried] == ["8.75e-05", "0.000175", "0.00035", "0.0007"]
    assert [f"{rate:.3g}" for rate in a.tried] == ["4.37e-05", *[f"{r:.3g}" for r in b.tried]]
    assert b.rates() == [3.5e-4] * 3
    assert len(pretend) == len({*pretend}) == 3 * (5 + 4)
    assert {(seed, world) for _, seed, world in pretend} == {
        (seed, f"scenes, 256 settings {seed}") for seed in range(3)
    }


# ---- code


@pytest.mark.parametrize(
    ("old", "new", "is_other"),
    [
        pytest.param("# ", "# indeed ", False, id="a comment"),
        pytest.param('"""CLIP\'s loss', '"""The loss', False, id="a docstring"),
        pytest.param("(num_captions + 1)", "(num_captions + 2)", True, id="code"),
    ],
)
def test_runs_of_other_code_are_not_found(pretend, tmp_path, old, new, is_other):
    for file in [*ROOT.glob("*.py"), ROOT / "scripts" / "scenes.py"]:
        copy = tmp_path / "fork" / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    pair = [read_command(f"{tmp_path}/fork/train.py", "", World())] * 2
    Study(tmp_path, 2, tmp_path / "runs.jsonl").experiment(pair, 2, search=False, probe=False)
    pretend.clear()
    changed = tmp_path / "fork" / "superclip.py"
    assert old in changed.read_text()

    changed.write_text(changed.read_text().replace(old, new))
    Study(tmp_path, 2, tmp_path / "runs.jsonl").experiment(pair, 2, search=False, probe=False)

    assert len(pretend) == (2 if is_other else 0)


def test_groups_compare_each_image_with_its_group(monkeypatch):
    monkeypatch.setattr(superclip, "contrastive_loss", superclip.contrastive_loss)
    monkeypatch.setattr(train, "main", lambda argv: argv)
    model = make_model()
    images, texts = F.normalize(torch.randn(2, 8, model.config.embed_dim), dim=2)

    rest = groups.main("--group 4 --steps 9".split())

    slow = []
    for i in range(8):
        group = slice(i // 4 * 4, i // 4 * 4 + 4)
        for one, others in ((images[i], texts[group]), (texts[i], images[group])):
            slow.append(-(others @ one * model.logit_scale.exp()).log_softmax(dim=0)[i % 4])
    loss = model.terms_between_pairs(images, texts)["contrastive_loss"]
    assert rest == ["--steps", "9"]
    assert loss.item() == pytest.approx(torch.stack(slow).mean().item(), rel=1e-5)


def test_without_idf_all_words_of_a_caption_share_alike(monkeypatch):
    monkeypatch.setattr(superclip, "idf", superclip.idf)
    monkeypatch.setattr(train, "main", lambda argv: argv)
    tokens = TOKENIZER(["the red ring", "a red red thing"])
    logits = torch.randn(2, TOKENIZER.vocab_size)

    no_idf.main([])

    counts = torch.arange(TOKENIZER.vocab_size)
    loss = superclip.classification_loss(logits, tokens, superclip.idf(torch.tensor(99), counts))
    slow = 0.0
    for row, words in zip(logits.log_softmax(dim=1), ("the red ring", "a red thing")):
        slow -= sum(row[i].item() for i in TOKENIZER.encode(words)) / 3 / 2
    assert loss.item() == pytest.approx(slow, rel=1e-5)


# ---- worlds, runs and the page


def test_a_world_of_photographs_is_made_of_shards_and_class_folders(monkeypatch, tmp_path):
    for name, n in (("TRAIN", 8), ("VAL", 2), ("CLASSIFIED", 4)):
        monkeypatch.setattr(objects, name, n)
    for i in range(20):
        path = tmp_path / ("train", "test")[i % 2] / ("cat", "dog")[i // 2 % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(i).save(path)

    for seed in (0, 1):
        objects.make_objects(tmp_path / f"world{seed}", tmp_path, 16, seed)

    worlds = [data.Shards([f"{tmp_path}/world{seed}/train-00000.tar"]) for seed in (0, 1)]
    texts = [[w.all_texts(row, ["json.long"]) for row in w.index.tolist()] for w in worlds]
    assert len(texts[0]) == 8 and texts[0] != texts[1]
    assert all("a cat" in text or "a dog" in text for text in sum(texts[0], []))
    assert len([*tmp_path.glob("world0/zeroshot/object/*/*.jpg")]) == 4


def test_a_killed_comparison_goes_on_and_prints_every_score(shards, folders, tmp_path, capsys):
    common = f"--train_data {shards}/train-*.tar --val_data {shards}/val-*.tar --steps 20"
    common += f" --zeroshot_data {folders} --model tiny --batch_size 8 --image_size 24"
    argv = ["--a", "train.py --cls_weight 0", "--b", "train.py", "--common", common]
    argv += ["--seeds", "2", "--out", str(tmp_path / "out")]
    runs = tmp_path / "out" / "runs.jsonl"
    command = [sys.executable, "-m", "study.compare", *argv, "--jobs", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (runs.exists() and runs.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    before = runs.read_text()

    compare.main(argv)

    lines = runs.read_text()
    assert lines.startswith(before) and 1 <= before.count("\n") < lines.count("\n") == 4
    assert sorted(json.loads(line)["seed"] for line in lines.splitlines()) == [0, 0, 1, 1]
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("2 scores", "R@1", folders.name, "seconds"))


def test_the_page_shows_complete_rows_only(pretend, tmp_path):
    path = tmp_path / "runs.jsonl"
    for name in plan.ROWS:
        plan.sides_of(Study(tmp_path, 2, path), name)
    *kept, last = path.read_text().splitlines()
    path.write_text("\n".join(kept))

    text = plan.page(plan.complete_rows(Study(tmp_path, 0, path)))

    missing = plan.ROWS["settings16"].label
    cells = sum(len(row.scores) for row in plan.ROWS.values()) - 3
    table = text.split("## All rows")[1].split("## A table")[0]
    assert table.count(" ± ") == cells <= 60 and f"\n{cells} differences" in table
    assert text.count(missing) == 1 and f"on\nthis page: {missing}." in text


def test_the_page_is_what_the_published_runs_say(tmp_path):
    found = plan.complete_rows(Study(tmp_path, 0, compare.PUBLISHED))

    assert plan.RESULTS.read_text() == plan.page(found)
