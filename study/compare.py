"""The paper's claims made small: CLIP against SuperCLIP on scenes and on photographs.

    python -m study.compare --quick        one run of each method, three to five minutes
    python -m study.compare                batch sizes 8, 32 and 256, seven hours of one core
    python -m study.compare --only PART    another part of the study
    python -m study.compare --report       figures and tables again, from study/runs.jsonl

Each row of a table compares two kinds of runs that differ in one thing, and in the learning rate if
the table says so. The differences are paired by seed, and have a 95 % interval (Student's t).

The learning rate is searched first, for both methods alike. Each method gets four rates with three
seeds each. The rate with the best mean of R@1 and a zero-shot score, on pictures set aside from
training, wins. While the best rate is at an end, another one is added there. Rows that differ in
captions and the like borrow the rate of their batch size, or name their own. Earlier parts of the
study chose their rates by earlier rules, which findings.md lists, and stand apart on the page.

A finished run is a line in runs.jsonl and is not run again, so a study that was stopped goes on
where it was. This file is the plan and the report. run.py is one run.
"""

import argparse
import json
import math
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
import train
from cli import check, number, optional, run_command
from study import run

FOLDER = Path(__file__).parent
RUNS = FOLDER / "runs.jsonl"
ASSETS = FOLDER.parent / "assets"
CLIP = dict(cls_weight=0.0)
SUPERCLIP = dict(cls_weight=1.0)
METHODS = {"CLIP": CLIP, "SuperCLIP": SUPERCLIP}
# Of Student's distribution: 95 % of the means of n pairs lie within so many standard errors.
QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
BATCH_SIZES = (8, 32, 256)
SAMPLES = run.RUN["samples"]
FEWEST = 3  # seeds that a row has on the page; fewer tell too little


# -----------------------------------------------------------------------------
# The plan


class Row(NamedTuple):
    """Two kinds of runs, each as the options in which it differs from run.RUN."""

    label: str
    a: dict
    b: dict


# What chose the learning rates of a part
BEST_MEAN = "best mean"  # Study.search
NAMED = "named"  # each row names its own
EARLIER = "earlier"  # Such runs are marked "earlier": true in runs.jsonl.


class Part(NamedTuple):
    """A table of the report."""

    text: str  # what the rows compare
    rule: str
    seeds: int
    metrics: tuple
    rows: list


def both(label, **changes):
    """A row that compares the two methods."""
    return Row(label, {**CLIP, **changes}, {**SUPERCLIP, **changes})


def needed(batch_size):
    """Samples seen: equally many for all batch sizes but 256, which would make too few updates."""
    return SAMPLES * 3 if batch_size == 256 else SAMPLES


