"""The paper's claims, reproduced small: CLIP against SuperCLIP on the built-in shapes.

    python study/small_batch.py --quick        the effect, in four minutes
    python study/small_batch.py                everything, an hour and a half on two cores
    python study/small_batch.py report         figure and tables again, from study/

Parts, for --only: negatives (how many pairs a pair is told from), length (of training), main (batch
sizes), captions (mixes), ablations, flickr (photographs, if --flickr names shards of them), cost.
The learning rates of a part are searched first. A run is a JSON file in out_dir/runs with what is
needed to believe it; what is there is not run again, so a study that was stopped goes on. CLIP is
--cls_weight 0, and all runs of a table, but for length, have seen the same number of samples.

This file is the plan and the report; small_batch_run.py is one run.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import superclip
import train
from study import small_batch_run
from study.small_batch_run import KINDS, RUN

PARTS = ("negatives", "length", "main", "captions", "ablations", "flickr", "cost")
METHODS = {"CLIP": 0.0, "SuperCLIP": 1.0}  # name -> cls_weight
SEARCH = dict(split="search", seed=100)  # a seed and scenes that no other run is judged by
FEW = 2  # pairs contrasted where the parts ask what matters when there are few


# -----------------------------------------------------------------------------
# The plan: which runs


def path_of(spec, args):
    """Two parts that ask for the same run share it: its file is named by what it is."""
    always = ("data", "batch_size", "cls_weight", "learning_rate", "samples", "seed")
    parts = [str(spec["data"]), *(f"{k}={spec[k]:g}" for k in always[1:])]
    parts += [f"{k}={v}" for k, v in spec.items() if k not in always and v != RUN[k]]
    return args.out_dir / "runs" / ("_".join(parts) + ".json")


def variants(args, part):
    """{row of a part's table: what its runs have in common}; learning_rate None: searched."""

    def pair(label, **changes):  # both methods
        return {f"{name}, {label}": dict(cls_weight=w, **changes) for name, w in METHODS.items()}

    few = dict(batch_size=64, group=FEW)
    rows, start = [], {**RUN, "samples": args.samples, "learning_rate": None}  # None: searched
    if part == "negatives":
        rows = [pair(f"groups of {g}", batch_size=64, group=g) for g in args.groups]
        rows.append(pair("all 64", batch_size=64))
    elif part == "length":
        for samples in (args.samples // 2, args.samples, args.samples * 2):
            rows.append(pair(f"groups of {FEW}, {samples:,} samples", samples=samples, **few))
            rows.append(pair(f"all 64, {samples:,} samples", samples=samples, batch_size=64))
        # is it the learning rate? CLIP, longest, at SuperCLIP's
        control = {**start, **few, "cls_weight": 0.0, "samples": samples}
        control["learning_rate"] = rate(args, {**control, "cls_weight": 1.0})
        rows.append({f"CLIP at SuperCLIP's rate, groups of {FEW}, {samples:,} samples": control})
    elif part == "main":
        rows = [pair(f"batch {B}", batch_size=B) for B in args.batch_sizes]
    elif part == "captions":
        rows = [pair(mix, captions=mix, **few) for mix in ("short", "long", "mixed")]
        rows.append({"SuperCLIP, dual": dict(captions="short", label_captions="long", **few)})
    elif part == "ablations":
        rows = [{"SuperCLIP": few, "without IDF": dict(idf=False, **few)}]
        rows += [{f"lambda {w:g}": dict(cls_weight=w, **few)} for w in (0.0, 0.25, 0.5, 2.0)]
        rows.append(pair("sigmoid", loss="sigmoid", **few))
        rows.append(pair("patch dropout .5", patch_dropout=0.5, **few))
    elif part == "flickr":
        start["samples"] = args.flickr_samples
        rows = [pair(f"batch {B}", data="flickr", batch_size=B) for B in (32, 128)]
    return {name: {**start, **changes} for row in rows for name, changes in row.items()}


def search_specs(args, spec):
    """The learning rates to try for a row: the same range for both methods, which goes on for as
    long as its best is at an end. Rows that differ in captions, loss, lambda and the like share it.
    """
    base = 1e-3 * math.sqrt(spec["batch_size"] / 32)
    tuned = {**RUN, **SEARCH, **{k: spec[k] for k in ("data", "batch_size", "group")}}
    tuned["cls_weight"] = 1.0 if spec["cls_weight"] else 0.0
    samples = args.samples if spec["data"] == "shapes" else args.flickr_samples
    # half of them, but for groups: with few negatives there is nothing to rank after the half
    tuned["samples"] = samples if spec["group"] else samples // 2
    factors = [0.25, 0.5, 1]
    while True:
        specs = [{**tuned, "learning_rate": round(f * base, 6)} for f in sorted(factors)]
        found = [value_of(s, args) for s in specs]
        best = None if None in found else found.index(max(found))
        if best == 0 and min(factors) > 0.1:
            factors.append(min(factors) / 2)
        elif best == len(found) - 1 and max(factors) < 4:
            factors.append(max(factors) * 2)
        else:
            return specs


def rate(args, spec):
    """The learning rate that the search has found for a row; without one a rule of thumb."""
    found = {s["learning_rate"]: value_of(s, args) for s in search_specs(args, spec)}
    found = {rate: value for rate, value in found.items() if value is not None}
    rule_of_thumb = round(3e-4 * math.sqrt(spec["batch_size"] / 32), 6)
    return max(found, key=found.get) if found else rule_of_thumb


def searches(args, parts):
    """[(row, its search runs)] of parts. Rows with the same search appear once."""
    rows = {}
    for part in parts:
        for name, spec in variants(args, part).items():
            specs = search_specs(args, spec)
            rows.setdefault(path_of(specs[0], args), (f"{part}: {name}", specs))
    return list(rows.values())


def plan(args, part):
    """[(row of the table, its runs)] of a part."""
    rows = []
    for name, spec in variants(args, part).items():
        spec["learning_rate"] = spec["learning_rate"] or rate(args, spec)
        seeds = args.seeds if part in ("negatives", "main", "flickr") else min(2, args.seeds)
        rows.append((name, [{**spec, "seed": seed} for seed in range(seeds)]))
    return rows


def load(spec, args):
    path = path_of(spec, args)
    return json.loads(path.read_text()) if path.exists() else None


def value_of(spec, args):
    """What a search goes by: R@1, or R@10 of photographs, of which R@1 is all noise; or None."""
    result = load(spec, args)
    return result and result["scores"]["R@1" if spec["data"] == "shapes" else "R@10"]["value"]


def missing(args, rows):
    """{file: run} of those runs of rows that are still to do."""
    specs = {path_of(spec, args): spec for _, specs in rows for spec in specs}
    return {path: spec for path, spec in specs.items() if not path.exists()}


def study(args):
    """All runs that are missing. The search comes first: it fixes the others' learning rates."""
    (args.out_dir / "runs").mkdir(parents=True, exist_ok=True)

    def rounds():  # what a search finds decides where it goes on
        while not args.quick and (todo := missing(args, searches(args, args.only))):
            yield "search", todo
        for part in args.only:
            if todo := missing(args, plan(args, part)):
                yield part, todo

    if next(rounds(), None) is None:
        return
    with tempfile.TemporaryDirectory() as cache:
        small_batch_run.prepare(args, Path(cache))
        # spawn: to fork a process that has threads may hang
        context = torch.multiprocessing.get_context("spawn")
        with context.Pool(args.jobs, torch.set_num_threads, (1,)) as pool:
            for part, todo in rounds():
                total = sum(spec["samples"] for spec in todo.values())
                tasks = [(spec, Path(cache), path) for path, spec in todo.items()]
                bar = tqdm(total=total, desc=part, unit="sample", unit_scale=True)
                for spec, result in pool.imap_unordered(small_batch_run.run, tasks):
                    bar.update(spec["samples"])
                    scores = result["scores"]
                    told = {k: scores[k]["value"] for k in ("R@1", "both") if k in scores}
                    told = ", ".join(f"{k} {100 * v:.1f} %" for k, v in told.items())
                    tqdm.write(f"{path_of(spec, args).stem}: {told}, {result['seconds']:.0f} s")
                bar.close()
            pool.close()
            pool.join()


# -----------------------------------------------------------------------------
# Cost


def flops_of(call):
    """-> (all, those of matrices with weights: attention's products left out)."""
    with FlopCounterMode(display=False) as counter:
        call()
    counts = counter.get_flop_counts()["Global"]
    return counter.get_total_flops(), sum(n for op, n in counts.items() if "bmm" not in str(op))


def step_seconds(config, batch_size, pairs):
    """Least seconds of forward and backward, without the head and with it, taken in turn: the
    least, since whatever else runs on the machine only adds."""
    _, _, autocast, scaler = small_batch_run.set_up()
    torch.backends.cuda.enable_flash_sdp(config.image_size // config.patch_size >= 10)
    models = [superclip.SuperCLIP(replace(config, cls_weight=w)).train() for w in METHODS.values()]
    images = torch.randint(256, (batch_size, 3, config.image_size, config.image_size)).byte()
    tokens = torch.randint(1, config.vocab_size - 1, (batch_size, 32))
    tokens[:, -1] = config.vocab_size - 1
    part = {"images": images, "tokens": tokens, "label_tokens": tokens}
    times = [[], []]
    for _ in tqdm(range(pairs), desc=f"timing {config.vision_width} wide", leave=False):
        for model, own in zip(models, times, strict=True):
            model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            train.forward_backward(
                train.Towers(model), model, [part], None, slice(None), autocast, scaler
            )
            own.append(time.perf_counter() - start)
    return [min(own) for own in times]


def cost(args):
    """Parameters, forward FLOPs of a pair, and time of a step, with the head and without it."""
    result = {**small_batch_run.provenance(), "models": {}}
    tiny_vocab = small_batch_run.shapes_tokenizer().vocab_size
    for name, batch_size, pairs in (("tiny", 32, 50), ("ViT-B-16", 4, 8), ("ViT-L-16", 0, 0)):
        vocab = tiny_vocab if name == "tiny" else 49408
        config = superclip.SuperCLIPConfig.preset(name, vocab_size=vocab)
        # The counter knows matrix products, but not the CPU's flash attention.
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model = superclip.SuperCLIP(config)
            image = torch.zeros(1, 3, config.image_size, config.image_size)
            text = torch.zeros(1, config.context_length, dtype=torch.long)
            towers, linear = flops_of(
                lambda m=model, i=image, t=text: (m.encode_image(i), m.encode_text(t))
            )
            head, _ = flops_of(lambda m=model, c=config: m.head(torch.zeros(1, 2, c.vision_width)))
        result["models"][name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "head_parameters": sum(p.numel() for p in model.head.parameters()),
            "width": config.vision_width, "vocabulary": vocab, "head_flops": head,
            "tower_flops": towers, "tower_flops_without_attention_products": linear,
            "batch_size": batch_size,
            "step_seconds": step_seconds(config, batch_size, pairs) if pairs else None,
        }  # fmt: skip
    small_batch_run.write_json(args.out_dir / "cost.json", result)


# -----------------------------------------------------------------------------
# Report

COLUMNS = {  # part -> metrics of its table
    "negatives": ("R@1", "R@5", "R@10", "both", "both, unseen", "colour", "shape"),
    "length": ("R@1", "R@5", "both", "colour", "shape"),
    "main": ("R@1", "R@5", "R@10", "both", "both, unseen", "colour", "shape"),
    "captions": ("R@1", "R@5", "both", "colour", "shape"),
    "ablations": ("R@1", "R@5", "both", "colour", "shape"),
    "flickr": ("R@1", "R@5", "R@10", "image_to_text R@1", "text_to_image R@1"),
}
ABOUT = {
    "negatives": "How many captions an image is told from, at batch 64: the contrastive loss "
    "within groups of so many pairs, everything else alike, so that all rows have the same "
    "updates. R@k: mean of both ways among the validation scenes with their long captions. Both: "
    "zero-shot over the 64 pairs of colour and shape; unseen: the 8 of them that no training "
    "scene shows.",
    "length": "Samples seen, at batch 64. The last row: is it the learning rate alone?",
    "main": "Batch sizes, at the same samples seen: the smaller the batch, the more updates.",
    "captions": f"Captions, in groups of {FEW} of a batch of 64. Dual: contrastive loss on the "
    "short, labels from the long.",
    "ablations": f"Ablations, in groups of {FEW} of a batch of 64; lambda 0 is CLIP.",
    "flickr": "Photographs of Flickr8k, 72 pixels, CLIP's vocabulary, all captions of the dev set.",
}


def percent(values, signed=False):
    """[shares] -> mean +- standard deviation in percent."""
    text = f"{100 * statistics.mean(values):{'+' if signed else ''}.1f}"
    return text + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table_of(args, part):
    """A part's table in Markdown, a list of lines; [] if nothing of it was run."""
    metrics, lines, before, all_results = COLUMNS[part], [], None, []
    for name, specs in plan(args, part):
        results = [r for spec in specs if (r := load(spec, args))]
        if not results:
            continue
        all_results += results
        scores = [[r["scores"][m]["value"] for r in results] for m in metrics]
        lines.append([name, len(results), f"{specs[0]['learning_rate']:g}",
                      results[0]["steps"], *map(percent, scores)])  # fmt: skip
        row = (name, [r["arguments"]["seed"] for r in results], scores)
        if before and name == f"Super{before[0]}" and row[1] == before[1]:
            gains = [[b - a for a, b in zip(*pair, strict=True)]
                     for pair in zip(before[2], scores, strict=True)]  # fmt: skip
            lines.append(["*gain*", len(results), "", "", *(percent(g, True) for g in gains)])
        before = row
    if not lines:
        return []
    s = all_results[0]["scores"]
    heads = [f"{m} (chance {100 * s[m]['chance']:.1f}, n {s[m]['n']:g})" for m in metrics]
    heads = ["", "seeds", "learning rate", "updates", *heads]
    about = ABOUT[part]
    if part != "length":
        about += f" {all_results[0]['samples_seen']:,} samples seen a run."
    about += f" {effort(all_results)}."
    return [f"## {part}", "", about, "", *markdown(heads, lines)]


def search_table(args):
    lines, all_results = [], []
    for name, specs in searches(args, PARTS):
        results = [r for spec in specs if (r := load(spec, args))]
        if results:
            tried = {
                r["arguments"]["learning_rate"]: value_of(r["arguments"], args) for r in results
            }
            best = rate(args, specs[0])
            tried = ", ".join(f"{lr:g}: {percent([v])}" for lr, v in sorted(tried.items()))
            lines.append([name, f"{best:g}", tried])
            all_results += results
    if not lines:
        return []
    about = (
        "Learning rates: R@1 in percent (chance 0.1) of one seed, among a thousand training scenes "
        "held out for this, and R@10 (chance 1) of photographs; after half the samples, with "
        "groups after all. A row of the other tables uses the best of its search. "
        f"{effort(all_results)}."
    )
    return ["## search", "", about, "", *markdown(["", "best", "learning rate: score"], lines)]


def effort(results):
    minutes, r = sum(r["seconds"] for r in results) / 60, results[0]
    return f"{minutes:.0f} core-minutes on {r['machine']}, {r['dtype']}, torch {r['torch']}"


def markdown(heads, rows):
    return ["| " + " | ".join(map(str, row)) + " |"
            for row in (heads, ["---"] * len(heads), *rows)] + [""]  # fmt: skip


def attribute_table(args):
    """Which captions are told apart, with few pairs contrasted and with all."""
    rows, columns = {}, ["", "n", "chance"]
    for name, specs in plan(args, "negatives"):
        results = [r for spec in specs if (r := load(spec, args))]
        if not results or specs[0]["group"] not in (FEW, None):
            continue
        for way in ("choose", "head") if "head colour" in results[0]["scores"] else ("choose",):
            columns.append(name + (" (its head)" if way == "head" else ""))
            for kind in (*KINDS, "swap"):
                own = [r["scores"][f"{way} {kind}"] for r in results]
                row = rows.setdefault(kind, [kind, own[0]["n"], f"{100 * own[0]['chance']:.0f}"])
                row.append(percent([s["value"] for s in own]))
    if not rows:
        return []
    about = (
        "The true caption of a held-out scene against captions in which one thing was "
        'changed; swap: "a red circle left of a blue square" against "a blue square left '
        "of a red circle\", the same words. By the towers, and by the head's words alone."
    )
    return ["## attributes", "", about, "", *markdown(columns, rows.values())]


def cost_table(args):
    path = args.out_dir / "cost.json"
    if not path.exists():
        return []
    result, rows = json.loads(path.read_text()), []
    for name, m in result["models"].items():
        share = [100 * m["head_flops"] / m[k] for k in
                 ("tower_flops", "tower_flops_without_attention_products")]  # fmt: skip
        times = "not run"
        if m["step_seconds"]:
            a, b = m["step_seconds"]
            times = f"{1e3 * a:.1f} -> {1e3 * b:.1f} ms ({100 * (b / a - 1):+.1f} %), batch "
            times += str(m["batch_size"])
        towers = m["parameters"] - m["head_parameters"]
        rows.append([name, f"{towers:,} + {m['head_parameters']:,}"
                     f" ({100 * m['head_parameters'] / towers:+.1f} %)",
                     f"{m['tower_flops'] / 1e9:.3f}",
                     f"2 x {m['width']} x {m['vocabulary']} = {m['head_flops'] / 1e9:.4f}",
                     f"{share[0]:.3f} %", f"{share[1]:.3f} %", times])  # fmt: skip
    about = (
        f"The head is one product per image, 2 D V operations. The paper's 0.077 % is L/16 "
        "without attention's products. Time: forward and backward without the head -> with "
        f"it, the fastest of runs in turn, on {result['machine']}, torch {result['torch']}."
    )
    heads = ["", "parameters: towers + head", "GFLOP a pair, forward", "head's GFLOP", "share",
             "share without attention's products", "step"]  # fmt: skip
    return ["## cost", "", about, "", *markdown(heads, rows)]


def points(args, part, method):
    """{pairs contrasted, or batch size: results of the seeds} of a method."""
    result = {}
    for name, specs in plan(args, part):
        results = [r for spec in specs if (r := load(spec, args))]
        if name.startswith(method + ",") and results:
            result[specs[0]["group"] or specs[0]["batch_size"]] = results
    return result


def figure(args):
    """Accuracy against the pairs contrasted and against the batch size: mean, seeds, spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = {"both": "zero-shot, 64 pairs of colour and shape (%)",
               "R@1": "retrieval, mean R@1 of both ways (%)"}  # fmt: skip
    parts = {"negatives": "pairs contrasted, same batch and updates",
             "main": "batch size, same samples seen"}  # fmt: skip
    parts = {p: label for p, label in parts.items() if table_of(args, p)}
    if not parts:
        return None
    _, grid = plt.subplots(len(parts), 2, figsize=(9, 3.5 * len(parts)), squeeze=False)
    for row, (part, label) in zip(grid, parts.items(), strict=True):
        for axis, (metric, title) in zip(row, metrics.items(), strict=True):
            for method, colour, aside in zip(METHODS, ("#7a7a7a", "#d1495b"), (0.97, 1.03)):
                for_each = points(args, part, method)
                if not for_each:
                    continue
                x = [place * aside for place in for_each]  # one does not hide the other
                y = [[100 * r["scores"][metric]["value"] for r in rs] for rs in for_each.values()]
                mean = [statistics.mean(v) for v in y]
                spread = [statistics.stdev(v) if len(v) > 1 else 0 for v in y]
                axis.errorbar(x, mean, spread, color=colour, label=method, capsize=4)
                for place, values in zip(x, y, strict=True):
                    axis.scatter([place] * len(values), values, color=colour, s=14, alpha=0.6)
                axis.set_xscale("log")  # before the ticks, which it would take away
                axis.set_xticks(list(for_each), labels=map(str, for_each))
                axis.minorticks_off()
                chance = 100 * next(iter(for_each.values()))[0]["scores"][metric]["chance"]
            axis.axhline(chance, color="black", ls=":", lw=1, label=f"chance, {chance:.1f} %")
            axis.set(xlabel=label, title=title, ylim=(0, 100))
            axis.grid(alpha=0.25)
            axis.legend(frameon=False, loc="lower right" if part == "negatives" else "lower left")
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    plt.tight_layout()
    plt.savefig(args.figure, dpi=130)
    return args.figure


def report(args):
    lines = ["# CLIP and SuperCLIP on small batches", "",
             "Mean ± standard deviation over seeds, in percent; *gain*: SuperCLIP minus CLIP of "
             "the same seed. Made by `python study/small_batch.py`; each run's "
             "arguments, versions, commit, machine and seconds are in runs/.", ""]  # fmt: skip
    for part in COLUMNS:
        lines += table_of(args, part)
        if part == "negatives":
            lines += attribute_table(args)
    lines += cost_table(args) + search_table(args)
    (args.out_dir / "results.md").write_text("\n".join(lines))
    for made in (args.out_dir / "results.md", figure(args)):
        if made:
            print(f"wrote {made}")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("command", nargs="?", choices=("run", "report"), default="run")
    add("--quick", action="store_true", help="2 pairs contrasted against 64, one seed, no search")
    add("--only", metavar="PARTS", help=f"with commas between: {','.join(PARTS)} (default: all)")
    add("--samples", type=int, default=RUN["samples"], help="seen by each run (default 24576)")
    add("--seeds", type=int, default=3, help="(default 3; 2 in length, captions, ablations)")
    add("--batch_sizes", default="16,32,64,128,256", help="with commas between")
    add("--groups", default="2,4,16", help="of pairs contrasted, in the part negatives")
    add("--flickr", nargs="+", metavar="SHARDS", help="of Flickr8k, to train on")
    add("--flickr_val", nargs="+", metavar="SHARDS", help="to be scored on")
    add("--flickr_samples", type=int, default=36_000, help="seen by each run (default 36000)")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: the cores)")
    add("--out_dir", type=Path, help="(default study; with --quick out-quick)")
    add("--figure", type=Path, help="(default assets/small_batch.png; else in out_dir)")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.groups, args.only = 1, f"{FEW}", args.only or "negatives"
    args.figure = args.figure or Path(
        args.out_dir or ("out-quick" if args.quick else "assets"), "small_batch.png"
    )
    args.out_dir = args.out_dir or Path("out-quick" if args.quick else "study")
    args.batch_sizes = [int(B) for B in args.batch_sizes.split(",")]
    args.groups = [int(g) for g in args.groups.split(",")]
    args.only = args.only.split(",") if args.only else list(PARTS)
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"--only: there is no part {', '.join(unknown)}")
    if bool(args.flickr) != bool(args.flickr_val):
        parser.error("--flickr and --flickr_val go together")
    if args.command == "run":
        if not args.flickr:
            if args.only == ["flickr"]:
                parser.error("--only flickr needs its shards: --flickr and --flickr_val")
            args.only = [part for part in args.only if part != "flickr"]
        study(args)
        if "cost" in args.only and not (args.out_dir / "cost.json").exists():
            cost(args)
    report(args)


if __name__ == "__main__":
    superclip.cli(main)
