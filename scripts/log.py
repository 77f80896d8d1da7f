"""What a run tells its user: progress bar and log.jsonl, validations, and a summary at the end.

train.py calls these functions, so that its own loop stays the algorithm.
"""

import fcntl
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import eval as evaluation
from scripts.report import REFERENCE, write_report
from scripts.stop import all_sum
from superclip import InputError, SuperCLIP, SuperCLIPConfig, check


def fingerprint(pairs):
    """A short text that changes when the shards or the source of the captions do; None for None."""
    if pairs is None:
        return None
    content = pairs.index.numpy().tobytes() + str(pairs.captions).encode()
    return hashlib.sha1(content).hexdigest()[:12]


def machine(device=None):
    """Where and when: without it no number means anything."""
    info = Path("/proc/cpuinfo")  # on Linux; platform is vague there
    names = re.findall("model name\\s*: (.*)", info.read_text()) if info.exists() else []
    cpu = f"{(names or [platform.machine()])[0]}, {os.cpu_count()} cores"
    # In a shell, so that a machine without git needs no special case.
    command, here = "git describe --always --dirty 2>/dev/null", Path(__file__).parent
    git = subprocess.run(command, shell=True, cwd=here, capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name(device) if device and device.type == "cuda" else cpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git.stdout.strip(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def describe_run(args, steps, world, device, dtype, pairs, model):
    """The header of a log: what a reader needs to know to believe the rows that follow."""
    return {
        "arguments": vars(args),
        "config": vars(model.config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "samples": len(pairs),
        "data_fingerprint": fingerprint(pairs),
        "steps": steps,
        "processes": world,
        "dtype": str(dtype).removeprefix("torch."),
        **machine(device),
    }


FEW_STEPS = 200  # in all: with fewer, even a model that is fine-tuned hardly moves

# Dense matrix products with bfloat16 (float16 before Ampere) inputs and float32 sums, in TFLOP/s,
# from the vendors' data sheets. A name is looked for in the order of this table.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "A10G": 70,
    "A10": 125, "L40S": 362, "L4": 121, "RTX 5090": 209, "RTX 4090": 165, "RTX 3090": 71,
    "V100": 125, "T4": 65,
}  # fmt: skip


def peak_tflops(name):
    """What a device can do at most, by the words of its name; None where that is not known."""
    found = (peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name))
    return next(found, None)


def pair_flops(config, length, patches):
    """Floating point operations of one pair, forward and backward: a caption of `length` tokens, an
    image of which `patches` are kept. Counted on the meta device, which computes shapes only.
    Recomputation does not count."""
    with torch.device("meta"):
        model = SuperCLIP(config)
        images = torch.empty(1, 3, config.image_size, config.image_size)
        tokens, weights = torch.zeros(1, length, dtype=torch.long), torch.zeros(config.vocab_size)
        keep = torch.zeros(1, patches, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        outputs = model.features_and_word_loss(images, tokens, tokens, weights, keep)
        sum(output.sum() for output in outputs).backward()
    return counter.get_total_flops()


def peak_memory_gb(device):
    """Of the device if it is a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Output:
    """A terminal or pipe that may fail. The Ctrl-C that stops a run may also end the `tee` that it
    prints to, and what cannot be printed is no reason to lose a run."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


class Log:
    """The progress of a run. Rank 0 shows a bar and appends to log.jsonl: a header, a row for each
    logged step, a row for each validation, and the final scores. A resumed run may log a step
    twice, and the later row counts. Every process names the bad samples that it meets, once."""

    def __init__(self, args, rank, step, header, unused):
        sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
        self.header, self.batch_size, self.rank = header, args.batch_size, rank
        self.first_step, self.bad_samples, self.named, self.wandb = step, 0, set(), None
        # Counted only where the device's peak is known, for the share of it that a run reaches.
        self.peak = peak_tflops(header["device"]) if header["dtype"] != "float32" else None
        config = SuperCLIPConfig(**header["config"])
        kept = (config.image_size // config.patch_size) ** 2 * (1 - args.patch_dropout)
        self.pair_flops = cache(partial(pair_flops, config, patches=max(1, round(kept))))
        hidden = rank > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=header["steps"], initial=step, unit="step", disable=hidden)
        self.restart(step)
        if rank > 0:
            return
        found = not args.wandb or importlib.util.find_spec("wandb")
        check(found, "--wandb needs a package: pip install wandb")
        path = Path(args.out_dir) / "log.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+", errors="replace")
        try:  # The lock ends with this process, however that ends. Workers do not inherit it.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another run is using {args.out_dir}: name another --out_dir"
            ) from None
        # Checked here, with the lock: another run may have begun while this one was starting.
        exists = any(path.parent.glob("*.pt")) and not args.resume
        check(not exists, f"{path.parent} holds a run: add --resume, or name another --out_dir")
        if args.wandb:
            self.wandb = importlib.import_module("wandb").init(project=args.wandb, config=header)
        for temporary in path.parent.glob(".*.pt.*.tmp"):  # from a run that was killed as it saved
            temporary.unlink()
        if step == 0:  # what an earlier attempt has logged, without ever saving, is not of this run
            self.file.truncate(0)
        self.file.seek(max(0, self.file.tell() - 1))
        self.file.write("" if self.file.read() in ("", "\n") else "\n")  # killed in mid-line
        self.write({"header": header})
        tqdm.write(
            f"{args.init_from or args.model or 'ViT-B-16'}: {header['parameters']:,} parameters, "
            f"{header['config']['vocab_size']:,} tokens; {header['samples']:,} pairs; "
            f"steps {step:,} to {header['steps']:,} of {args.batch_size} pairs, "
            f"{header['samples'] // args.batch_size:,} an epoch; "
            f"{header['device']}, {header['dtype']}"
        )
        if not args.steps and header["steps"] < FEW_STEPS:
            tqdm.write("these are few steps: a smaller --batch_size or more --epochs makes more")
        for entry in unused[:20]:
            text = "not used: {} {}: {}".format(*entry)
            tqdm.write(text.encode(errors="replace").decode())  # names in a tar may be any bytes
        if len(unused) > 20:
            tqdm.write(f"not used: {len(unused) - 20:,} more (see python -m scripts.show)")

    def restart(self, step):
        """Start the interval over which the next row measures speed and waiting."""
        self.clock, self.waited, self.flops, self.last_step = time.perf_counter(), 0.0, 0, step

    def wait_for(self, batches, n):
        """The next n micro-batches. Measures the wait, and counts and names bad samples."""
        start = time.perf_counter()
        parts = [next(batches) for _ in range(n)]
        self.waited += time.perf_counter() - start
        self.bar.update()
        if self.peak:
            for tokens in (part["tokens"] for part in parts):
                self.flops += len(tokens) * self.pair_flops(length=tokens.shape[1])
        for entry in (entry for part in parts for entry in part["replaced"]):
            self.bad_samples += 1
            if entry not in self.named:
                tqdm.write("bad sample: {} {}: {}".format(*entry))
            self.named.add(entry)
        return parts

    def measure(self, step, losses, grad_norm, learning_rate, model):
        """The row of a step, which is the same on all processes. Speed and waiting are of the steps
        since the last row, bad samples of those since the start or the resumption. Raises
        InputError if the loss is not finite, or if more than half of the samples were bad."""
        bad = torch.tensor(float(self.bad_samples), device=grad_norm.device)
        contrastive, words, bad = all_sum(torch.stack([*losses.values(), bad])).tolist()
        contrastive, words = (x / self.header["processes"] for x in (contrastive, words))
        seconds, samples = time.perf_counter() - self.clock, step * self.batch_size
        seen = (step - self.first_step) * self.batch_size
        loss = contrastive + model.config.cls_weight * words
        check(
            math.isfinite(loss) and math.isfinite(model.logit_scale.item()),  # NaN spreads to all
            f"the loss is {loss}, or the weights are NaN, at step {step}. What is saved is from "
            "before: try a lower --learning_rate, more --warmup_steps, another --dtype; --resume",
        )
        # A bad sample may be replaced by another one, so that one pair may count several.
        check(bad <= seen, f"more than half are bad: {bad:,.0f} of {seen + bad:,.0f} samples read")
        return {
            "step": step,
            "samples": samples,
            "epoch": round(samples / self.header["samples"], 4),
            "loss": loss,
            "contrastive_loss": contrastive,
            "classification_loss": words,
            "logit_scale": model.logit_scale.exp().item(),
            "grad_norm": grad_norm.item(),
            "learning_rate": learning_rate,
            "bad_samples": round(bad),
            "images_per_second": round((step - self.last_step) * self.batch_size / seconds, 1),
            "data_wait": round(self.waited / seconds, 3),  # share of the time
            "mfu": round(self.flops / seconds / self.peak / 1e12, 3) if self.peak else None,
            "memory_gb": round(peak_memory_gb(grad_norm.device), 2),
        }

    def write(self, row):
        """Add a row to the log, and show it if it is one of training."""
        if self.rank > 0:
            return
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:  # a lost line is no reason to lose a run
            tqdm.write(f"warning: cannot write the log: {error}")
        if self.wandb and "header" not in row:
            self.wandb.log(row, step=row["step"])
        if "loss" in row:
            text = "contrastive {contrastive_loss:.3f}, words {classification_loss:.3f}, "
            text = (text + "{images_per_second:.0f} images/s, {data_wait:.0%} waiting").format(
                **row
            )
            text += f", {row['mfu']:.0%} of the peak" if row["mfu"] else ""
            self.bar.set_postfix_str(text)
            if self.bar.disable:  # there is no terminal, so no bar
                print(f"step {row['step']:6d}  {text}", flush=True)
            self.restart(row["step"])


