"""The study: pairs share seed and world, no scored seed has chosen a rate, finished runs are kept
and never taken for runs of other code, and the pages are what the runs say."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from children import finish
from material import small_model

import superclip
import train
from cli import InputError
from docs import found
from eval import DIVERGED
from study import class_token, compare, groups, no_idf, plan, shop, shuffled, warmup
from study.compare import Side, Study, best_rate, next_rates, read_command

CLIP = read_command("train.py --cls_weight 0", "", 16)


def run_of(**values):
    """What a run keeps of its log, with these scores in percent."""
    scores = {name: {"value": value / 100, "chance": 0.1} for name, value in values.items()}
    return {"scores": scores, "ways": {}, "loss": 1.0, "seconds": 1.0, "commit": "abc"}


# ---- differences


def test_an_interval_is_students_and_pairs_seeds():
    a = Side(None, {}, [run_of(x=value) for value in (10, 50, 90)])
    b = Side(None, {}, [run_of(x=value) for value in (11, 52, 93)])

    # the differences 1, 2, 3 have a standard deviation of 1, and t is 4.303: 4.303 / sqrt(3) is 2.5
    assert compare.cell([a, b], "x") == "50.0 -> 52.0, +2.0 ± 2.5"


@pytest.mark.parametrize(
    ("differences", "is_bold"),
    [([2.0, 2.1, 2.2], True), ([-1.0, 0.0, 1.1], False), ([2.0, 2.1], False), ([-0.5] * 3, False)],
    ids=["three that agree", "around 0", "two seeds", "no spread"],
)
def test_an_interval_is_bold_if_three_seeds_or_more_exclude_0(differences, is_bold):
    assert ("**" in compare.interval(differences)) == is_bold


def test_runs_that_diverged_are_counted(capsys):
    command = CLIP.at(1e-4, seed=5)
    a = Side(command, {}, [run_of(), run_of(), run_of(x=3)])
    b = Side(command, {}, [run_of(x=1), run_of(x=2), run_of(x=3)])

    compare.print_sides([a, b])

    [line] = [line for line in capsys.readouterr().out.splitlines() if "diverged" in line]
    assert re.findall(r"\d+", line)[:2] == ["2", "3"]


# ---- the search for a learning rate


def test_of_equal_rates_the_lowest_is_chosen():
    assert best_rate({1: [0, 4], 2: [5, 5], 4: [10, 0], 8: [1, 1]}) == 2


@pytest.mark.parametrize(
    ("goals", "more"),
    [
        ([[1], [3], [2], [0]], []),
        ([[1], [2], [3], [4]], [16]),
        ([[5], [5], [1], [0]], [0.5]),
        ([[9, 9, 0], [8, 8, 9], [0, 0, 0]], []),
        ([[i] for i in range(8)], []),
    ],
    ids=["inside", "an end", "a tie", "an end for most seeds", "eight are enough"],
)
def test_a_search_goes_on_beyond_an_end_that_is_best(goals, more):
    assert next_rates({2**i: seeds for i, seeds in enumerate(goals)}) == more


@pytest.mark.parametrize(
    ("values", "end"), [((1, 2, 3), "highest"), ((3, 2, 1), "lowest"), ((1, 3, 2), "")]
)
def test_a_best_rate_that_is_an_end_is_said_to_be_one(values, end):
    tried = {rate: [run_of(x=value)] for rate, value in zip((1, 2, 4), values)}

    assert re.findall("lowest|highest", compare.rates_text(tried)) == end.split()


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Runs and worlds are made up: the best rate of lambda 3 is 1e-4, that of others 4e-4. Returns
    the list of the runs that were made."""
    monkeypatch.setattr(compare, "OUT", tmp_path)
    made = []

    def make_scenes(folder, settings, seed):
        folder.mkdir()
        (folder / "drawn").write_text(f"{settings} settings, seed {seed}")

    def train_and_score(command, world, out_dir):
        made.append((command.rate(), command.seed, (world / "drawn").read_text()))
        optimum = 1e-4 if "--cls_weight 3 " in command.line() else 4e-4
        value = 70 - 10 * abs(math.log2(command.rate() / optimum)) + command.seed
        return run_of(**dict.fromkeys(plan.SCORES, value))

    monkeypatch.setattr(compare, "train_and_score", train_and_score)
    monkeypatch.setattr(compare, "make_scenes", make_scenes)
    return made


