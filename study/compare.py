"""The paper's claims made small: CLIP against SuperCLIP on scenes and on photographs.

    python -m study.compare --quick        one run of each method, three to five minutes
    python -m study.compare                all but the products, ten hours on two cores
    python -m study.compare --products DIR the products as well
    python -m study.compare --report       figure and tables again, from study/runs.jsonl

Each row of a table compares two kinds of runs that differ in one thing, and in the learning rate if
the table says so. The differences are paired by seed, and have a 95 % interval (Student's t). The
rate is searched first, for both methods alike, at each batch size, size of the groups and number of
settings. Rows that differ in something else borrow that rate, or name their own. A finished run is
a line in runs.jsonl and is not run again, so a study that was stopped goes on where it was.

This file is the plan and the report. run.py is one run.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from cli import check, number, run_command
from study import run

FOLDER = Path(__file__).parent
FIGURE = FOLDER.parent / "assets" / "study.png"
CLIP, SUPERCLIP = dict(cls_weight=0.0), dict(cls_weight=1.0)
# Of Student's distribution: 95 % of the means of n pairs lie within so many standard errors.
QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
BATCH_SIZES, SETTING_COUNTS, GROUPS = (8, 16, 32, 64, 128, 256), (1, 16, 256), (4, 16, 64)
SAMPLES = run.RUN["samples"]


# -----------------------------------------------------------------------------
# The plan


def both(label, **changes):
    """A row that compares the two methods."""
    return label, {**CLIP, **changes}, {**SUPERCLIP, **changes}


def needed(batch_size):
    """Samples seen: equally many for all batch sizes but 256, which would make too few updates."""
    return SAMPLES * 3 if batch_size == 256 else SAMPLES


class Part(NamedTuple):
    """A table of the report."""

    text: str  # what the rows compare
    seeds: int
    metrics: tuple
    rows: list  # label, one kind of run, another kind of run


LOOKS = "R@1", "colour_shape", "colour", "shape"
OBJECTS = dict(data="objects", captions="long", batch_size=16)
LONGER = {**OBJECTS, "samples": 2 * SAMPLES}
CLASSIFIED = "R@1", "zero-shot object", "probe object", "patch probe object"
PRODUCTS = dict(data="products", captions="long", batch_size=32)
DUAL = dict(captions="short", label_captions="long")
PARTS = {
    "objects": Part(
        "Real photographs in drawn settings: CIFAR-10 at 32 pixels, in a corner of a setting of "
        "the scenes, at batch 16. (Rates are those found for 48,000 samples.) The floor of R@1 is "
        "what the setting alone gives; captions repeat, so it cannot be 100. Zero-shot and linear "
        "probe (class token, patch mean) tell the ten classes of test photographs apart.",
        5, CLASSIFIED,
        [both("48,000 samples", **OBJECTS), both("96,000 samples", **LONGER),
         *((f"untrained -> {name}, 96,000 samples", {**LONGER, "samples": 0}, {**LONGER, **kind})
           for name, kind in (("CLIP", CLIP), ("SuperCLIP", SUPERCLIP)))],
    ),
    "products": Part(
        "Photographs of a shop, at 72 pixels and 48,000 samples. R@k among validation products "
        "whose title and file are unique. Zero-shot and linear probe (class token, patch mean) "
        "tell the ten commonest types and colours apart. Words: mean average precision of the "
        "head's words that name a type, a colour, or neither. Dual captions: contrast the group.",
        3, ("R@1", "R@10", "zero-shot type", "zero-shot colour", "probe type", "patch probe type",
            "probe colour", "patch probe colour", *(f"words of {x}" for x in run.KINDS)),
        [*(both(f"batch {B}", **{**PRODUCTS, "batch_size": B}) for B in (32, 8, 128)),
         both("96,000 samples", **{**PRODUCTS, "samples": 2 * SAMPLES}),
         *((f"lambda 1 -> {w}", PRODUCTS, {**PRODUCTS, "cls_weight": w}) for w in (0.1, 0.3)),
         both("dual captions", **{**PRODUCTS, **DUAL})],
    ),
    "objects, more": Part(
        "The same objects and 48,000 samples, with one change. Dual captions: contrast the "
        "setting, labels from the whole caption.",
        3, CLASSIFIED,
        [*(both(f"batch {B}", **{**OBJECTS, "batch_size": B}) for B in (64, 8, 32)),
         both("192,000 samples", **{**OBJECTS, "samples": 4 * SAMPLES}),
         both("16 settings (floor 1.6)", **OBJECTS, settings=16),
         ("lambda 1 -> 0.1", OBJECTS, {**OBJECTS, "cls_weight": 0.1}),
         both("dual captions", **{**OBJECTS, **DUAL})],
    ),
    "batch": Part(
        "Batch size, at equal samples seen (256: three times as many).",
        5, ("R@1", "colour_shape", "held_out", "colour", "shape", "probe colour_shape"),
        [both(f"batch {B}", batch_size=B, samples=needed(B)) for B in BATCH_SIZES],
    ),
    "settings": Part(
        "Number of settings, at batch 8. The fewer there are, the more pairs of a batch share "
        "theirs. With one, most captions repeat, and the search can hardly tell rates apart.",
        5, (*LOOKS, "probe colour_shape"),
        [both(f"{n} setting" + "s" * (n > 1), settings=n, batch_size=8) for n in SETTING_COUNTS],
    ),
    "rates": Part(
        "Learning rates, at batch 32.",
        5, ("R@1", "colour_shape", "held_out", "colour", "shape", "probe colour_shape"),
        [both(f"{rate:g}", learning_rate=rate) for rate in (1.75e-4, 3.5e-4)],
    ),
    "groups": Part(
        "Pairs compared, in a batch of 64: each image with the captions of its own group only.",
        5, (*LOOKS, "probe colour_shape"),
        [both(f"groups of {g}", batch_size=64, group=g if g < 64 else None) for g in GROUPS],
    ),
    "visual": Part(
        "Purely visual: a linear probe on the frozen class token, at batch 32, beside a model with "
        "random weights. The probe learns from two pictures of each combination.",
        5, ("probe colour_shape", "probe colour", "probe shape"),
        [both("CLIP -> SuperCLIP"), ("untrained -> CLIP", dict(samples=0), CLIP),
         ("untrained -> CLIP, groups of 4", dict(samples=0),
          {**CLIP, "batch_size": 64, "group": 4}),
         ("untrained -> SuperCLIP", dict(samples=0), SUPERCLIP)],
    ),
    "swap": Part(
        "The true caption of a validation scene with two objects, or the one in which they "
        "exchange their colours, so that the words are the same? At batch 32.",
        3, ("choose swap",), [both("batch 32")],
    ),
    "length": Part(
        "Samples seen, at batch 32.",
        3, (*LOOKS, "probe colour_shape"),
        [both(f"{n:,} samples", samples=n) for n in (SAMPLES // 2, SAMPLES, 2 * SAMPLES)],
    ),
    "captions": Part(
        "Captions, at batch 32. Dual: contrastive loss on the short ones, labels from the long.",
        5, LOOKS,
        [*(both(c, captions=c) for c in ("short", "long", "mixed")),
         ("SuperCLIP: short -> dual", dict(captions="short"), DUAL)],
    ),
}  # fmt: skip


def key(spec):
    return json.dumps(spec, sort_keys=True)


class Study:
    """The finished runs of a runs.jsonl, and what is still to do."""

    def __init__(self, path, seeds=5):
        self.path, self.seeds = path, seeds
        lines = path.read_text().splitlines() if path.exists() else []
        self.results = {}
        for result in map(json.loads, lines):
            self.results[key({**run.RUN, **result["spec"]})] = result

    def add(self, result):
        self.results[key(result["spec"])] = result
        with open(self.path, "a") as file:
            file.write(json.dumps(result) + "\n")

    def search(self, spec):
        """The runs that look for the learning rate of a spec, and the rate, or None while some of
        them are missing. The search adds a lower rate while the lowest is as good as the best, and
        a higher one while the highest is the best. Scores within a point of the best are as good,
        because a thousand pairs tell no more. Of their rates the lowest is taken, because it is the
        farthest from those at which training fails. Objects differ by few points, so that such
        rates have three seeds, and the best mean is taken. Kinds that differ in captions and the
        like share a rate."""
        shared = {k: spec[k] for k in ("data", "settings", "batch_size", "group")}
        shared |= {"cls_weight": 1.0 if spec["cls_weight"] else 0.0, "search": True}
        shared["captions"] = "mixed" if spec["data"] == "scenes" else "long"
        shared["samples"] = needed(spec["batch_size"])
        middle, exponents, seeds = 3.5e-4 * math.sqrt(spec["batch_size"] / 32), [-1, 0, 1], {}
        while True:
            rates = [float(f"{middle * 2**e:.3g}") for e in exponents]
            kinds = [(rate, seed) for rate in rates for seed in seeds.get(rate, (100,))]
            kinds = [{**shared, "learning_rate": rate, "seed": seed} for rate, seed in kinds]
            specs = [{**run.RUN, **kind} for kind in kinds]
            values = [*self.searched(specs).values()]
            if None in values:
                return specs, None
            best = values.index(max(values))
            good = [rate for rate, value in zip(rates, values) if value >= max(values) - 0.01]
            if good[0] == rates[0] and exponents[0] > -4:
                exponents.insert(0, exponents[0] - 1)
            elif best == len(values) - 1 and exponents[-1] < 3:
                exponents.append(exponents[-1] + 1)
            elif spec["data"] == "objects" and len(good) > 1 and not seeds:
                seeds = dict.fromkeys(good, (100, 101, 102))
            else:
                return specs, rates[best] if seeds else good[0]

    def searched(self, specs):
        """{rate: what its runs are judged by, as a mean over seeds}: R@1, or of products R@10. None
        if a run is missing."""
        metric, found = "R@10" if specs[0]["data"] == "products" else "R@1", {}
        for spec in specs:
            result = self.results.get(key(spec))
            value = result and result["scores"][metric]["value"]
            found.setdefault(spec["learning_rate"], []).append(value)
        return {
            r: None if None in values else statistics.mean(values) for r, values in found.items()
        }

    def specs(self, part, changes):
        """One kind of run, with each of its seeds; None if its learning rate is not known yet."""
        spec = {**run.RUN, **changes}
        if spec["learning_rate"] is None:
            spec["learning_rate"] = self.search(spec)[1] if spec["samples"] else 0.0
        if spec["learning_rate"] is None:
            return None
        return [{**spec, "seed": seed} for seed in range(min(self.seeds, PARTS[part].seeds))]

    def todo(self, part):
        """What the first unfinished row of a part needs next: its searches, or its runs."""
        for _, *kinds in PARTS[part].rows:
            specs, searches = [], []
            for changes in kinds:
                known = self.specs(part, changes)
                specs += known or []
                searches += [] if known else self.search({**run.RUN, **changes})[0]
            new = {key(spec): spec for spec in searches or specs if key(spec) not in self.results}
            if new:
                return list(new.values())
        return []

    def runs(self, part, changes):
        """The finished runs of one kind."""
        found = [self.results.get(key(spec)) for spec in self.specs(part, changes) or []]
        return [result for result in found if result]

    def values(self, part, changes, metric):
        """{seed: value} of the finished runs of one kind."""
        runs = self.runs(part, changes)
        scores = {r["spec"]["seed"]: r["scores"].get(metric) for r in runs}
        return {seed: score["value"] for seed, score in scores.items() if score}


def describe_machine():
    """Where and when: without it no number means anything."""
    cpu = subprocess.getoutput("grep -m1 'model name' /proc/cpuinfo").partition(": ")[2]
    commit = subprocess.getoutput("git describe --always --dirty")
    where = {"device": f"{cpu}, {os.cpu_count()} cores", "torch": torch.__version__}
    return {**where, "commit": commit, "date": time.strftime("%Y-%m-%d %H:%M")}


def work(study, parts, sources, jobs):
    """Run what is missing. sources: folders of objects and products, by name."""
    machine, prepared = describe_machine(), set()
    # spawn, because to fork a process that has threads may hang
    context = torch.multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        context.Pool(jobs, torch.set_num_threads, (1,)) as pool,
    ):
        for part in parts:
            while todo := study.todo(part):
                for name, settings in {(s["data"], s["settings"]) for s in todo} - prepared:
                    prepared.add((name, settings))
                    source = {"source": sources[name]} if name in sources else {}
                    getattr(run, f"prepare_{name}")(Path(folder), settings, **source)
                tasks = [(spec, Path(folder)) for spec in todo]
                bar = tqdm(pool.imap_unordered(run.run, tasks), part, len(todo), unit="run")
                for result in bar:
                    study.add({**result, **machine})
                    changed = {k: v for k, v in result["spec"].items() if v != run.RUN[k]}
                    scores = {k: result["scores"].get(k) for k in PARTS[part].metrics}
                    scores = (f"{k} {100 * s['value']:.1f}" for k, s in scores.items() if s)
                    tqdm.write(f"{changed}: {', '.join(scores)}, {result['seconds']:.0f} s")
        pool.close()
        pool.join()  # or the processes end before they have tidied up, and Python complains


# -----------------------------------------------------------------------------
# The report


def interval(differences):
    """-> mean, and half of the width of its 95 % interval, or None if there is only one number."""
    n, mean = len(differences), statistics.mean(differences)
    if n < 2:
        return mean, None
    return mean, QUANTILE[n] * statistics.stdev(differences) / math.sqrt(n)


def cell(a, b):
    """{seed: value} of both kinds -> "12.3 -> 45.6, +33.3 ± 2.0" in percent. A CLIP has no words,
    so that there is nothing to compare them with."""
    seeds = a.keys() & b.keys()
    if not seeds:
        return f"{100 * statistics.mean(b.values()):.1f}" if b else ""
    mean, half = interval([100 * (b[s] - a[s]) for s in sorted(seeds)])
    text = f"{100 * statistics.mean(a[s] for s in seeds):.1f} -> "
    text += f"{100 * statistics.mean(b[s] for s in seeds):.1f}, {mean:+.1f}"
    if half is None:
        return text
    return text + f" ± {half:.1f}" + (" (no reliable difference)" if abs(mean) <= half else "")


def markdown(heads, lines):
    rows = [heads, ["---"] * len(heads), *lines]
    return [*(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def head_of(metric, scores):
    score = scores.get(metric)
    if not score:  # nothing of it was run
        return metric
    levels = ", ".join(f"{x} {100 * score[x]:.1f}" for x in ("chance", "floor") if x in score)
    return f"{metric} ({levels}, n {score['n']:,})"


def table_of(study, part):
    """A part's table in Markdown, a list of lines."""
    text, seeds, metrics, rows = PARTS[part]
    lines, scores = [], {}
    for label, a, b in rows:
        one, other = study.runs(part, a), study.runs(part, b)
        n, rates = min(len(one), len(other)), "not run"
        if n:
            rates = f"{one[0]['spec']['learning_rate']:g} / {other[0]['spec']['learning_rate']:g}"
            scores = other[0]["scores"]
        cells = [cell(*(study.values(part, c, m) for c in (a, b))) if n else "" for m in metrics]
        lines.append([label, f"{n} of {seeds}", rates, *cells])
    heads = ["", "seeds", "learning rates", *(head_of(m, scores) for m in metrics)]
    return [f"## {part}", "", text, "", *markdown(heads, lines)]