def score_classes(model, tokenizer, args):
    """Zero-shot accuracy on each folder of --zeroshot_data, by its path."""
    scores = {}
    for folder in args.zeroshot_data or ():
        dataset = evaluation.ClassFolders(folder, model.config.image_size)
        classes = evaluation.class_names(dataset)
        scores[folder] = evaluation.zeroshot(
            model, tokenizer, dataset, classes, workers=args.workers
        )["top1"]
    return scores


@torch.compiler.set_stance("force_eager")  # other shapes and dtypes than in training
def validate(model, pairs, args, log, step):
    """Retrieval among the validation pairs and zero-shot classification: the row of the log, which
    is returned. Prints the head's top words for the first two pairs."""
    paused = time.perf_counter()
    model.eval()
    result = evaluation.retrieval(*evaluation.encode_shards(model, pairs, workers=args.workers))
    score, zeroshot = evaluation.mean_r1(result), score_classes(model, pairs.tokenizer, args)
    row = {"step": step, "validation": result, "mean_r1": score, "zeroshot": zeroshot}
    log.write(row)
    text = f"step {step:6d}  validation: mean R@1 {100 * score:.1f} % of {len(pairs):,} pairs"
    for name, s in zeroshot.items():
        text += f", {Path(name).name} {100 * s['value']:.1f} %"
    tqdm.write(text)
    if model.head is not None:
        images, texts = next(evaluation.batches(evaluation.ShardImages(pairs), 2, 0, "words"))
        for captions, words in zip(texts, evaluation.top_words(model, pairs.tokenizer, images)):
            tqdm.write(f'  "{captions[0]}"')
            tqdm.write("    " + ", ".join(f"{word} {p:.2f}" for word, p, _ in words))
    model.train()
    log.clock += time.perf_counter() - paused  # not counted in images per second
    return row