def experiment(folder, a, b, *options):
    """The sides of an experiment."""
    args = compare.make_options().parse_args(["--a", a, "--b", b, "--settings", "16", *options])
    return Study(2, folder / "runs.jsonl").experiment(args)


def test_seeds_that_chose_a_rate_are_not_scored(pretend, tmp_path):
    options = "--rates --search_seeds 2 --seeds 3".split()

    a, b = experiment(tmp_path, "train.py --cls_weight 3", "train.py", *options)

    # one rate for all: for lambda 3 the best is the lowest at first, so one more is tried
    assert [*a.tried] == pytest.approx([8.75e-5, 1.75e-4, 3.5e-4, 7e-4, 4.375e-5])
    assert [side.command.rate() for side in (a, b)] == pytest.approx([8.75e-5, 3.5e-4])
    assert sorted(seed for _, seed, _ in pretend if seed < 5) == [0] * 9 + [1] * 9
    scored = sorted(run for run in pretend if run[1] >= 5)
    worlds = [(seed, f"16 settings, seed {seed}") for seed in (5, 6, 7)]
    assert scored == [(rate, *world) for rate in (8.75e-5, 3.5e-4) for world in worlds]


def test_a_command_that_names_its_rate_is_not_searched(pretend, tmp_path):
    options = "--rates 0.5 1 --search_seeds 1 --seeds 2".split()

    a, b = experiment(tmp_path, "train.py --learning_rate 3e-3", "train.py", *options)

    assert a.tried == {} and a.command.rate() == 3e-3
    # these factors and no others, though the best is at an end
    assert [*b.tried] == pytest.approx([1.75e-4, 3.5e-4])
    assert b.command.rate() == pytest.approx(3.5e-4)


def test_a_search_of_rates_that_all_diverge_ends_with_a_sentence(pretend, monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "train_and_score", lambda *args: run_of())

    with pytest.raises(InputError, match="train.py --steps 9 .*diverged"):
        experiment(tmp_path, "train.py --steps 9", "train.py --steps 8", "--rates")


@pytest.mark.parametrize(
    "options", ["", "--cls_weight 0", "--cls_weight=0 --batch_size 8", "--train_data x.tar"]
)
def test_a_command_has_the_learning_rate_that_train_py_gives_it(options):
    command = read_command(f"train.py {options}", "", 256)

    assert command.rate() == train.parse(options.replace("=", " ").split()).learning_rate


@pytest.mark.parametrize("text", ["", "-m", "train.py 'x", "train.py --seed 3", "no/train.py"])
def test_what_is_no_command_is_a_sentence(text):
    with pytest.raises(InputError):
        read_command(text, "", 16)


# ---- one run

HEADER = {"step": 0, "header": dict.fromkeys(compare.FACTS)}
SCORE = {"value": 0.5, "chance": 0.1, "n": 8, "interval": [0.2, 0.8]}
WAYS = {
    "image_to_text": {"R@1": {**SCORE, "value": 0.1}, "R@10": SCORE},
    "text_to_image": {"R@1": {**SCORE, "value": 0.3}, "R@10": SCORE},
}
ROW = {"step": 1, "zeroshot": {"w/x": SCORE}, "validation": WAYS, "val_contrastive_loss": 0.7}
LOG = "\n".join(map(json.dumps, [HEADER, ROW]))


@pytest.fixture
def called(monkeypatch):
    """Commands write what they would, but compute nothing. Returns the list of them."""
    lines = []

    def call(words):
        lines.append(" ".join(map(str, words)))
        option = dict(zip(words, words[1:]))
        Path(option["--out_dir"], "log.jsonl").write_text(LOG)
        return DIVERGED if option["--learning_rate"] == "1" else ""

    monkeypatch.setattr(compare, "call", call)
    return lines


def test_a_run_trains_in_its_world_and_keeps_every_score(called, tmp_path):
    run = compare.train_and_score(CLIP.at(1e-3, seed=3), Path("world3"), str(tmp_path))

    assert "--seed 3 " in called[0] and "--train_data world3/train-" in called[0]
    values = [compare.value_of(run, name) for name in ("R@1", "R@10", "x", "loss")]
    assert values == pytest.approx([20, 50, 50, 0.7])
    assert run["scores"]["x"] == SCORE and run["ways"] == WAYS


