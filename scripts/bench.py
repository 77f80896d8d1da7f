"""Measure speed and memory on this machine, beside the packages that do the same work.

    python -m scripts.bench data     from shard to batch, beside webdataset
    python -m scripts.bench index    the pass over the tar headers, and its cache
    python -m scripts.bench step     one update of the weights, beside open_clip
    python -m scripts.bench memory   what a step needs by batch size, predicted without a GPU
    python -m scripts.bench cuda     all that needs a GPU, planned for eight minutes

train.py's options set the rest. `data` needs --train_data, shards of photographs, and looks at
--image_size and --batch_size. step, memory and cuda take --model, --batch_size, --dtype, --device,
--compile and so on, and let train.py's functions build the model and its update.

Rivals take turns in one process, for several rounds. Ratios are taken within a round and their
median is printed, so that slow phases of the machine fall on both sides. A ratio carries over to
other machines better than images per second do.
"""

import argparse
import gc
import io
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import weakref
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import eval as evaluation
import train
from scripts.convert import open_clip_config
from scripts.log import machine, pair_flops
from scripts.pack import add_member
from superclip import LayerNorm, SuperCLIPConfig, check, cli, number

ROOT = Path(__file__).resolve().parent.parent
WORDS = 14  # tokens of a caption, which is usual on the web


def parse(options):
    """train.py's options -> args, with defaults for a benchmark."""
    parser = train.make_parser()
    defaults = {"model": "ViT-B-16", "batch_size": 16, "dtype": "bfloat16", "compile": False}
    parser.set_defaults(**train.DEFAULTS | defaults)
    return parser.parse_args(options)


# -----------------------------------------------------------------------------
# Clocks and tables


def take_turns(rivals, rounds, clock):
    """dict of name -> function without arguments. Each runs once a round. Returns a dict of name ->
    list of seconds, one per round."""
    seconds = {name: [] for name in rivals}
    for _ in data.progress(range(rounds + 1), "rounds", unit="round"):
        for name, function in rivals.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    # The first round pays for imports, caches and compilation.
    return {name: times[1:] for name, times in seconds.items()}


def spread(values):
    """-> [lowest, median, highest]"""
    return [f(values) for f in (min, statistics.median, max)]


def compare_times(seconds, images, unit, per_second, reference):
    """name -> its times in a unit of which a second has `per_second`, images per second, and how
    many times as long as the reference it takes."""
    return {
        name: {
            unit: spread([per_second * t for t in times]),
            "images/s": images / statistics.median(times),
            f"times as long as {reference}": spread(
                [a / b for a, b in zip(times, seconds[reference])]
            ),
        }
        for name, times in seconds.items()
    }


def show(value):
    """A number, or a spread as "median (lowest-highest)", with three digits or more."""
    if isinstance(value, list):
        low, middle, high = map(show, value)
        return f"{middle} ({low}-{high})"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def print_table(rows):
    """rows: dicts with the same keys. Prints Markdown, for the README."""
    columns = list(rows[0])
    for cells in (columns, ["---"] * len(columns), *(map(show, row.values()) for row in rows)):
        print(f"| {' | '.join(cells)} |")


# -----------------------------------------------------------------------------
# data: from shard to batch


def write_shard(path, samples):
    """samples: dicts of extension -> bytes."""
    with tarfile.open(path, "w") as tar:
        for i, sample in enumerate(samples):
            for extension, content in sample.items():
                add_member(tar, f"{i:08d}.{extension}", content)