def search_table(study):
    """Every learning rate that was tried, and what it gave."""
    lines = {}
    for part in PARTS.values():
        for changes in (changes for _, *kinds in part.rows for changes in kinds):
            specs, best = study.search({**run.RUN, **changes})
            if best and changes.get("samples") != 0:
                spec, values = specs[0], study.searched(specs)
                name = "SuperCLIP" if spec["cls_weight"] else "CLIP"
                name += f", {spec['data']}, batch {spec['batch_size']}"
                name += f" in groups of {spec['group']}" if spec["group"] else ""
                name += f", settings: {spec['settings']}" if spec["settings"] < 256 else ""
                tried = (f"{rate:g}: {100 * value:.1f}" for rate, value in values.items())
                lines[name] = [name, f"{best:g}", ", ".join(tried)]
    text = (
        "R@1 in percent (products: R@10) of one seed, among a thousand training pairs held out for "
        "this. Rates within a point of the best are as good; the lowest is taken, or of objects "
        "the best mean over three seeds. Both methods start with the same three rates, and go on "
        "while the end of the range is taken."
    )
    table = markdown(["", "best", "learning rate: score"], lines.values())
    return ["## Learning rates", "", text, "", *table] if lines else []


def draw_panel(axis, study, part, numbers, label):
    """Zero-shot accuracy of both methods against a number, one of which belongs to each row of a
    part: seeds, means, intervals."""
    rows = {x: row for x, row in zip(numbers, PARTS[part].rows) if study.runs(part, row[2])}
    if not rows:
        return
    ends = []
    for name, kind, colour, aside in (("CLIP", 1, "#4b5563", 0.96), ("SuperCLIP", 2, "#d1495b", 1)):
        points = []
        for x, row in rows.items():
            values = [100 * v for v in study.values(part, row[kind], "colour_shape").values()]
            if values:
                points.append((x * aside, *interval(values)))
                axis.scatter([x * aside] * len(values), values, color=colour, s=14, alpha=0.5)
        if points:
            xs, means, halves = zip(*points)
            axis.errorbar(xs, means, [h or 0 for h in halves], color=colour, capsize=3)
            ends.append((means[-1], xs[-1], name, colour))
    apart = max(0, 9 - (max(ends)[0] - min(ends)[0])) / 2  # or the names would overlap
    for (y, x, name, colour), side in zip(sorted(ends), (-apart, apart)):
        beside = dict(xytext=(12, 0), textcoords="offset points", va="center")
        axis.annotate(name, (x, y + side), color=colour, **beside)
    axis.axhline(100 / 64, color="black", ls=":", lw=1)
    axis.text(0.5, 3.5, "chance 1.6 %", ha="center", transform=axis.get_yaxis_transform())
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(rows), labels=map(str, rows))
    axis.set(xlabel=label, ylim=(0, 102))
    axis.spines[["top", "right"]].set_visible(False)