def test_a_seed_in_an_option_is_replaced_when_it_runs_but_not_in_the_key(called, tmp_path):
    command = read_command("train.py --train_data 'fold{seed}/*.tar'", "", 256).at(1e-3, seed=7)

    compare.train_and_score(command, Path("no world"), str(tmp_path))

    assert "--train_data fold7/*.tar" in called[0]
    line, _, seed, _ = command.key("its code")
    assert "fold{seed}/*.tar" in line and seed == 7


def test_a_run_that_diverged_scores_0(called, tmp_path):
    run = compare.train_and_score(CLIP.at(1, seed=0), Path("world0"), str(tmp_path))

    assert compare.value_of(run, "x") == 0 and compare.goal(run) == 0


def test_a_run_without_any_score_ends_with_a_sentence(called, monkeypatch, tmp_path):
    row = {"step": 1, "zeroshot": {}}
    monkeypatch.setitem(globals(), "LOG", "\n".join(map(json.dumps, [HEADER, row])))

    with pytest.raises(InputError, match="--val_data"):
        compare.train_and_score(CLIP.at(1e-3, seed=3), Path("world3"), str(tmp_path))


def test_sides_without_a_loss_have_no_interval():
    side = Side(None, {}, [{"scores": {}}, {"scores": {}}])  # two seeds that have diverged

    assert compare.cell([side, side], "loss") == "nan -> nan, +nan ± nan"


# ---- code

FILES = ("train.py", "model.py", "scripts/scenes.py", "study/mine.py")