def jpeg(image, short_side):
    """A picture -> the bytes of a JPEG with this short side."""
    size, out = [round(side * short_side / min(image.size)) for side in image.size], io.BytesIO()
    image.convert("RGB").resize(size, Image.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


def bench_data(options, args, folder):
    torch.set_num_threads(1)
    settings = parse(["--batch_size=64", "--image_size=224", *options])
    check(settings.train_data, "data needs --train_data: shards of photographs")
    pairs, path = data.Pairs(data.expand(settings.train_data), None, 0), f"{folder}/samples.tar"
    rows = pairs.index[: args.samples].tolist()
    images = [pairs.read(row, data.IMAGE) for row in rows]
    texts = [pairs.read(row, data.TEXT) for row in rows]
    # 512 px is the size of many images on the web.
    larger = [jpeg(Image.open(io.BytesIO(image)), 512) for image in images]
    for what, versions in (("as they are", images), ("with a short side of 512 px", larger)):
        write_shard(path, [{"jpg": image, "txt": text} for image, text in zip(versions, texts)])
        print(f"{len(rows)} images {what} -> {settings.image_size} px, one thread")
        compare_loaders(path, settings.image_size, settings.batch_size, args.repeat)


def compare_loaders(path, image_size, batch_size, rounds):
    pairs = data.Pairs([path], data.Tokenizer.from_file("clip"), image_size)
    steps = len(pairs) // batch_size
    check(steps, f"--batch_size is more than the {len(pairs)} images")
    jpegs = [pairs.read(row, data.IMAGE) for row in pairs.index[: steps * batch_size].tolist()]

    def ours():
        everything = slice(None)
        order = data.micro_batches(len(pairs), batch_size, everything, batch_size, 0, 0, steps)
        for _ in data.make_loader(pairs, 0, batch_sampler=order, collate_fn=pairs.collate):
            pass

    def decode():  # the part that every loader has to do
        for jpeg in jpegs:
            Image.open(io.BytesIO(jpeg)).load()

    peer = webdataset_loader(path, image_size, batch_size, steps)
    rivals = {"this project": ours, "webdataset + open_clip": peer, "JPEG decoding alone": decode}
    # Processor time does not count what else the machine does.
    seconds = take_turns(rivals, rounds, time.process_time)
    times = compare_times(seconds, len(jpegs), "us an image", 1e6 / len(jpegs), "this project")
    print_table([{"loader": name, **numbers} for name, numbers in times.items()])


def webdataset_loader(path, image_size, batch_size, steps):
    """The way that most CLIP training takes: get_wds_dataset of open_clip_train/data.py."""
    import open_clip
    import webdataset as wds

    preprocess = open_clip.transform.image_transform(image_size, is_train=True)
    tokenizer = open_clip.tokenizer.SimpleTokenizer()

    def load():
        pipeline = (
            wds.WebDataset(path, shardshuffle=False)
            .shuffle(batch_size)
            .decode("pilrgb")
            .to_tuple("jpg", "txt")
            .map_tuple(preprocess, lambda text: tokenizer(text)[0])
            .batched(batch_size, partial=False)
        )
        for _ in zip(range(steps), pipeline):
            pass

    return load


# -----------------------------------------------------------------------------
# index: from tar headers to rows


def bench_index(options, args, folder):
    paths = [f"{folder}/{i:05d}.tar" for i in range(args.shards)]
    sample = {"jpg": bytes(200), "txt": b"a caption", "json": b"{}"}  # no header has their content
    for path in data.progress(paths, "making shards", unit="shard"):
        write_shard(path, [sample] * args.samples)
    for name, run in (
        ("header pass, one core", lambda: list(map(data.read_headers, paths, range(len(paths))))),
        ("first start, all cores", lambda: data.build_index(paths)),
        ("second start, from the cache", lambda: data.build_index(paths)),
    ):
        start = time.perf_counter()
        run()
        seconds, n = time.perf_counter() - start, args.shards * args.samples
        print(f"{name:30}{seconds:9.3f} s{n / seconds:14,.0f} samples/s")


# -----------------------------------------------------------------------------
# step: one update of the weights


class Run:
    """A model, random data, and one step as train.py makes it. options: those of train.py."""

    def __init__(self, options):
        self.args = parse(options)
        _, _, self.device, self.dtype = train.set_up(self.args)
        tokenizer = data.Tokenizer.from_file(self.args.vocab or "clip")
        torch.backends.cuda.enable_flash_sdp(True)  # an earlier run may have switched it off
        torch.compiler.reset()  # torch would stop compiling after a few models
        self.model = train.make_model(self.args, None, tokenizer, self.device)
        self.parts = synthetic_batch(self.args, self.model.config, tokenizer, self.device)
        patches = self.model.visual.grid**2
        self.keep = train.patches_to_keep(self.args, 0, patches, slice(None), self.device)
        self.autocast = torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)
        # With this scale the first gradients of float16 are finite, and no update is skipped.
        fp16 = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=1024, enabled=fp16)
        self.optimizer = train.make_optimizer(self.model, self.args)
        kept = patches if self.keep is None else self.keep.shape[1]
        length = self.parts[0]["tokens"].shape[1]
        self.flops = partial(pair_flops, self.model.config, length, kept)

    def backward(self):
        towers, rows = train.Towers(self.model), slice(None)
        return train.forward_backward(
            towers, self.model, self.parts, self.keep, rows, self.autocast, self.scaler
        )

    def update(self):
        train.update(self.model, self.optimizer, self.scaler, *[self.args.learning_rate] * 2)

    def step(self):
        self.backward()
        self.update()
        self.model.logit_scale.item()  # waits for the device