LOOKS = ("R@1", "colour_shape", "colour", "shape")
ALL_LOOKS = ("R@1", "colour_shape", "held_out", "colour", "shape", "probe colour_shape")
OBJECTS = dict(data="objects", captions="long", batch_size=16)
LONGER = {**OBJECTS, "samples": 2 * SAMPLES}
CLASSIFIED = ("R@1", "zero-shot object", "probe object", "patch probe object")
PRODUCTS = dict(data="products", captions="long", batch_size=32)
LABELLED = (
    "R@1", "R@10", "zero-shot type", "zero-shot colour", "probe type", "patch probe type",
    "probe colour", "patch probe colour", "words of type", "words of colour", "words of neither",
)  # fmt: skip
DUAL = dict(captions="short", label_captions="long")
RATE_32 = 1.75e-4  # that the earlier rule found for both methods at batch 32
MAPPED = {**OBJECTS, "learning_rate": 2.47e-4}  # that it found for SuperCLIP
PARTS = {
    "batch": Part(
        "Batch size, at equal samples seen (256: three times as many).",
        BEST_MEAN, 5, ALL_LOOKS,
        [both(f"batch {B}", batch_size=B, samples=needed(B)) for B in BATCH_SIZES],
    ),
    "visual": Part(
        "Purely visual: a linear probe on the frozen class token, at batch 32, beside a model with "
        "random weights. The probe learns from two pictures of each combination.",
        BEST_MEAN, 5, ("probe colour_shape", "probe colour", "probe shape"),
        [
            both("CLIP -> SuperCLIP"),
            Row("untrained -> CLIP", dict(samples=0), CLIP),
            Row("untrained -> SuperCLIP", dict(samples=0), SUPERCLIP),
        ],
    ),
    "swap": Part(
        "The true caption of a validation scene with two objects, or the one in which they "
        "exchange their colours, so that the words are the same? At batch 32.",
        BEST_MEAN, 5, ("choose swap",), [both("batch 32")],
    ),
    "maps": Part(
        "Where the head sees an object: photographs in drawn settings, as in the table objects "
        "below, at batch 16 and the rate used there. Windows of 2 x 2 or 3 x 3 patches are left "
        "out, one at a time. The place is right if the window whose removal lowers the probability "
        "of the object's word most has its centre on the photograph.",
        NAMED, 3, ("place, window 2 x 2", "place, window 3 x 3"),
        [Row("untrained -> SuperCLIP", {**MAPPED, "samples": 0}, MAPPED)],
    ),
    "objects": Part(
        "Real photographs in drawn settings: CIFAR-10 at 32 pixels, in a corner of a setting of "
        "the scenes, at batch 16. (Rates are those found for 48,000 samples.) The floor of R@1 is "
        "what the setting alone gives; captions repeat, so it cannot be 100. Zero-shot and linear "
        "probe (class token, patch mean) tell the ten classes of test photographs apart.",
        EARLIER, 5, CLASSIFIED,
        [
            both("48,000 samples", **OBJECTS),
            both("96,000 samples", **LONGER),
            Row("untrained -> CLIP, 96,000 samples", {**LONGER, "samples": 0}, {**LONGER, **CLIP}),
            Row("untrained -> SuperCLIP, 96,000 samples",
                {**LONGER, "samples": 0}, {**LONGER, **SUPERCLIP}),
        ],
    ),
    "objects, more": Part(
        "The same objects and 48,000 samples, with one change. Dual captions: contrast the "
        "setting, labels from the whole caption.",
        EARLIER, 3, CLASSIFIED,
        [
            both("batch 64", **{**OBJECTS, "batch_size": 64}),
            Row("lambda 1 -> 0.1", OBJECTS, {**OBJECTS, "cls_weight": 0.1}),
            both("dual captions", **{**OBJECTS, **DUAL}),
        ],
    ),
    "products": Part(
        "Photographs of a shop, at 72 pixels and 48,000 samples. R@k among validation products "
        "whose title and file are unique. Zero-shot and linear probe (class token, patch mean) "
        "tell the ten commonest types and colours apart. Words: mean average precision of the "
        "head's words that name a type, a colour, or neither. Dual captions: contrast the group.",
        EARLIER, 3, LABELLED,
        [
            both("batch 32", **PRODUCTS),
            both("batch 128", **{**PRODUCTS, "batch_size": 128}),
            both("96,000 samples", **{**PRODUCTS, "samples": 2 * SAMPLES}),
            Row("lambda 1 -> 0.1", PRODUCTS, {**PRODUCTS, "cls_weight": 0.1}),
            Row("lambda 1 -> 0.3", PRODUCTS, {**PRODUCTS, "cls_weight": 0.3}),
            both("dual captions", **{**PRODUCTS, **DUAL}),
        ],
    ),
    "settings": Part(
        "Number of settings, at batch 8. The fewer there are, the more pairs of a batch share "
        "theirs. The pictures of one object show all 256 settings, most of which a model of few "
        "settings has never seen. With one, most captions repeat, and the search can hardly tell "
        "rates apart.",
        EARLIER, 5, (*LOOKS, "probe colour_shape"),
        [
            both("1 setting", settings=1, batch_size=8),
            both("16 settings", settings=16, batch_size=8),
            both("256 settings", settings=256, batch_size=8),
        ],
    ),
    "sizes": Part(
        "Batch size, at 48,000 samples (256: three times as many). The rate of 256 is far too low "
        "for colour + shape, because R@1 alone chose it. Compare the table batch.",
        EARLIER, 5, ALL_LOOKS,
        [both(f"batch {B}", batch_size=B, samples=needed(B)) for B in (16, 64, 256)],
    ),
    "groups": Part(
        "Pairs compared, in a batch of 64: each image with the captions of its own group only.",
        EARLIER, 5, (*LOOKS, "probe colour_shape"),
        [
            both("groups of 4", batch_size=64, group=4),
            both("groups of 16", batch_size=64, group=16),
            both("groups of 64", batch_size=64),
        ],
    ),
    "rates": Part(
        "Both methods at one learning rate, which no rule chose, at batch 32.",
        EARLIER, 5, ALL_LOOKS,
        [both("0.000175", learning_rate=1.75e-4), both("0.00035", learning_rate=3.5e-4)],
    ),
    "length": Part(
        "Samples seen, at batch 32.",
        EARLIER, 3, (*LOOKS, "probe colour_shape"),
        [
            both(f"{n:,} samples", samples=n, learning_rate=RATE_32)
            for n in (SAMPLES // 2, SAMPLES, 2 * SAMPLES)
        ],
    ),
    "captions": Part(
        "Captions, at batch 32. Dual: contrastive loss on the short ones, labels from the long.",
        EARLIER, 5, LOOKS,
        [
            both("short", captions="short", learning_rate=RATE_32),
            both("long", captions="long", learning_rate=RATE_32),
            both("mixed", captions="mixed", learning_rate=RATE_32),
            Row("SuperCLIP: short -> dual", dict(captions="short"), DUAL),
        ],
    ),
}  # fmt: skip
PAIRS_OF_4 = dict(batch_size=64, group=4)
QUICK = Part(
    "Groups of 4 in a batch of 64, at the learning rates that the study found for them.",
    BEST_MEAN, 1, LOOKS,
    [Row("groups of 4", {**CLIP, **PAIRS_OF_4, "learning_rate": 1.24e-4},
         {**SUPERCLIP, **PAIRS_OF_4, "learning_rate": 4.95e-4})],
)  # fmt: skip


# -----------------------------------------------------------------------------
# The finished runs, and what is still to do

SEARCH_SEEDS = (100, 101, 102)
LOWEST, HIGHEST = -5, 4  # exponents at which a search ends


def rate_at(batch_size, exponent):
    """A learning rate of a search: a middle one that grows with the root of the batch size, doubled
    or halved so many times."""
    middle = 3.5e-4 * math.sqrt(batch_size / 32)
    return float(f"{middle * 2**exponent:.3g}")


class Search(NamedTuple):
    """The search for a learning rate."""

    missing: list  # specs of runs that are still to do
    tried: dict  # rate: its runs, one of each seed; empty while some are missing
    best: float | None  # rate; None while runs are missing


def mean_score(runs):
    """What a search compares: the mean of R@1 and the second score, over runs of all seeds."""
    values = []
    for result in runs:
        scores = result["scores"]
        second = scores[run.SECOND_SCORE[result["spec"]["data"]]]
        values.append((scores["R@1"]["value"] + second["value"]) / 2)
    return statistics.mean(values)


def key(spec):
    return json.dumps(spec, sort_keys=True)


class Study:
    """The finished runs of a runs.jsonl, and what is still to do."""

    def __init__(self, path):
        self.path = path
        self.lines = []
        self.results = {}  # of today's rule and batches, by key
        self.earlier = {}  # of earlier ones
        if path.exists():
            for line in path.read_text().splitlines():
                self.take(json.loads(line))

    def take(self, result):
        self.lines.append(result)
        is_earlier = "earlier" in result
        untrained = result["spec"]["samples"] == 0  # random weights are those of any rule
        if is_earlier or untrained:
            self.earlier[key(result["spec"])] = result
        if not is_earlier or untrained:
            self.results[key(result["spec"])] = result

    def add(self, result):
        self.take(result)
        with open(self.path, "a") as file:
            file.write(json.dumps(result) + "\n")

    def search(self, spec):
        """The search for the learning rate of a spec, as far as it has come.

        Each method gets four rates with three seeds each. The best mean score wins. While the best
        rate is at an end, another one is added there. All runs of the search are trained without,
        and scored on, pictures that are set aside from the training data. Specs that differ in
        captions, samples seen or a weight of the word loss above 0 share a search.
        """
        shared = {
            **run.RUN,
            "data": spec["data"],
            "settings": spec["settings"],
            "batch_size": spec["batch_size"],
            "group": spec["group"],
            "cls_weight": 1.0 if spec["cls_weight"] > 0 else 0.0,
            "samples": needed(spec["batch_size"]),
            "captions": "mixed" if spec["data"] == "scenes" else "long",
            "search": "mean",
        }
        exponents = [-2, -1, 0, 1]
        while True:
            specs = []
            for exponent in exponents:
                rate = rate_at(spec["batch_size"], exponent)
                specs += [{**shared, "learning_rate": rate, "seed": s} for s in SEARCH_SEEDS]
            missing = [one for one in specs if key(one) not in self.results]
            if missing:
                return Search(missing, {}, None)
            tried = {}
            for one in specs:
                tried.setdefault(one["learning_rate"], []).append(self.results[key(one)])
            means = [mean_score(runs) for runs in tried.values()]
            place = means.index(max(means))
            if place == 0 and exponents[0] > LOWEST:
                exponents.insert(0, exponents[0] - 1)
            elif place == len(means) - 1 and exponents[-1] < HIGHEST:
                exponents.append(exponents[-1] + 1)
            else:
                return Search([], tried, list(tried)[place])

    def rate(self, spec, rule):
        """The learning rate of a spec: its own, or what the rule has chosen, or None while that is
        not known."""
        if spec["learning_rate"] is not None:
            return spec["learning_rate"]
        if spec["samples"] == 0:
            return 0.0
        if rule == BEST_MEAN:
            return self.search(spec).best
        return self.earlier_rate(spec)

    def earlier_rate(self, spec):
        """The learning rate at which earlier runs of a spec were made, or None without any."""
        kind = {**spec, "learning_rate": None, "seed": None}
        rates = set()
        for result in self.earlier.values():
            if {**result["spec"], "learning_rate": None, "seed": None} == kind:
                rates.add(result["spec"]["learning_rate"])
        check(len(rates) < 2, f"earlier runs have several rates, so a row must name one: {spec}")
        return rates.pop() if rates else None

    def specs(self, part, changes):
        """One kind of run, with each of its seeds. Empty while its learning rate is not known."""
        spec = {**run.RUN, **changes}
        rate = self.rate(spec, part.rule)
        if rate is None:
            return []
        return [{**spec, "learning_rate": rate, "seed": seed} for seed in range(part.seeds)]

    def todo(self, part):
        """What the first unfinished row of a part needs next: its searches, or its runs."""
        for row in part.rows:
            wanted = []
            for changes in (row.a, row.b):
                specs = self.specs(part, changes)
                if not specs:  # its rate is not known yet
                    specs = self.search({**run.RUN, **changes}).missing
                wanted += specs
            new = {key(spec): spec for spec in wanted if key(spec) not in self.results}
            if new:
                return list(new.values())
        return []

    def runs(self, part, changes):
        """The finished runs of one kind."""
        results = self.earlier if part.rule == EARLIER else self.results
        keys = [key(spec) for spec in self.specs(part, changes)]
        return [results[k] for k in keys if k in results]

    def rows(self, part):
        """The rows that the page shows, because their runs are there: {label: (runs of the first
        kind, runs of the second)}."""
        shown = {}
        for row in part.rows:
            one = self.runs(part, row.a)
            other = self.runs(part, row.b)
            if min(len(one), len(other)) >= min(FEWEST, part.seeds):
                shown[row.label] = (one, other)
        return shown


def describe_machine():
    """Where and when: without it no number means anything."""
    cpu = subprocess.getoutput("grep -m1 'model name' /proc/cpuinfo").partition(": ")[2]
    return {
        "device": f"{cpu}, {data.cores()} cores",
        "torch": torch.__version__,
        "commit": train.commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def line_of(result, metrics):
    """A finished run in a line: what is special about it, and its scores."""
    changed = {k: v for k, v in result["spec"].items() if v != run.RUN[k]}
    scores = {m: result["scores"][m]["value"] for m in metrics if m in result["scores"]}
    return f"{changed}: {scores}"


def work(study, parts, sources, jobs):
    """Run what is missing. parts: of the plan, by name; sources: by the name of the data, what
    else their prepare function in run.py takes, as a dict."""
    machine = describe_machine()
    prepared = set()
    # spawn, because to fork a process that has threads may hang
    context = torch.multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        context.Pool(jobs, torch.set_num_threads, (1,)) as pool,
    ):
        for name, part in parts.items():
            todo = study.todo(part)
            while todo:
                for spec in todo:
                    kind, settings = spec["data"], spec["settings"]
                    if (kind, settings) not in prepared:
                        prepared.add((kind, settings))
                        prepare = getattr(run, f"prepare_{kind}")
                        prepare(Path(folder), settings, **sources.get(kind, {}))
                tasks = [(spec, Path(folder)) for spec in todo]
                results = pool.imap_unordered(run.run, tasks)
                for result in tqdm(results, name, len(tasks), unit="run"):
                    study.add({**result, **machine})
                    tqdm.write(line_of(result, part.metrics))
                todo = study.todo(part)
        pool.close()
        pool.join()  # or the processes end before they have tidied up, and Python complains


# -----------------------------------------------------------------------------
# The report: tables


def interval(values):
    """Returns the mean of up to five numbers, and half of the width of its 95 % interval, or None
    if there is only one number."""
    n = len(values)
    mean = statistics.mean(values)
    if n < 2:
        return mean, None
    return mean, QUANTILE[n] * statistics.stdev(values) / math.sqrt(n)


def values_of(runs, metric):
    """Runs -> {seed: value}. A CLIP has no scores of words."""
    found = [r for r in runs if metric in r["scores"]]
    return {r["spec"]["seed"]: r["scores"][metric]["value"] for r in found}


def percent_of(runs, metric):
    """Runs -> the list of their values in percent."""
    return [100 * value for value in values_of(runs, metric).values()]


def cell(one, other, metric):
    """Runs of both kinds -> "12.3 -> 45.6, +33.3 ± 2.0" in percent, paired by seed, and in bold if
    the interval leaves 0 out."""
    a = values_of(one, metric)
    b = values_of(other, metric)
    seeds = sorted(a.keys() & b.keys())
    if not seeds:  # a CLIP has no words, so that there is nothing to compare them with
        return f"{100 * statistics.mean(b.values()):.1f}" if b else ""
    before = 100 * statistics.mean(a[seed] for seed in seeds)
    after = 100 * statistics.mean(b[seed] for seed in seeds)
    mean, half = interval([100 * (b[seed] - a[seed]) for seed in seeds])
    text = f"{before:.1f} -> {after:.1f}, {mean:+.1f}"
    if half is None:
        return text
    text += f" ± {half:.1f}"
    return f"**{text}**" if abs(mean) > half else text


def markdown(heads, lines):
    rows = [heads, ["---"] * len(heads), *lines]
    return [f"| {' | '.join(row)} |" for row in rows] + [""]


def head_of(metric, scores):
    """The head of a column: a metric with its chance level, its floor if it has one, and n."""
    if metric not in scores:
        return metric
    score = scores[metric]
    levels = [f"{x} {100 * score[x]:.1f}" for x in ("chance", "floor") if x in score]
    return f"{metric} ({', '.join(levels)}, n {score['n']:,})"


def table_of(study, name, part):
    """A part's table in Markdown, a list of lines. Empty if no row has its runs."""
    lines = []
    scores = {}
    for label, (one, other) in study.rows(part).items():
        rates = [f"{runs[0]['spec']['learning_rate']:g}" for runs in (one, other)]
        cells = [cell(one, other, metric) for metric in part.metrics]
        lines.append([label, str(min(len(one), len(other))), " / ".join(rates), *cells])
        scores = other[0]["scores"]
    if not lines:
        return []
    heads = ["", "seeds", "learning rates", *(head_of(m, scores) for m in part.metrics)]
    return [f"## {name}", "", part.text, "", *markdown(heads, lines)]


def searches(study):
    """The finished searches of all batch sizes: {(method, batch size): Search}."""
    found = {}
    for B in BATCH_SIZES:
        for method, kind in METHODS.items():
            search = study.search({**run.RUN, **kind, "batch_size": B})
            if search.best is not None:
                found[method, B] = search
    return found


def search_table(study):
    """Every learning rate that was tried, and what it gave."""
    lines = []
    for (method, B), search in searches(study).items():
        tried = []
        for rate, runs in search.tried.items():
            first = statistics.mean(percent_of(runs, "R@1"))
            second = statistics.mean(percent_of(runs, "colour_shape"))
            mean = 100 * mean_score(runs)
            tried.append(f"{rate:g}: {first:.1f} and {second:.1f}, mean {mean:.1f}")
        lines.append([f"{method}, batch {B}", f"{search.best:g}", "; ".join(tried)])
    if not lines:
        return []
    text = (
        "R@1 and colour_shape in percent, as means over seeds 100 to 102, of pictures that are set "
        "aside from training. The best mean of the two wins. The figure shows each seed."
    )
    figure = "![R@1 and colour_shape against the learning rate](../assets/rates.png)"
    heads = ["", "best", "learning rate: R@1 and colour_shape, their mean"]
    return ["## Learning rates", "", text, "", figure, "", *markdown(heads, lines)]


def page(study):
    """results.md as a text."""
    hours = sum(result["seconds"] for result in study.lines) / 3600
    devices = sorted({result["device"] for result in study.lines})
    lines = [
        "# CLIP and SuperCLIP, made small",
        "",
        (FOLDER / "findings.md").read_text(),  # in sentences, and which rule chose the rates
        "## How to read the tables",
        "",
        "Made by `python -m study.compare`. A cell reads: mean of the first kind -> mean of the "
        "second, and their difference with its 95 % interval (paired by seed, Student's t), in "
        "percent. A cell in **bold** is reliable: its interval leaves 0 out. The others show no "
        "reliable difference. Learning rates are those of the first and of the second kind. R@k is "
        "the mean of both ways among 1,000 validation pairs with long captions. Of scenes, "
        "colour_shape, colour and shape are zero-shot scores of pictures of one object, and "
        "held_out those of combinations that training never shows.",
        "",
        f"{len(study.lines)} runs, {hours:.1f} core-hours on {' and '.join(devices)}. They are "
        "trained in bfloat16 if the CPU has units for it, and else in float32. runs.jsonl has the "
        "seconds, dtype, commit and date of each.",
        "",
    ]
    for name, part in PARTS.items():
        if part.rule != EARLIER:
            lines += table_of(study, name, part)
    lines += search_table(study)
    lines += [
        "# An earlier rule, and earlier batches",
        "",
        "The rates of the tables below were chosen by earlier rules, listed above, and captions "
        "were trimmed to the longest of a batch, where they are padded to a multiple of 16 now. "
        "Padding changes nothing but the last bits of a loss.",
        "",
    ]
    for name, part in PARTS.items():
        if part.rule == EARLIER:
            lines += table_of(study, name, part)
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# The report: figures


COLOURS = {"CLIP": "#4b5563", "SuperCLIP": "#d1495b"}
PANELS = {
    "batch": ("batch_size", "batch size (256: three times the samples)"),
    "groups": ("group", "pairs compared, of 64 (an earlier rule)"),
    "settings": ("settings", "settings, batch 8 (an earlier rule)"),
}
CHANCE = dict(color="black", ls=":", lw=1, label="chance")


def load_pyplot():
    optional("matplotlib").use("Agg")
    plt = optional("matplotlib.pyplot")
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def draw_line(axis, values, colour, label):
    """Percents of seeds against x, values {x: list}: a dot for each seed, and a line through their
    means. Returns the means, {x: mean}."""
    means = {}
    for x, ys in values.items():
        means[x] = statistics.mean(ys)
        axis.scatter([x] * len(ys), ys, color=colour, s=14, alpha=0.5)
    axis.plot(list(means), list(means.values()), color=colour, label=label)
    return means


def draw_panel(axis, study, part, field, label):
    """Zero-shot accuracy of both methods against a field of the spec."""
    rows = {}
    for one, other in study.rows(part).values():
        spec = one[0]["spec"]
        rows[spec[field] or spec["batch_size"]] = (one, other)  # no group: the whole batch
    for i, (method, colour) in enumerate(COLOURS.items()):
        values = {x: percent_of(kinds[i], "colour_shape") for x, kinds in rows.items()}
        draw_line(axis, values, colour, method)
    axis.axhline(100 / 64, **CHANCE)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(rows), labels=[str(x) for x in rows])
    axis.set(xlabel=label, ylim=(0, 102))


