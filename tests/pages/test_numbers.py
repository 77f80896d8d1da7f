"""Numbers on the pages are those of the runs that the repository keeps the logs of."""

import json
import math
import re
from pathlib import Path

import pytest
from score_lines import SCORE_LINE, numbers_in, printed

import train

ROOT = Path(train.__file__).parent
FILES = "README.md", "docs/tutorial.md", "docs/products.md", "study/results.md"
README, TUTORIAL, PRODUCTS, RESULTS = ((ROOT / file).read_text() for file in FILES)
PAGES = {"README": README, "tutorial": TUTORIAL}

# ---- lines of scores, as validation prints them


def rows_of(log):
    return [json.loads(line) for line in (ROOT / "study" / log).read_text().splitlines() if line]


def scores_of(row):
    """The scores of a validation, as the groups of their lines."""
    found = []
    for way, scores in row["validation"].items():
        for k, score in scores.items():
            found.append(printed(f"{way.replace('_', ' ')} {k}", score))
    for folder, score in row["zeroshot"].items():
        found.append(printed(f"zero-shot {Path(folder).name}", score))
    return found


VALIDATIONS = [row for row in rows_of("reference_log.jsonl") if "validation" in row]
FIRST, LAST = VALIDATIONS[0], VALIDATIONS[-1]
WAYS = "image_to_text", "text_to_image"


@pytest.mark.parametrize("page, rows", [("README", [LAST]), ("tutorial", [FIRST, LAST])])
def test_every_line_of_scores_is_one_of_the_reference_run(page, rows):
    expected = [score for row in rows for score in scores_of(row)]

    lines = SCORE_LINE.findall(PAGES[page])

    assert len(lines) >= 3
    assert [line for line in lines if line not in expected] == []


# ---- sentences about the reference run, and about the same run of CLIP


def zeroshot(row, name):
    return 100 * row["zeroshot"][f"scenes/zeroshot/{name}"]["value"]


CLIP_LAST = [row for row in rows_of("clip_log.jsonl") if "validation" in row][-1]
WORD_LOSSES = [
    row["classification_loss"] for row in rows_of("reference_log.jsonl") if "loss" in row
]
TO_TEXT, TO_IMAGE = (100 * LAST["validation"][way]["R@1"]["value"] for way in WAYS)


def of_study(metric, kind="value", **spec):
    """The mean over the runs of the study that have this spec and this score, in percent."""
    runs = [run for run in rows_of("runs.jsonl") if spec.items() <= run["spec"].items()]
    numbers = [run["scores"][metric][kind] for run in runs if metric in run["scores"]]
    return 100 * sum(numbers) / len(numbers)


OBJECTS = {"data": "objects", "search": False, "batch_size": 16, "samples": 96_000}
UNTRAINED = {"data": "objects", "search": False, "samples": 0, "learning_rate": 0.0}
PLACE = "place, window 2 x 2"
SEARCH = {"data": "scenes", "search": "mean", "batch_size": 32, "learning_rate": 7e-4}

SENTENCES = {  # each # stands for one of the numbers, in this order
    "After # steps R@1 is at # %": (FIRST["step"], 100 * FIRST["mean_r1"]),
    "Shapes come first (# %), colours later (# %)": (
        zeroshot(FIRST, "shape"),
        zeroshot(FIRST, "colour"),
    ),
    "R@1 ends at # % from image to text": (TO_TEXT,),
    "and at # % from text to image": (TO_IMAGE,),
    "names colour + shape in # % at the end, and R@1 is # %": (
        zeroshot(CLIP_LAST, "colour_shape"),
        100 * CLIP_LAST["mean_r1"],
    ),
    "**The word loss** ends at # and": (WORD_LOSSES[-1],),
    "The first gives # %": (zeroshot(LAST, "colour_shape"),),
    "the second # %": (zeroshot(LAST, "held_out"),),
    "Colour + shape is right in # %, but colour alone in # %": (
        zeroshot(LAST, "colour_shape"),
        zeroshot(LAST, "colour"),
    ),
    "Better than zero-shot (# %)": (zeroshot(LAST, "held_out"),),
    "the setting alone gives # %": (of_study("R@1", "floor", **OBJECTS),),
    "names # % of the photographs with random weights and # % after CLIP": (
        of_study("probe object", **UNTRAINED),
        of_study("probe object", cls_weight=0.0, **OBJECTS),
    ),
    "at 7e-4 CLIP has #, # and # %, and SuperCLIP #, # and # %": (
        *[of_study("R@1", cls_weight=0.0, seed=seed, **SEARCH) for seed in (100, 101, 102)],
        *[of_study("R@1", cls_weight=1.0, seed=seed, **SEARCH) for seed in (100, 101, 102)],
    ),
    "centre on it (chance # %)": (of_study(PLACE, "chance"),),
    "right in # %, as the mean of three models over 1,000 pictures, and in # % with random": (
        of_study(PLACE, samples=48_000),
        of_study(PLACE, samples=0),
    ),
    "# % of photographs in a corner of a drawn setting (chance # %": (
        of_study(PLACE, samples=48_000),
        of_study(PLACE, "chance"),
    ),
}