class OpenClipRun(Run):
    """The same with open_clip's model and loss. Its images are floats, and its captions are padded
    to the context length."""

    def __init__(self, options):
        super().__init__([*options, "--cls_weight=0"])
        import open_clip

        self.model = open_clip.model.CLIP(**open_clip_config(self.model.config)).to(self.device)
        if self.args.compile:
            self.model.compile()
        self.optimizer = train.make_optimizer(self.model, self.args)
        self.contrastive_loss = open_clip.loss.ClipLoss()
        images, tokens = (torch.cat([part[k] for part in self.parts]) for k in ("images", "tokens"))
        tokens = torch.nn.functional.pad(tokens, (0, self.model.context_length - tokens.shape[1]))
        self.inputs = (images / 255 - 0.45) / 0.27, tokens

    def backward(self):
        with self.autocast:
            loss = self.contrastive_loss(*self.model(*self.inputs)[:3])
        self.scaler.scale(loss).backward()


def synthetic_batch(args, config, tokenizer, device):
    """A list of micro-batches like train.py's: random pixels, and captions of random tokens."""
    shape = args.batch_size, config.image_size, config.image_size, 3  # channels last
    images = torch.randint(256, shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    ids = [random.choices(range(1, tokenizer.start), k=WORDS) for _ in range(args.batch_size)]
    tokens = tokenizer.rows(ids, min(config.context_length, data.round_up(ids)))
    batch = {"images": images, "tokens": tokens, "label_tokens": tokens}
    split = [x.to(device).split(args.micro_batch_size or len(x)) for x in batch.values()]
    return [dict(zip(batch, part)) for part in zip(*split)]


def compare_steps(options, rounds, *more):
    """name -> times of a step, taken in turn, and the share of a matrix product's speed that our
    own steps reach. more: options for another run of SuperCLIP, such as --compile."""
    runs = {
        "SuperCLIP": Run(options),
        "CLIP (--cls_weight 0)": Run([*options, "--cls_weight=0"]),
        "open_clip's CLIP": OpenClipRun(options),
    }
    runs |= {f"SuperCLIP {option}": Run([*options, option]) for option in more}
    run = runs["SuperCLIP"]
    # A product of two large matrices is the most that the device can do.
    n = 8192 if run.device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=run.device, dtype=run.dtype)
    rivals = {name: each.step for name, each in runs.items()}
    rivals["matrix product"] = lambda: torch.mm(a, b)[0, 0].item()
    # Wall time: a step uses all cores, and on a GPU no processor time at all.
    seconds = take_turns(rivals, rounds, time.perf_counter)
    peak = 2 * n**3 / min(seconds.pop("matrix product"))
    size = run.args.batch_size
    times = compare_times(seconds, size, "ms a step", 1e3, "CLIP (--cls_weight 0)")
    for name, numbers in times.items():
        # open_clip computes padding, too: its share would have another meaning.
        ours = not isinstance(runs[name], OpenClipRun)
        share = runs[name].flops() * numbers["images/s"] / peak if ours else None
        numbers["share of a matrix product's speed"] = share
    return times


def bench_step(options, args, _):
    settings = parse(options)
    print(f"{settings.model}, batch {settings.batch_size}, {settings.dtype}, {WORDS} words a text")
    times = compare_steps(options, args.repeat)
    print_table([{"step of": name, **numbers} for name, numbers in times.items()])


# -----------------------------------------------------------------------------
# memory: what a step needs at its peak

