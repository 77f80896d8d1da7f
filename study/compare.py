"""The paper's claims made small: CLIP against SuperCLIP on the built-in scenes.

    python -m study.compare --quick        one run of each method, three to five minutes
    python -m study.compare                everything, eight hours on two cores
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
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import train
from study import run
from superclip import check, cli, number

FOLDER = Path(__file__).parent
FIGURE = FOLDER.parent / "assets" / "study.png"
CLIP, SUPERCLIP = dict(cls_weight=0.0), dict(cls_weight=1.0)
# Of Student's distribution: 95 % of the means of n pairs lie within so many standard errors.
QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
BATCH_SIZES, SETTING_COUNTS, GROUPS = (8, 16, 32, 64, 128, 256), (1, 16, 256), (4, 16, 64)
SAMPLES = run.RUN["samples"]
BOLD = 3.5e-4
STARTED = dict(start=32_000, samples=16_000)  # fine-tuning
GENTLY = dict(STARTED, learning_rate=train.GENTLE["learning_rate"])  # as train.py --init_from


# -----------------------------------------------------------------------------
# The plan


def both(label, **changes):
    """A row that compares the two methods."""
    return label, {**CLIP, **changes}, {**SUPERCLIP, **changes}


def needed(batch_size, data="scenes"):
    """Samples seen: six epochs of the photographs; of the scenes equally many for all batch sizes
    but 256, because that one would make too few updates."""
    if data == "flickr":
        return 36_000
    return SAMPLES * 3 if batch_size == 256 else SAMPLES


class Part(NamedTuple):
    """A table of the report."""

    text: str  # what the rows compare
    seeds: int
    metrics: tuple
    rows: list  # label, one kind of run, another kind of run


OBJECTS = ("R@1", "colour_shape", "colour", "shape")
PARTS = {
    "batch": Part(
        "Batch size, at equal samples seen (256: three times as many).",
        5, ("R@1", "colour_shape", "held_out", "colour", "shape", "probe colour_shape"),
        [both(f"batch {B}", batch_size=B, samples=needed(B)) for B in BATCH_SIZES],
    ),
    "settings": Part(
        "Number of settings, at batch 8. The fewer there are, the more pairs of a batch share "
        "theirs, so that only the objects tell them apart. With one setting most captions repeat. "
        "So the scores of its search are low, and can hardly tell the rates apart.",
        5, (*OBJECTS, "probe colour_shape"),
        [both(f"{n} setting" + "s" * (n > 1), settings=n, batch_size=8) for n in SETTING_COUNTS],
    ),
    "rates": Part(
        "Learning rates, at batch 32. The last row is chosen afterwards: of these two rates, each "
        "method has the one at which it names more objects.",
        5, ("R@1", "colour_shape", "held_out", "colour", "shape", "probe colour_shape"),
        [*(both(f"{rate:g}", learning_rate=rate) for rate in (BOLD / 2, BOLD)),
         (f"CLIP at {BOLD / 2:g}, SuperCLIP at {BOLD:g}", {**CLIP, "learning_rate": BOLD / 2},
          {**SUPERCLIP, "learning_rate": BOLD})],
    ),
    "groups": Part(
        "Pairs compared, at batch 64 and equal updates: each image is told from the captions of "
        "its own group only.",
        5, (*OBJECTS, "probe colour_shape"),
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
    "attributes": Part(
        "The true caption of a validation scene against captions in which one thing was changed, "
        "at batch 32. Swap: two objects exchange their colours, so that the words are the same.",
        5, tuple(f"choose {kind}" for kind in (*run.ATTRIBUTES, "swap")), [both("batch 32")],
    ),
    "length": Part(
        "Samples seen, at batch 32.",
        3, (*OBJECTS, "probe colour_shape"),
        [both(f"{n:,} samples", samples=n) for n in (SAMPLES // 2, SAMPLES, 2 * SAMPLES)],
    ),
    "captions": Part(
        "Captions, at batch 32. Dual: contrastive loss on the short ones, labels from the long.",
        5, OBJECTS,
        [*(both(c, captions=c) for c in ("short", "long", "mixed")),
         ("SuperCLIP: short -> dual", dict(captions="short"),
          dict(captions="short", label_captions="long"))],
    ),
    "ablations": Part(
        "Ablations, at batch 32: SuperCLIP changed in one thing, or CLIP against SuperCLIP.",
        3, OBJECTS,
        [*((f"SuperCLIP: lambda {w}", SUPERCLIP, dict(cls_weight=w)) for w in (0.25, 2.0)),
         ("SuperCLIP: IDF -> all words alike", SUPERCLIP, dict(idf=False)),
         both("sigmoid loss", loss="sigmoid"), both("patch dropout 0.5", patch_dropout=0.5)],
    ),
    "finetune": Part(
        "Fine-tuning SuperCLIP, at batch 32: 32,000 samples of scenes that know one half of the "
        "cloths and of the shapes (old), then 16,000 of those that know the other half (new). From "
        "scratch: these 16,000 alone. R@1 among the validation scenes of either half.",
        3, ("R@1 old", "R@1 new"),
        [("before -> fine-tuned", dict(STARTED, samples=0), GENTLY),
         ("fine-tuned at 5e-5 -> at 5e-4", GENTLY, dict(STARTED, learning_rate=5e-4)),
         ("from scratch -> fine-tuned", dict(STARTED, start=0, learning_rate=5e-4), GENTLY)],
    ),
    "flickr": Part(
        "Photographs: Flickr8k at 72 pixels, CLIP's vocabulary. R@k among all captions of the dev "
        "set; zero-shot and linear probe (class token and patch mean) on photographs of CIFAR-10.",
        3, ("R@1", "R@5", "R@10", "zero-shot", "probe"),
        [both(f"batch {B}", data="flickr", samples=needed(B, "flickr"), batch_size=B)
         for B in (32, 128)],
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
        them are missing. Scores within a point of the best are as good as the best, because a
        thousand pairs tell no more. Of their rates the lowest is taken, because it is the farthest
        from those at which training fails. The search adds a lower rate while the lowest is taken,
        and a higher one while the highest is the best. Kinds that differ in captions, loss and the
        like share a rate."""
        shared = {k: spec[k] for k in ("data", "settings", "batch_size", "group")}
        shared |= {"cls_weight": 1.0 if spec["cls_weight"] else 0.0, "search": True, "seed": 100}
        shared["samples"] = needed(spec["batch_size"], spec["data"])
        middle, exponents = 3.5e-4 * math.sqrt(spec["batch_size"] / 32), [-1, 0, 1]
        while True:
            rates = [float(f"{middle * 2**e:.3g}") for e in exponents]
            specs = [{**run.RUN, **shared, "learning_rate": rate} for rate in rates]
            values = self.searched(specs)
            if None in values:
                return specs, None
            best = values.index(max(values))
            lowest = next(i for i, value in enumerate(values) if value >= max(values) - 0.01)
            if lowest == 0 and exponents[0] > -4:
                exponents.insert(0, exponents[0] - 1)
            elif best == len(values) - 1 and exponents[-1] < 3:
                exponents.append(exponents[-1] + 1)
            else:
                return specs, rates[lowest]

    def searched(self, specs):
        """What each of these runs is judged by in a search: R@1, or of photographs R@10. None if
        the run is missing."""
        found = [self.results.get(key(spec)) for spec in specs]
        metric = "R@10" if specs[0]["data"] == "flickr" else "R@1"
        return [result and result["scores"][metric]["value"] for result in found]

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
        return {r["spec"]["seed"]: r["scores"][metric]["value"] for r in runs}