def figure(study, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 12})
    _, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True)
    draw_panel(axes[0], study, "batch", BATCH_SIZES, "batch size (256: three times the samples)")
    draw_panel(axes[1], study, "groups", GROUPS, "pairs compared (of a batch of 64)")
    draw_panel(axes[2], study, "settings", SETTING_COUNTS, "settings (batch 8)")
    axes[0].set_ylabel("zero-shot, colour + shape (%)")
    plt.tight_layout()
    plt.savefig(path, dpi=150)


def quick(jobs):
    """One seed of the groups of 4, at the learning rates that the whole study has found."""
    PARTS["groups"] = PARTS["groups"]._replace(rows=PARTS["groups"].rows[:1])
    with tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder) / "runs.jsonl", seeds=1)
        known = Study(FOLDER / "runs.jsonl").results
        study.results |= {k: result for k, result in known.items() if result["spec"]["search"]}
        work(study, ["groups"], {}, jobs)
        print("\n".join(table_of(study, "groups")))


def keep(folder):
    """Train both methods at batch 8 again, one seed of each, and keep the models in `folder`."""
    study, kinds = Study(FOLDER / "runs.jsonl"), PARTS["batch"].rows[0][1:]
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)  # as a process of the study has
    with tempfile.TemporaryDirectory() as tables:
        run.prepare_scenes(Path(tables), run.RUN["settings"])
        for name, changes in zip(("clip", "superclip"), kinds):
            spec, path = study.specs("batch", changes)[0], folder / f"{name}.pt"
            scores = run.run((spec, Path(tables), path))["scores"]
            print(f"{path}: colour_shape {100 * scores['colour_shape']['value']:.1f} %")


