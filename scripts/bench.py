"""Measure speed on this machine, beside the packages that do the same work, and check a GPU.

    python -m scripts.bench data --train_data SHARDS   from shard to batch, beside webdataset
    python -m scripts.bench loader --train_data SHARDS the loader of train.py alone, at full speed
    python -m scripts.bench step                       one update, beside open_clip
    python -m scripts.bench cuda --train_data SHARDS   a GPU: gradients, step, loader, a run

train.py's options set the rest, such as --model, --batch_size, --image_size, --dtype, --device and
--compile, because train.py's own functions build the model and update it here. Each result is a
line of numbers, where 3 (2-5) is a median with the lowest and the highest value. With --json FILE
all of them are kept, as soon as they are there.

Rivals take turns in one process, for several rounds. Ratios are taken within a round, so that slow
phases of the machine fall on both sides. A ratio carries over to other machines better than seconds
do.
"""

import argparse
import gc
import importlib.util
import io
import itertools
import statistics
import tempfile
import time
from contextlib import redirect_stdout

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import runtime
import train
from cli import (
    check,
    make_parser,
    number,
    optional,
    output_file,
    pick_device,
    pick_dtype,
    run_command,
    write_json,
)
from scripts.convert import open_clip_config
from scripts.log import read_log
from superclip import PRESETS, SuperCLIPConfig
from tokenizer import Tokenizer

LENGTH = 16  # tokens of a caption with start and end, which is usual on the web
# Learning rate and weight decay, which make no difference here
RATES = 5e-4, 0.2


def parse(options):
    """train.py's options -> args, with defaults for a benchmark."""
    defaults = ["--model=ViT-B-16", "--batch_size=16", "--no-compile"]
    return train.make_parser().parse_args([*defaults, *options])


def race(rivals, rounds, clock):
    """rivals: dict of name -> function without arguments. Yields each name and its numbers, a dict:
    seconds, and how many times as long as the first rival it takes."""
    seconds = {name: [] for name in rivals}
    for _ in data.progress(range(rounds + 1), "rounds", unit="round"):
        for name, function in rivals.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    first = next(iter(rivals))
    for name in rivals:
        # The first round pays for imports, caches and compilation.
        times = seconds[name][1:]
        ratios = [a / b for a, b in zip(times, seconds[first][1:])]
        yield name, {"seconds": min_median_max(times), f"ratio to {first}": min_median_max(ratios)}


def min_median_max(values):
    return [min(values), statistics.median(values), max(values)]


def show(value):
    """A number, short enough to read, or a spread as "median (lowest-highest)"."""
    if isinstance(value, list):
        low, median, high = map(show, value)
        return f"{median} ({low}-{high})"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return value


def open_pairs(settings):
    """The pairs of --train_data, with --vocab or CLIP's. Raises InputError if they make no
    batch."""
    check(settings.train_data, "this needs --train_data: a shard or two of photographs")
    tokenizer = Tokenizer.from_file(settings.vocab or "clip")
    size = settings.image_size or SuperCLIPConfig(**PRESETS[settings.model]).image_size
    shards = data.expand(settings.train_data)
    pairs = data.Pairs(shards, tokenizer, size, settings.captions, crop_area=settings.crop_area)
    is_enough = settings.batch_size <= len(pairs)
    check(is_enough, f"--batch_size is more than the {len(pairs):,} pairs")
    return pairs


# Each command is a generator of rows, dicts that main prints and keeps. It gets train.py's options,
# a list of strings, and the arguments of this file.

# -----------------------------------------------------------------------------
# data: from shard to batch


def bench_data(options, args):
    """This project's loader and webdataset's on the same photographs, with one thread."""
    open_clip = optional("open_clip", "open_clip_torch")
    webdataset = optional("webdataset")
    settings = parse(["--batch_size=64", "--image_size=224", *options])
    pairs = open_pairs(settings)
    N = settings.batch_size
    steps = len(pairs) // N
    preprocess = open_clip.transform.image_transform(pairs.image_size, is_train=True)
    tokenizer = open_clip.tokenizer.SimpleTokenizer()

    def ours():
        for _ in data.load_batches(pairs, N, slice(0, N), N, 0, steps, 0):
            pass

    def theirs():  # as most CLIP training does: get_wds_dataset of open_clip_train/data.py
        samples = webdataset.WebDataset(pairs.paths, shardshuffle=False)
        samples = samples.shuffle(N).decode("pilrgb").to_tuple("jpg;png;jpeg;webp", "txt")
        samples = samples.map_tuple(preprocess, lambda text: tokenizer(text)[0])
        for _ in zip(range(steps), samples.batched(N, partial=False)):
            pass

    # Processor time does not count what else the machine does.
    rivals = {"data.py": ours, "webdataset and open_clip": theirs}
    for name, numbers in race(rivals, args.repeat, time.process_time):
        yield {"data": name, "images/s": steps * N / numbers["seconds"][1], **numbers}