def describe_machine():
    """Where and when: without it no number means anything."""
    cpu = subprocess.getoutput("grep -m1 'model name' /proc/cpuinfo").partition(": ")[2]
    commit = subprocess.getoutput("git describe --always --dirty")
    where = {"device": f"{cpu}, {os.cpu_count()} cores", "torch": torch.__version__}
    return {**where, "commit": commit, "date": time.strftime("%Y-%m-%d %H:%M")}


def work(study, parts, flickr, jobs):
    """Run what is missing. flickr: shards to train on, shards to be scored on, class folders."""
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
                    if name == "flickr":
                        run.prepare_flickr(Path(folder), *flickr)
                    else:
                        run.prepare_scenes(Path(folder), settings)
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
    """{seed: value} of both kinds -> "12.3 -> 45.6, +33.3 ± 2.0" in percent."""
    seeds = a.keys() & b.keys()
    if not seeds:
        return ""
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
    return f"{metric} (chance {100 * scores[metric]['chance']:.1f}, n {scores[metric]['n']:,})"


def table_of(study, part):
    """A part's table in Markdown, a list of lines; [] if nothing of it was run."""
    text, _, metrics, rows = PARTS[part]
    lines, scores = [], None
    for label, a, b in rows:
        cells = [cell(*(study.values(part, c, m) for c in (a, b))) for m in metrics]
        if any(cells):
            one, other = study.runs(part, a), study.runs(part, b)
            rates = f"{one[0]['spec']['learning_rate']:g} / {other[0]['spec']['learning_rate']:g}"
            lines.append([label, min(len(one), len(other)), rates, *cells])
            scores = other[0]["scores"]
    if not lines:
        return []
    heads = ["", "seeds", "learning rates", *(head_of(m, scores) for m in metrics)]
    return [f"## {part}", "", text, "", *markdown(heads, lines)]