def report(study, figure_path):
    results = list(study.results.values())
    check(results, f"{study.path} holds no run yet")
    hours = sum(r["seconds"] for r in results) / 3600
    devices = " and ".join(sorted({r["device"] for r in results}))
    dtypes = " and ".join(sorted({r["dtype"] for r in results}))
    lines = [
        "# CLIP and SuperCLIP, made small", "",
        "Made by `python -m study.compare`. A cell reads: mean of the first kind -> mean of the "
        "second, and their difference with its 95 % interval (paired by seed, Student's t), in "
        "percent. R@k is the mean of both ways among 1,000 validation pairs with long captions. Of "
        "scenes, colour_shape, colour and shape are zero-shot scores of pictures of one object, "
        "and held_out those of combinations that training never shows.", "",
        f"{len(results)} runs in {dtypes}, {hours:.1f} core-hours on {devices}, torch "
        f"{results[-1]['torch']}. runs.jsonl has the seconds, dtype, commit and date of each.", "",
    ]  # fmt: skip
    for part in PARTS:
        lines += table_of(study, part)
    lines += search_table(study)
    path = study.path.with_name("results.md")
    path.write_text("\n".join(lines))
    figure(study, figure_path)
    print(f"wrote {path} and {figure_path}")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--quick", action="store_true", help="one seed of both methods, groups of 4; keeps nothing")
    add("--report", action="store_true", help="do not train: write results.md and the figure")
    add("--keep", type=Path, metavar="DIR", help="train and keep the models of docs/demo.html")
    add("--only", nargs="+", choices=PARTS, help="parts of the study (default: all)")
    text = "train/CLASS/ and test/CLASS/ of photographs (default: downloads CIFAR-10)"
    add("--objects", type=Path, metavar="DIR", help=text)
    add("--products", type=Path, metavar="DIR", help="pairs.csv and images/ of a shop's products")
    jobs = {"type": number(int, 1), "default": os.cpu_count()}
    add("--jobs", **jobs, help="runs at a time (default: the cores)")
    args = parser.parse_args(argv)
    if args.quick or args.keep:
        return quick(args.jobs) if args.quick else keep(args.keep)
    study = Study(FOLDER / "runs.jsonl")
    if not args.report:
        parts = args.only or [part for part in PARTS if args.products or part != "products"]
        check(args.products or "products" not in parts, "this part needs --products")
        work(study, parts, {"objects": args.objects, "products": args.products}, args.jobs)
    report(study, FIGURE)


if __name__ == "__main__":
    run_command(main)