@pytest.mark.parametrize("sentence, numbers", SENTENCES.items(), ids=SENTENCES)
def test_a_sentence_of_a_page_has_the_numbers_of_the_log(sentence, numbers):
    found = numbers_in(sentence, TUTORIAL + PRODUCTS)

    assert [*map(float, found)] == pytest.approx(numbers, abs=0.0501)


# ---- scores with an interval, in a sentence

# "80.8 % (chance 1.6 %, n 640, 95 % interval 77.5-83.6)", "91.0 % of 200 scenes (86.2-94.2)"
WITH_INTERVAL = re.compile(r"(\d+\.\d) %[^()%]*\([^()]*?(\d+\.\d)-(\d+\.\d)")


def percent(share):
    return f"{100 * share:.1f}"


def wilson(p, n):
    """The 95 % interval of a share p of n, by Wilson's formula as textbooks have it."""
    z = 1.96
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def intervals_around(value):
    """The intervals that a score may have which is `value` on a page, as texts (low, high): of all
    numbers of images that the pages score, and of all shares of them that round to this value."""
    found = set()
    for n in (200, 320, 640, 1000, 1294, 1851):
        for thousandths in range(-50, 51):
            p = (float(value) + thousandths / 1000) / 100
            low, high = wilson(min(max(p, 0), 1), n)
            found.add((percent(low), percent(high)))
    return found


@pytest.mark.parametrize("page", ["README", "tutorial", "products"])
def test_a_line_of_scores_has_the_interval_of_its_value(page):
    lines = SCORE_LINE.findall({**PAGES, "products": PRODUCTS}[page])

    assert lines
    for line in lines:
        _, value, _, low, high, n = line
        expected = wilson(float(value) / 100, int(n.replace(",", "")))
        assert (float(low) / 100, float(high) / 100) == pytest.approx(expected, abs=6e-4), line


@pytest.mark.parametrize("page", ["tutorial", "products"])
def test_a_score_in_a_sentence_has_the_interval_of_its_value(page):
    text = " ".join({**PAGES, "products": PRODUCTS}[page].split())
    found = WITH_INTERVAL.findall(text)

    assert found
    for value, low, high in found:
        assert (low, high) in intervals_around(value), f"{value} % ({low}-{high})"


# ---- the study


CELL = re.compile(r"(\d+\.\d) -> (\d+\.\d), [+-](\d+\.\d ± \d+\.\d)")
DECIMAL = re.compile(r"(?<![\d.])\d+\.\d(?![\d.])")
DIFFERENCE = re.compile(r"(\S+) \(?(?:another )?[+-]?(\d+\.\d ± \d+\.\d)")
ALONE = {"is", "and", "by", "was"}  # "the gain is 15.1 ± 18.2", "R@1 falls by 1.4 ± 1.1"


@pytest.mark.parametrize("page", PAGES)
def test_a_difference_stands_with_the_two_scores_that_it_is_of(page):
    """The second one just before it, as in "53.7 %, and SuperCLIP 81.4 % (27.7 ± 18.1)"."""
    text = " ".join(PAGES[page].split())
    scores_of_difference = {}
    for a, b, difference in CELL.findall(RESULTS):
        scores_of_difference.setdefault(difference, []).append((a, b))
    found = [match for match in DIFFERENCE.finditer(text) if match[1] not in ALONE]

    assert found
    for match in found:
        *before, last = DECIMAL.findall(text[max(0, match.start() - 400) : match.end(1)])
        pairs = scores_of_difference.get(match[2], [])
        assert [a for a, b in pairs if a in before and b == last], match[0]