def head_table(study, part, metrics, text):
    """What the word head does alone. There is nothing to compare it with, because CLIP has none."""
    lines, scores = [], None
    for label, _, superclip in PARTS[part].rows:
        runs = study.runs(part, superclip)
        if runs:
            scores = runs[0]["scores"]
            values = [[r["scores"][m]["value"] for r in runs] for m in metrics]
            lines.append([label, len(runs), *(f"{100 * statistics.mean(v):.1f}" for v in values)])
    heads = ["", "seeds", *(head_of(m, scores) for m in metrics)] if lines else []
    return [text, "", *markdown(heads, lines)] if lines else []


def search_table(study):
    """Every learning rate that was tried, and what it gave."""
    lines = {}
    for part in PARTS.values():
        for changes in (changes for _, *kinds in part.rows for changes in kinds):
            specs, best = study.search({**run.RUN, **changes})
            if best and changes.get("samples") != 0:
                spec, values = specs[0], study.searched(specs)
                name = "SuperCLIP" if spec["cls_weight"] else "CLIP"
                name = f"{name}, {spec['data']}, batch {spec['batch_size']}"
                name += f" in groups of {spec['group']}" if spec["group"] else ""
                few = spec["settings"] < run.RUN["settings"]
                name += f", settings: {spec['settings']}" if few else ""
                rates = [s["learning_rate"] for s in specs]
                tried = (f"{rate:g}: {100 * value:.1f}" for rate, value in zip(rates, values))
                lines[name] = [name, f"{best:g}", ", ".join(tried)]
    text = (
        "R@1 in percent (photographs: R@10) of one seed, among a thousand training pairs held out "
        "for this. Rates within a point of the best are as good; the lowest of them is taken. Both "
        "methods start with the same three rates, and go on while the end of the range is taken."
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
        work(study, ["groups"], None, jobs)
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
    dtypes = Counter(r["dtype"] for r in results)
    dtypes = ", ".join(f"{n} in {dtype}" for dtype, n in sorted(dtypes.items()))
    lines = [
        "# CLIP and SuperCLIP on the built-in scenes", "",
        "Made by `python -m study.compare`. A cell reads: mean of the first kind -> mean of the "
        "second, and their difference with its 95 % interval (paired by seed, Student's t), in "
        "percent. R@1 is the mean of both ways among 1,000 validation scenes with their long "
        "captions. colour_shape, colour and shape are zero-shot scores of pictures of one object, "
        "held_out those of combinations that training never shows.", "",
        f"{len(results)} runs ({dtypes}), {hours:.1f} core-hours on {devices}, torch "
        f"{results[-1]['torch']}. runs.jsonl has the seconds, dtype, commit and date of each. Rows "
        "that have not been run are left out; the command above goes on with them.", "",
    ]  # fmt: skip
    for part in PARTS:
        lines += table_of(study, part)
        if part == "attributes":
            text = "The same by the words of SuperCLIP's head alone. Its swap must be at chance."
            kinds = [f"head {kind}" for kind in (*run.ATTRIBUTES, "swap")]
            lines += head_table(study, part, kinds, text)
        if part == "flickr":
            text = "How well the head's words rank the dev images: mean average precision."
            lines += head_table(study, part, ["words, AP"], text)
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
    add(
        "--keep", type=Path, metavar="DIR", help="train the models of docs/demo.html, and keep them"
    )
    add("--only", nargs="+", choices=PARTS, help="parts of the study (default: all)")
    add("--flickr", nargs="+", metavar="SHARDS", help="of Flickr8k, to train on")
    add("--flickr_val", nargs="+", metavar="SHARDS", help="to be scored on")
    add("--classes", metavar="DIR", help="folders of photographs, a folder per class")
    jobs = {"type": number(int, 1), "default": os.cpu_count()}
    add("--jobs", **jobs, help="runs at a time (default: the cores)")
    args = parser.parse_args(argv)
    if args.quick or args.keep:
        return quick(args.jobs) if args.quick else keep(args.keep)
    study, flickr = Study(FOLDER / "runs.jsonl"), (args.flickr, args.flickr_val, args.classes)
    if not args.report:
        parts = args.only or [part for part in PARTS if part != "flickr" or all(flickr)]
        complete = "flickr" not in parts or all(flickr)
        check(complete, "photographs need --flickr, --flickr_val and --classes")
        work(study, parts, flickr, args.jobs)
    report(study, FIGURE)


if __name__ == "__main__":
    cli(main)