# -----------------------------------------------------------------------------
# loader: from shards to the device, by all processes


def bench_loader(options, args):
    """The speed of train.py's loader, with no model to wait for."""
    settings = parse(options)
    pairs = open_pairs(settings)
    device = runtime.device_of_process(settings.device)
    N = settings.batch_size
    steps = 10 * args.repeat
    start = time.perf_counter()
    batches = data.load_batches(pairs, N, slice(0, N), N, 0, steps, settings.workers, device)
    for [batch] in batches:  # the only micro-batch of a step
        batch["images"].sum().item()  # waits for the copy
    seconds = time.perf_counter() - start
    yield {"loader": "shards to device", "images/s": steps * N / seconds}


# -----------------------------------------------------------------------------
# step: one update of the weights


class Run:
    """A model, random pixels and tokens, and a step as train.py makes it, without patch dropout.
    options: train.py's."""

    def __init__(self, options):
        args = parse(options)
        self.args = args
        self.device = runtime.device_of_process(args.device)
        self.dtype = args.dtype or pick_dtype(self.device)
        tokenizer = Tokenizer.from_file(args.vocab or "clip")
        torch.backends.cuda.enable_flash_sdp(True)  # an earlier run may have switched it off
        torch.compiler.reset()  # torch would stop compiling after a few models
        self.model, _ = train.build_model(args, None, tokenizer.vocab_size, self.device)
        N = args.batch_size
        S = self.model.config.image_size
        images = torch.randint(256, (N, S, S, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        tokens = torch.randint(1, tokenizer.start, (N, LENGTH))
        tokens[:, -1] = tokenizer.end
        batch = {"images": images, "tokens": tokens, "label_tokens": tokens}
        self.batch = {name: x.to(self.device) for name, x in batch.items()}
        self.autocast, self.scaler = train.precision(self.device, self.dtype)
        if self.scaler.is_enabled():
            # At this scale the first gradients of float16 are finite, and no update is skipped.
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": 1024.0})
        self.optimizer = train.make_optimizer(self.model, *RATES)

    def backward(self):
        """Leaves the gradients in .grad."""
        M = self.args.micro_batch_size
        if M in (None, self.args.batch_size):
            train.plain_step(self.model, self.batch, self.autocast, self.scaler)
        else:
            split = [x.split(M) for x in self.batch.values()]
            micro_batches = [dict(zip(self.batch, part)) for part in zip(*split)]
            train.grad_cache_step(self.model, micro_batches, self.autocast, self.scaler)

    def step(self):
        self.backward()
        train.update(self.model, self.optimizer, self.scaler, 1.0)
        self.model.logit_scale.item()  # waits for the device


class OpenClipRun(Run):
    """The same with open_clip's model and loss. Its images are floats, and its captions are padded
    to the context length."""

    def __init__(self, options):
        open_clip = optional("open_clip", "open_clip_torch")
        super().__init__([*options, "--cls_weight=0"])
        self.model = open_clip.model.CLIP(**open_clip_config(self.model.config)).to(self.device)
        self.model.compile(disable=not self.args.compile)
        self.optimizer = train.make_optimizer(self.model, *RATES)
        self.contrastive_loss = open_clip.loss.ClipLoss()
        self.texts = F.pad(self.batch["tokens"], (0, self.model.context_length - LENGTH))
        self.images = (self.batch["images"] / 255 - 0.45) / 0.27

    def backward(self):
        with self.autocast:
            image_features, text_features, scale, *_ = self.model(self.images, self.texts)
            loss = self.contrastive_loss(image_features, text_features, scale)
        self.scaler.scale(loss).backward()


def bench_step(options, args):
    """The speed of each step stands beside that of a product of two large matrices, the most that a
    device can do. (Of open_clip's, a part is for padding.)"""
    runs = {"CLIP": Run([*options, "--cls_weight=0"]), "SuperCLIP": Run(options)}
    device = runs["CLIP"].device
    if device.type == "cuda":
        runs["SuperCLIP --compile"] = Run([*options, "--compile"])
    if importlib.util.find_spec("open_clip"):
        runs["open_clip"] = OpenClipRun(options)
    settings = runs["CLIP"].args
    dtype = runs["CLIP"].dtype
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, dtype))
    rivals = {name: run.step for name, run in runs.items()}
    rivals["matrix product"] = lambda: torch.mm(a, b)[0, 0].item()
    # Wall time, because a step uses all cores, and on a GPU no processor time at all.
    for name, numbers in race(rivals, args.repeat, time.perf_counter):
        # The counter knows neither compiled code nor all kernels of attention.
        eager = torch.compiler.set_stance("force_eager")
        plain = sdpa_kernel(SDPBackend.MATH)
        with eager, plain, FlopCounterMode(display=False) as counter:
            rivals[name]()
        numbers["TFLOP/s"] = counter.get_total_flops() / numbers["seconds"][1] / 1e12
        what = f"{name}, {settings.model}, batch {settings.batch_size}, {dtype}"
        yield {"step": what, **numbers}