# Ways to train, which need less and less memory.
WAYS = {
    "plain": [],
    "--grad_checkpointing": ["--grad_checkpointing"],
    "--micro_batch_size 64": ["--micro_batch_size=64"],
}
GB = 2**30


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most there were at once. It sees the
    results of every operation, and Python tells it when their memory is given back."""

    def __init__(self, as_cuda=False):
        super().__init__()
        self.as_cuda, self.sizes, self.now, self.peak = as_cuda, {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.add(x.untyped_storage())
        return result

    def add(self, storage):  # views share one, which counts once
        if id(storage) not in self.sizes:
            self.sizes[id(storage)] = storage.nbytes()
            weakref.finalize(storage, self.remove, id(storage))
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def remove(self, key):
        self.now -= self.sizes.pop(key)


def compute_as_cuda(run):
    """Let the CPU keep for the backward pass what a GPU keeps."""
    torch.backends.cuda.enable_flash_sdp(True)  # train.py switches it off for small grids
    for module in run.model.modules() if run.dtype != torch.float32 else ():
        if isinstance(module, LayerNorm):  # CUDA's autocast computes it in float32
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
            module.register_forward_hook(lambda _, inputs, output: output.to(run.dtype))


def peak_of_step(options, live):
    """Bytes of weights, gradients, AdamW's two moments, of the activations that autograd keeps for
    the backward pass (of one micro-batch), and of all tensors at the peak of a step. The peak is
    less than the sum: when all gradients are there, the activations are gone."""
    run = Run(options)
    if live.as_cuda:
        compute_as_cuda(run)
    for p in run.model.parameters():  # AdamW makes its moments, from zero gradients to save time
        p.grad = torch.zeros_like(p)
    run.update()
    before, part = live.now, run.parts[0]
    keep = None if run.keep is None else run.keep[: len(part["images"])]
    with run.autocast:
        inputs = part["images"], part["tokens"], part["label_tokens"]
        graph = train.Towers(run.model)(*inputs, run.model.token_weights(), keep)
    activations = live.now - before
    del graph
    live.peak = live.now
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run.backward()
    run.update()
    moments = [x for state in run.optimizer.state.values() for x in state.values()]
    gradients = [*run.model.parameters()]
    tensors = {"weights": run.model.state_dict().values(), "gradients": gradients}
    tensors["moments"] = moments
    sizes = {name: sum(x.nbytes for x in group) for name, group in tensors.items()}
    return {**sizes, "activations": activations, "peak": live.peak}


def predict_memory(options):
    """peak_of_step, without the memory and without a GPU.

    train.py's own step runs on fake tensors, which have shapes but no memory and no numbers. So the
    count is exact in what the step creates: the bfloat16 copies of the weights, the similarities
    of all pairs, float32 logits, the graph of one micro-batch only. Left out is what tensors do
    not show: the CUDA context (about half a GB), fragmentation and rounding by the allocator, the
    workspaces of cuDNN, cuBLAS and the attention kernels. torch.compile usually keeps less.
    """
    args = parse(options)
    # float16 takes the same memory, but its scaler wants to see numbers.
    dtype = ["--dtype=bfloat16"] if args.dtype == "float16" else []
    # A fake model cannot be moved to another device, and need not be.
    stays = patch.object(torch.nn.Module, "to", lambda module, device: module)
    with FakeTensorMode(), stays, LiveBytes(as_cuda=args.device != "cpu") as live:
        return peak_of_step([*options, *dtype, "--device=cpu", "--no-compile"], live)


def compare_memory(options, measured=True):
    """What a step needs in GB: predicted, and measured if wanted. A GPU's allocator counts for
    itself; LiveBytes counts on a CPU."""
    numbers = {name: n / GB for name, n in predict_memory(options).items()}
    if measured:
        try:
            before = torch.cuda.memory_allocated()  # 0 without a GPU
            with LiveBytes() as live:
                peak = peak_of_step(options, live)["peak"]
            peak = torch.cuda.max_memory_allocated() - before or peak
            numbers["measured peak"] = peak / GB
        except torch.OutOfMemoryError:
            numbers["measured peak"] = "out of memory"
        free_memory()
    return numbers


def free_memory():
    gc.collect()  # models in reference cycles
    torch.cuda.empty_cache()  # does nothing without a GPU


def bench_memory(options, *_):
    settings, rows = parse(options), []
    measured = torch.cuda.is_available() and settings.device != "cpu"
    for batch_size in (64, 256, 1024):
        row = {"batch": str(batch_size)}
        for name, way in WAYS.items():
            gb = compare_memory([*options, f"--batch_size={batch_size}", *way], measured)
            row[name] = f"{gb['peak']:.1f} ({gb['activations']:.1f})"
            if measured:
                row[f"{name}, measured"] = gb["measured peak"]
        rows.append(row)
    print(f"Predicted for {settings.model}, {settings.dtype}, {WORDS} words a text: GB at the peak")
    print("of a step, and in brackets the activations that autograd keeps. Of that at any batch:")
    print("weights {weights:.2f}, gradients {gradients:.2f}, moments {moments:.2f}.\n".format(**gb))
    print_table(rows)


# -----------------------------------------------------------------------------
# cuda: all that needs a GPU

# Each is checked in every dtype.
CHECKED = ("", "--micro_batch_size=4", "--grad_checkpointing")
# The first model is also that of memory, loader and train. The most important comes first, because
# compiling takes a minute for each, and time may run out.
REAL = dict(
    models={"ViT-B-16": 256, "tiny": 1024, "ViT-L-14": 64},
    dtypes=("float32", "bfloat16", "float16"), compile="--compile",
    batches=(64, 256), samples=4096, seconds=10, steps=50,
)  # fmt: skip
# With --device cpu: the same path in seconds, for tests and before a GPU is paid for.
REHEARSAL = dict(
    models={"tiny": 4}, dtypes=("bfloat16",), compile="--no-compile",
    batches=(4,), samples=32, seconds=0.2, steps=10,
)  # fmt: skip


def attempt(function, *inputs):
    """What the function returns, a dict, or why it failed: the other parts can still run."""
    try:
        free_memory()
        return function(*inputs)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}".partition("\n")[0][:120]}


def gradients(*options):
    """-> losses (2,), all gradients as one vector; both float32 on the CPU."""
    random.seed(0)  # the same captions for all
    run = Run(["--model=tiny", "--batch_size=16", *options])
    torch.backends.cudnn.allow_tf32 = False  # which is on by default, for convolutions
    losses = torch.stack([*run.backward().values()])
    flat = torch.cat([p.grad.flatten() for p in run.model.parameters()]) / run.scaler.get_scale()
    return losses.cpu(), flat.cpu()


def compare_gradients(options, *tried):
    """How far losses and gradients are from those of the CPU in float32."""
    expected_losses, expected = gradients(*options, "--device=cpu", "--dtype=float32")
    losses, flat = gradients(*options, *tried)
    return {
        "losses differ by": (losses - expected_losses).abs().max().item(),
        "gradients, relative": ((flat - expected).norm() / expected.norm()).item(),
    }


def write_pictures(path, samples):
    """A shard of JPEGs of the size of a photograph's thumbnail. They are smooth noise, which takes
    about as many bytes as a photograph. A few of them repeat, so reading costs no disk."""
    pictures = []
    for _ in range(min(samples, 64)):
        channels = [Image.effect_noise((120, 80), 80) for _ in range(3)]
        pictures.append(jpeg(Image.merge("RGB", channels), 256))
    text = " ".join(random.choices("a photo of the red dog and its ball".split(), k=WORDS))
    write_shard(path, [{"jpg": pictures[i % 64], "txt": text.encode()} for i in range(samples)])


def time_loader(options, shards, seconds, step_speed):
    """The loader at full speed, with nothing else to do, beside the images that a step takes."""
    settings = parse(options)
    _, _, device, _ = train.set_up(settings)
    image_size = settings.image_size or SuperCLIPConfig.preset(settings.model).image_size
    pairs = data.Pairs(
        data.expand([shards]), data.Tokenizer.from_file(settings.vocab or "clip"), image_size
    )
    size = settings.batch_size
    order = data.micro_batches(len(pairs), size, slice(None), size, 0, 0, stop=10**9)
    batches = data.load_batches(pairs, order, size, settings.workers, device)
    begun, arrivals = time.perf_counter(), []
    while not arrivals or arrivals[-1] < begun + seconds or len(arrivals) < 3:
        next(batches)["images"].sum().item()  # waits for the copy
        arrivals.append(time.perf_counter())
    # Only the later half counts, because workers load a few batches ahead.
    late = arrivals[len(arrivals) // 2 - 1 :]
    speed = size * (len(late) - 1) / (late[-1] - late[0])
    keeps_up = str(speed >= step_speed) if step_speed else "unknown"
    return {"images/s": speed, "the step computes images/s": step_speed, "keeps up": keeps_up}


def train_for_real(options, shards, out_dir, steps):
    """A short run of train.py from shards to a checkpoint that eval.py can load."""
    command = [sys.executable, "train.py", f"--train_data={shards}", f"--out_dir={out_dir}"]
    # Whatever is before the first row of the log, such as compilation, is not counted below.
    rest = [f"--steps={steps}", f"--log_every={steps // 5}", f"--save_every={steps}", *options]
    command += ["--vocab=clip", "--dtype=bfloat16", *rest]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    check(run.returncode == 0, (run.stderr.strip() or "train.py failed").splitlines()[-1])
    lines = map(json.loads, Path(out_dir, "log.jsonl").read_text().splitlines())
    rows = [row for row in lines if "loss" in row]
    model, tokenizer, _ = evaluation.load(f"{out_dir}/last.pt")
    features = model.encode_text(tokenizer(["a photo of a dog"]))
    check(bool(features.isfinite().all()), "the checkpoint holds numbers that are not finite")
    names = ("images_per_second", "mfu", "data_wait", "memory_gb", "loss")
    return {"loss at first": rows[0]["loss"], **{name: rows[-1][name] for name in names}}


# A part and its share of the time in seconds, together less than eight minutes.
SHARES = {"gradients": 45, "step": 190, "memory, GB": 50, "loader": 30, "train.py": 140}


def units(options, size, folder, rounds, rows):
    """Yield what there is to do: part, name, function that returns numbers, its arguments. rows are
    the results so far."""
    for dtype, option in itertools.product(size["dtypes"], (*CHECKED, size["compile"])):
        tried = f"--dtype={dtype} {option}".split()
        yield "gradients", " ".join(tried), compare_gradients, options, *tried
    for name, n in size["models"].items():
        chosen = [f"--model={name}", f"--batch_size={n}", *options]
        yield "step", name, compare_steps, chosen, rounds, size["compile"]
    name, n = next(iter(size["models"].items()))
    chosen = [f"--model={name}", f"--batch_size={n}", *options]
    for n, way in itertools.product(size["batches"], WAYS):
        tried = [*chosen, f"--batch_size={n}", *WAYS[way]]
        yield "memory, GB", f"{name}, batch {n}, {way}", compare_memory, tried
    steps = [row for row in rows if row["what"].startswith(f"{name} SuperCLIP")]
    fastest = max((row["images/s"] for row in steps), default=None)
    shards = f"{folder}/*.tar"
    for i in range(4):
        write_pictures(f"{folder}/{i}.tar", size["samples"] // 4)
    yield "loader", "shards to device", time_loader, chosen, shards, size["seconds"], fastest
    yield "train.py", name, train_for_real, chosen, shards, f"{folder}/out", size["steps"]


def bench_cuda(options, args, folder):
    device = torch.device(parse(options).device or "cuda")
    check(device.type == "cpu" or torch.cuda.is_available(), "there is no CUDA device here")
    size, rows, ends = REHEARSAL if device.type == "cpu" else REAL, [], {}
    options = [f"--device={device}", *options]
    query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null"
    driver = subprocess.run(query, shell=True, capture_output=True, text=True).stdout.strip()
    where = {**machine(device), "CUDA": torch.version.cuda, "driver": driver}
    for part, what, function, *inputs in units(options, size, folder, args.repeat, rows):
        print(f"{part}: {what}", flush=True)
        now = time.perf_counter()
        late = now > ends.setdefault(part, now + SHARES[part])
        found = {"failed": "no time is left"} if late else attempt(function, *inputs)
        # A race of several models fills a row for each.
        several = isinstance(next(iter(found.values())), dict)
        for name, numbers in found.items() if several else [("", found)]:
            rows.append({"part": part, "what": f"{what} {name}".strip(), **numbers})
        # Written each time, so that nothing is lost if the machine is.
        content = json.dumps({"machine": where, "rows": rows}, indent=1).encode()
        data.write_file(args.json, lambda file: file.write(content))  # noqa: B023
    print(f"\n{', '.join(f'{name} {value}' for name, value in where.items())}\n")
    table = []
    for row in rows:
        part, what, *numbers = row.items()
        result = ", ".join(f"{name} {show(value)}" for name, value in numbers)
        table.append(dict([part, what, ("result", result)]))
    print_table(table)


# -----------------------------------------------------------------------------

COMMANDS = dict(
    data=bench_data, index=bench_index, step=bench_step, memory=bench_memory, cuda=bench_cuda
)


def main(argv):
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    add, count = parser.add_argument, number(int, 1)
    add("command", choices=COMMANDS)
    add("--samples", type=count, default=1000, help="data: images; index: per shard (1000)")
    add("--shards", type=count, default=50, help="index: shards to make (50)")
    add("--repeat", type=count, default=10, help="data, step, cuda: rounds (10)")
    add("--json", metavar="FILE", default="bench-cuda.json", help="cuda: all its numbers")
    args, options = parser.parse_known_args(argv)
    print(f"{os.cpu_count()} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # where indices are cached
        COMMANDS[args.command](options, args, folder)


if __name__ == "__main__":
    cli(main)