@pytest.mark.parametrize("name", FILES)
def test_other_text_is_other_code_and_another_line_end_is_not(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    for file in FILES:
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_bytes(b"x = 1\n")

    def code():
        compare.drawing_code.cache_clear()  # as in another process
        return read_command("-m study.mine", "", 16).code()

    before = code()
    Path(name).write_bytes(b"x = 1\r\n")
    assert code() == before
    Path(name).write_bytes(b"x = 2\n")
    assert code() != before
    compare.drawing_code.cache_clear()


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
    (folder / "train.py").write_text(PROGRAM.replace("LOG", repr(LOG)))
    return folder


def test_a_run_that_fails_is_named_with_its_last_line(fork):
    program = fork / "train.py"
    program.write_text("import sys\nprint('first')\nsys.exit('its last line')")
    side = f"'{program}' --train_data a.tar"

    with pytest.raises(InputError, match=f"{program}.*its last line"):
        compare.main(["--a", side, "--b", side])


def test_a_killed_comparison_goes_on(fork):
    command = f"'{fork}/train.py' --train_data a.tar"
    argv = ["--a", command, "--b", f"{command} --my_weight 1", "--seeds", "2", "--jobs", "1"]
    runs = fork / "runs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        compare.main(argv)
    before = runs.read_text()

    compare.main(argv)

    lines = runs.read_text()
    assert lines.startswith(before) and before.count("\n") == 2
    assert sorted(json.loads(line)["seed"] for line in lines.splitlines()) == [5, 5, 6, 6]


# ---- modules


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


# Three captions of the words 1, 2 and 3, with two of a model's six tokens as start and end.
CAPTIONS = torch.tensor([[4, 1, 2, 5], [4, 3, 5, 0], [4, 1, 5, 0]])


@pytest.fixture
def controlled(monkeypatch):
    """A model in training, whose functions a control may replace."""
    monkeypatch.setattr(superclip, "classification_loss", superclip.classification_loss)
    monkeypatch.setattr(superclip.WordHead, "forward", superclip.WordHead.forward)
    monkeypatch.setattr(train, "main", lambda argv: argv)
    return small_model(vocab_size=6).train()


def test_a_shuffled_head_is_asked_for_the_words_of_another_pair(controlled):
    images = torch.rand(3, 3, 16, 16)
    plain = controlled(images, CAPTIONS)  # counts them
    controlled.eval()
    logits = controlled.class_logits(images)
    weights = controlled.token_weights()
    losses = []
    for image, caption in ((0, 1), (1, 2), (2, 0)):
        pair = logits[[image]], CAPTIONS[[caption]]
        losses.append(superclip.classification_loss(*pair, weights))

    assert shuffled.main(["--steps", "9"]) == ["--steps", "9"]

    found = controlled(images, CAPTIONS)
    torch.testing.assert_close(found["classification_loss"], sum(losses) / 3)
    assert found["contrastive_loss"] == plain["contrastive_loss"]


def test_a_head_on_the_class_token_does_not_see_the_patches(controlled):
    head = controlled.head
    tokens = torch.randn(2, 5, controlled.config.vision_width)
    as_all_patches = tokens[:, :1].expand(-1, 5, -1)
    expected = head(as_all_patches)

    class_token.main([])

    torch.testing.assert_close(head(tokens), expected)


def test_the_warm_up_is_three_times_as_long(monkeypatch):
    monkeypatch.setattr(train, "lengths", train.lengths)
    monkeypatch.setattr(train, "main", lambda argv: argv)
    args = train.parse(["--steps", "1500", "--eval_every", "700"])

    warmup.main([])

    assert train.lengths(args, 20_000) == (1500, 450, 700)


def test_a_comparison_trains_both_variants_and_prints_every_score(
    shards, folders, children, monkeypatch, tmp_path, capsys
):
    """The processes are forked, because each would take seconds to import torch."""

    def call(words):
        code, printed = finish(children.start("train", words[1:]))
        return printed if code else ""

    monkeypatch.setattr(compare, "call", call)
    monkeypatch.setattr(compare, "OUT", tmp_path)
    common = f"--train_data {shards}/train-*.tar --val_data {shards}/val-*.tar --steps 20"
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
        title = f"title {min(i, 500 - i)}"
        rows.append({"image": f"{i}.jpg", "caption": title, "content": b"%d" % (i % 360)})
        rows[i] |= {"type": "Tshirts" if i % 2 else "Tops", "colour": "Black"}
    return rows


def test_products_with_equal_titles_or_pictures_are_on_one_side(products):
    train, val, classified = shop.split(products, seed=0)

    assert train and val and classified
    for one, other in ((train, val), (train, classified), (val, classified)):
        for name in ("caption", "content"):
            assert not {row[name] for row in one} & {row[name] for row in other}
    titles = [row["caption"] for row in products]
    assert all(titles.count(row["caption"]) == 1 for row in val)


def test_another_seed_is_another_split(products):
    splits = [shop.split(products, seed)[0] for seed in (5, 6, 5)]

    trained = [[row["image"] for row in train] for train in splits]
    assert trained[0] == trained[2] and {*trained[0]} != {*trained[1]}


def test_all_splits_have_the_same_classes(products, monkeypatch, tmp_path):
    """One of the splits has too few shirts for a class of them: 43, and the other 49."""
    monkeypatch.setattr(shop, "OUT", tmp_path / "shop")
    monkeypatch.setattr(shop, "NUMBERS", {"type": 44, "colour": 1, "both": 1})
    (tmp_path / "images").mkdir()
    lines = ["image,caption,type,colour"]
    for row in products:
        (tmp_path / "images" / row["image"]).write_bytes(row["content"])
        lines.append(f"{row['image']},{row['caption']},{row['type']},{row['colour']}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))

    shop.main([str(tmp_path), "--seeds", "5", "6"])

    for seed in ("5", "6"):
        names = {path.name for path in (shop.OUT / seed).glob("*/*")}
        assert names == {"black", "top", "black top", "black t-shirt"}


# ---- the plan and its pages


@pytest.fixture
def planned(pretend, monkeypatch, tmp_path):
    """Returns a function that runs rows of the plan, with made-up scores, and returns the page that
    it writes. At first the page has a label for each row and no scores."""
    for name in ("RESULTS", "RATES", "RUNS"):
        monkeypatch.setattr(plan, name, tmp_path / name)
    plan.RESULTS.write_text("\n".join(f"| {label} | - |" for label, *_ in plan.ROWS.values()))
    plan.RATES.touch()

    def run(*rows):
        plan.main(rows)
        return plan.RESULTS.read_text()

    return run


def line_of(page, row):
    """The line of a row in the tables of a page."""
    [line] = [line for line in page.splitlines() if line.startswith(f"| {plan.ROWS[row][0]} |")]
    return line


def test_a_row_is_added_and_the_others_stay(planned, monkeypatch):
    """The second row runs at other code, so the runs of the first could not be made again. When
    they are, the second stays."""
    before = line_of(planned("batch32"), "batch32")
    monkeypatch.setattr(compare.Command, "code", lambda command: "othercode--")

    page = planned("no_idf")
    added = line_of(page, "no_idf")
    assert line_of(page, "batch32") == before and "±" in added

    assert line_of(planned("batch32"), "no_idf") == added


def test_a_row_needs_all_its_runs_of_one_code(planned):
    planned("no_idf")
    runs = plan.RUNS.read_text()

    assert plan.sides_of(Study(1, plan.RUNS), "no_idf")

    other = re.sub('("-m study.no_idf .*"code": ")', r"\1other", runs)  # one side of another core
    for text in (runs[: runs.rindex('{"command"')], other):
        plan.RUNS.write_text(text)
        assert plan.sides_of(Study(1, plan.RUNS), "no_idf") is None


def test_the_picture_has_superclip_at_clips_rate_if_it_has_run_beside_the_same_clip(
    planned, monkeypatch
):
    planned("batch8")
    with monkeypatch.context() as patch:
        patch.setattr(compare.Command, "code", lambda command: "othercode--")
        planned("batch8_head")
    assert len(found.sides_of(Study(1, plan.RUNS), "batch8")) == 2
    planned("batch8_head")

    sides = found.sides_of(Study(1, plan.RUNS), "batch8")

    assert [side.command.rate() for side in sides] == [8.75e-5, 1.75e-4, 8.75e-5]
    assert ["--cls_weight 0 " in side.command.line() for side in sides] == [True, False, False]


def test_a_row_that_the_page_lacks_comes_last(planned):
    plan.RESULTS.write_text("# A page\n")

    page = planned("batch32")

    assert page.startswith("# A page\n| batch 32 | 10 |")


def test_gains_are_compared_in_log_odds():
    clip, superclip, best = [Side(None, {}, [run_of(x=value)]) for value in (50, 80, 100)]

    # odds of 1 become odds of 4, and a full score has odds, too
    assert plan.odds_gained([clip, superclip], "x").tolist() == pytest.approx([math.log(4)])
    assert 5 < plan.odds_gained([clip, best], "x").item() < 10


def test_of_a_seed_that_ran_twice_a_search_takes_the_newest_code(tmp_path):
    """Its runs are in the order of their seeds, in which differences are paired."""
    study = Study(1, tmp_path / "runs.jsonl")
    run = {"command": "train.py --learning_rate 1 --steps 9", "world": "drawn", "rate": 1.0}
    for seed, code in ((1, "old"), (0, "old"), (1, "new")):
        study.add({**run, "seed": seed, "code": code})

    found = plan.read_searches(study)["train.py --steps 9", "drawn"]

    assert [(run["seed"], run["code"]) for run in found[1.0]] == [(0, "old"), (1, "new")]


def test_rows_name_the_best_rates_of_the_searches():
    searches = plan.read_searches(Study(1, plan.RUNS))
    named = set()
    for row, (_, *names) in plan.ROWS.items():
        for name, command in zip(names, compare.pair_of(plan.options_of(row))):
            tried = searches.get(plan.key_of(command.line(), command.world()))
            if tried and "slow" not in name:  # some never had a search
                assert command.rate() == best_rate(compare.goals_of(tried)), row
                named.add(name)
    assert {"CLIP", "SuperCLIP", "CLIP 8 in 16", "CLIP of 4"} <= named


def test_the_pages_are_what_the_published_runs_say(monkeypatch, tmp_path):
    """They are, if they come back after the last score of each line was replaced."""
    published = [path.read_text() for path in (plan.RESULTS, plan.RATES)]
    monkeypatch.setattr(compare, "OUT", tmp_path)
    for name, text in zip(("RESULTS", "RATES"), published):
        (tmp_path / name).write_text(re.sub(r"^(\|.*[±:]) [\d.]+", r"\1 0", text, flags=re.M))
        monkeypatch.setattr(plan, name, tmp_path / name)

    plan.main([])

    assert [path.read_text() for path in (plan.RESULTS, plan.RATES)] == published