# -----------------------------------------------------------------------------
# cuda: all that needs a GPU


def gradient(options):
    """-> the gradient of a small model as one vector, float32 on the CPU."""
    # with the tiny model's own size of images, whatever the options say
    run = Run([*options, "--model=tiny", "--image_size=72", "--batch_size=16"])
    run.backward()
    parts = [p.grad.flatten().cpu() for p in run.model.parameters()]
    return torch.cat(parts) / run.scaler.get_scale()


def compare_gradients(options, ways):
    """How far the gradient is from that of the CPU in float32."""
    allowed = torch.backends.cudnn.allow_tf32  # by default it is, for convolutions
    torch.backends.cudnn.allow_tf32 = False
    expected = gradient([*options, "--device=cpu", "--dtype=float32"])
    for dtype, way in itertools.product(("float32", "bfloat16", "float16"), ways):
        found = gradient([*options, f"--dtype={dtype}", *way.split()])
        error = (found - expected).norm() / expected.norm()
        yield {"gradient": f"{dtype} {way}", "relative error": error.item()}
    torch.backends.cudnn.allow_tf32 = allowed


def train_for_real(options, args):
    """A short run of train.py: the rows of its log, in which memory_gb is the most that its tensors
    took."""
    with tempfile.TemporaryDirectory() as folder:
        length = [f"--steps={5 * args.repeat}", f"--log_every={args.repeat}"]
        # What it says of the folder, which soon is gone, is no use to anybody.
        with redirect_stdout(io.StringIO()):
            train.main([*length, "--val_data=none", f"--out_dir={folder}", *options])
        _, rows = read_log(f"{folder}/log.jsonl")
    for row in rows:
        if "loss" in row:
            yield row


def bench_cuda(options, args):
    device = pick_device(parse(["--device=cuda", *options]).device)  # says so if there is none
    ways = ["", "--micro_batch_size=4", "--grad_checkpointing"]
    batch_size = 32  # because four models are held
    if device.type == "cuda":
        ways.append("--compile")
        if torch.cuda.get_device_properties(device).total_memory > 40e9:
            batch_size = 256  # with fewer pairs a fast card waits for Python
    options = ["--device=cuda", f"--batch_size={batch_size}", *options]
    for part in (  # generators, of which none has begun
        compare_gradients(options, ways),
        bench_step(options, args),
        bench_loader(options, args),
        train_for_real(options, args),
    ):
        gc.collect()  # models of the part before, which are in reference cycles
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:  # so that the other parts run even if one fails
            yield from part
        except Exception as error:
            yield {"failed": part.__name__, "why": f"{type(error).__name__}: {error}"}


# -----------------------------------------------------------------------------

COMMANDS = {"data": bench_data, "loader": bench_loader, "step": bench_step, "cuda": bench_cuda}


def main(argv):
    parser = make_parser(__doc__)
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--repeat", type=number(int, 1), default=10, help="rounds (default 10)")
    parser.add_argument("--json", type=output_file(".json"), help="file to write the numbers to")
    args, options = parser.parse_known_args(argv)  # the others are train.py's
    if args.command == "data":
        torch.set_num_threads(1)  # now, so that the first row says so
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    where = {"torch": torch.__version__, "threads": torch.get_num_threads(), "GPUs": str(cards)}
    rows = []
    for row in itertools.chain([where], COMMANDS[args.command](options, args)):
        line = ", ".join(f"{name} {show(value)}" for name, value in row.items())
        print(line)
        rows.append(row)
        write_json(args.json, rows)


if __name__ == "__main__":
    run_command(main)