@torch.compiler.set_stance("force_eager")
def summary(model, tokenizer, args, val_pairs, row, best, log, step):
    """Print what the run has reached, beside what chance would give, and what to do next. row: of
    the last validation, or None."""
    if row is None and val_pairs:  # the run was complete when it was resumed
        row = validate(model, val_pairs, args, log, step)
    model.eval()
    result = row and row["validation"]
    zeroshot = row["zeroshot"] if row else score_classes(model, tokenizer, args)
    if result:
        print("\nretrieval among the validation pairs")
        evaluation.print_retrieval(result)
    for folder, s in zeroshot.items():
        print(evaluation.line(f"zero-shot {Path(folder).name}", s))
    log.write({"step": step, "final": {"retrieval": result, **zeroshot}})
    is_best = row and row["mean_r1"] <= best  # else best.pt could not be written
    path = Path(args.out_dir) / ("best.pt" if is_best else "last.pt")
    if row and row["mean_r1"] < best:
        print(f"\nThese are the scores of the last step, which is in {args.out_dir}/last.pt.")
        print(f"An earlier step had a mean R@1 of {100 * best:.1f} %: {path} holds that one.")
    if val_pairs:
        page = Path(args.out_dir) / "report.html"
        try:
            write_report(model, tokenizer, val_pairs, page.with_name("log.jsonl"), page, REFERENCE)
            print(f"\nCurves, words and where they are seen, on a page for your browser: {page}")
        except (OSError, InputError) as error:  # the run itself is complete
            print(f"\nwarning: cannot write {page}: {error}")
    print(f"\nThe model is in {path}. What it sees, and where, in a picture of your own:")
    print(f"  python -m scripts.words --checkpoint {path} --image FILE --out words.png")