def draw_study(study, path):
    """Zero-shot accuracy against the batch size, the pairs compared, the number of settings."""
    plt = load_pyplot()
    names = [name for name in PANELS if len(study.rows(PARTS[name])) > 1]
    if not names:
        return
    _, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 4), sharey=True, squeeze=False)
    axes = axes[0]
    for axis, name in zip(axes, names):
        draw_panel(axis, study, PARTS[name], *PANELS[name])
    axes[0].set_ylabel("zero-shot, colour + shape (%)")
    axes[0].legend(loc="lower right", frameon=False)
    plt.tight_layout()
    plt.savefig(path, dpi=150)
    plt.close()


def draw_search(axis, search, metric, colour, label):
    """A score against the learning rate, with a ring at the best."""
    values = {rate: percent_of(runs, metric) for rate, runs in search.tried.items()}
    means = draw_line(axis, values, colour, label)
    ring = dict(s=90, facecolors="none", edgecolors=colour, lw=2)
    axis.scatter([search.best], [means[search.best]], **ring)


def draw_rates(study, path):
    """R@1 and colour_shape against the learning rate, at each batch size, as far as the searches
    are finished."""
    plt = load_pyplot()
    found = searches(study)
    sizes = [B for B in BATCH_SIZES if ("CLIP", B) in found and ("SuperCLIP", B) in found]
    if not sizes:
        return
    shape = dict(figsize=(4 * len(sizes), 6.4), sharex="col", sharey=True, squeeze=False)
    _, axes = plt.subplots(2, len(sizes), **shape)
    for column, B in enumerate(sizes):
        rates = set()
        for method, colour in COLOURS.items():
            search = found[method, B]
            rates |= search.tried.keys()
            draw_search(axes[0, column], search, "R@1", colour, method)
            draw_search(axes[1, column], search, "colour_shape", colour, method)
        axes[0, column].axhline(100 / run.RANKED, **CHANCE)
        axes[1, column].axhline(100 / 64, **CHANCE)
        axes[0, column].set(title=f"batch {B}", xscale="log", ylim=(0, 104))
        axes[1, column].set_xlabel("learning rate x 10,000")
        axes[1, column].set_xticks([], minor=True)
        axes[1, column].set_xticks(sorted(rates), [f"{1e4 * x:.3g}" for x in sorted(rates)])
    axes[0, 0].set_ylabel("R@1 (%)")
    axes[1, 0].set_ylabel("zero-shot, colour + shape (%)")
    axes[0, 0].legend(loc="lower left", frameon=False)
    plt.tight_layout()
    plt.savefig(path, dpi=150)
    plt.close()


def report(study, assets):
    """Write results.md beside the runs, and the figures into the folder `assets`."""
    check(study.lines, f"{study.path} holds no run yet")
    results = study.path.with_name("results.md")
    results.write_text(page(study))
    draw_study(study, assets / "study.png")
    draw_rates(study, assets / "rates.png")
    print(f"wrote {results}, and study.png and rates.png in {assets}")


# -----------------------------------------------------------------------------
# The command


def quick(jobs):
    """One seed of the groups of 4; keeps nothing."""
    with tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder) / "runs.jsonl")
        work(study, {"groups": QUICK}, {}, jobs)
        print("\n".join(table_of(study, "groups", QUICK)))


def keep(folder):
    """Train both methods at batch 8 again, one seed of each, and keep the models in `folder`."""
    study = Study(RUNS)
    part = PARTS["batch"]
    row = part.rows[0]
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)  # as a process of the study has
    with tempfile.TemporaryDirectory() as tables:
        run.prepare_scenes(Path(tables), run.RUN["settings"])
        for name, changes in (("clip", row.a), ("superclip", row.b)):
            specs = study.specs(part, changes)
            check(specs, f"the search at {row.label} is not finished: see --only batch")
            path = folder / f"{name}.pt"
            result = run.run((specs[0], Path(tables)), path)
            print(f"{path}: {line_of(result, LOOKS)}")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--quick", action="store_true", help="one seed of both methods, groups of 4; keeps nothing")
    add("--report", action="store_true", help="do not train: write results.md and the figures")
    add("--keep", type=Path, metavar="DIR", help="train and keep the models of docs/demo.html")
    text = "parts of the study, at rates of today's rule (default: those whose rates it chose)"
    add("--only", nargs="+", choices=PARTS, metavar="PART", help=text)
    text = "train/CLASS/ and test/CLASS/ of photographs (default: downloads CIFAR-10)"
    add("--objects", type=Path, metavar="DIR", help=text)
    add("--products", type=Path, metavar="DIR", help="pairs.csv and images/ of a shop's products")
    text = "runs at a time (default: the cores)"
    add("--jobs", type=number(int, 1), default=data.cores(), help=text)
    args = parser.parse_args(argv)
    if args.quick:
        return quick(args.jobs)
    if args.keep:
        return keep(args.keep)
    study = Study(RUNS)
    if not args.report:
        names = args.only or [name for name in PARTS if PARTS[name].rule == BEST_MEAN]
        check(args.products or "products" not in names, "this part needs --products")
        parts = {name: PARTS[name]._replace(rule=BEST_MEAN) for name in names}
        sources = {"objects": {"source": args.objects}, "products": {"source": args.products}}
        work(study, parts, sources, args.jobs)
    report(study, ASSETS)


if __name__ == "__main__":
    run_command(main)
