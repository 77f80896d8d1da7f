"""Measure speed and memory on this machine, beside the packages that do the same work.

    python scripts/bench.py data     from shard to batch, beside webdataset
    python scripts/bench.py index    the pass over the tar headers, and its cache
    python scripts/bench.py step     one update of the weights, beside open_clip
    python scripts/bench.py memory   a large batch in micro-batches
    python scripts/bench.py cuda     what needs a GPU, checked and timed

train.py's options set the rest. `data` needs --train_data, shards of photographs, and looks at
--image_size and --batch_size. step, memory and cuda take --model, --batch_size, --dtype, --device,
--compile and so on, and let train.py's functions build the model and its update.

Rivals take turns in one process, for several rounds. Ratios are taken within a round and their
median is printed, so that slow phases of the machine fall on both sides. A ratio carries over to
other machines better than images per second do.
"""

import argparse
import io
import itertools
import os
import statistics
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import train  # noqa: E402
from scripts.convert import open_clip_config  # noqa: E402
from scripts.pack import add_member  # noqa: E402
from scripts.report import pair_flops, peak_memory_gb  # noqa: E402
from scripts.vocab import find_tokenizer  # noqa: E402
from superclip import check, cli, number  # noqa: E402

WORDS = 14  # tokens of a caption, which is usual on the web


def parse(options):
    """train.py's options -> args, with defaults for a benchmark."""
    parser = train.make_parser()
    defaults = {"model": "ViT-B-16", "batch_size": 16, "dtype": "bfloat16", "compile": False}
    parser.set_defaults(**train.DEFAULTS | defaults)
    return parser.parse_args(options)


# -----------------------------------------------------------------------------
# Clocks


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


def spread(values, digits):
    low, middle, high = (f(values) for f in (min, statistics.median, max))
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def print_times(seconds, images, unit, per_second, reference):
    """A row per rival: median and range of its times in a unit of which a second has `per_second`,
    images per second, and how many times as long as the reference it takes."""
    print(f"{'':28}{unit:>26}{'images/s':>10}   times as long as {reference}")
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[reference])]
        own, speed = [per_second * t for t in times], images / statistics.median(times)
        print(f"{name:28}{spread(own, 0):>26}{speed:10,.1f}   {spread(ratios, 2)}")


# -----------------------------------------------------------------------------
# data: from shard to batch


def write_shard(path, samples):
    """samples: dicts of extension -> bytes."""
    with tarfile.open(path, "w") as tar:
        for i, sample in enumerate(samples):
            for extension, content in sample.items():
                add_member(tar, f"{i:08d}.{extension}", content)


def enlarge(image, short_side):
    """The bytes of an image -> those of a JPEG with this short side."""
    image, out = Image.open(io.BytesIO(image)).convert("RGB"), io.BytesIO()
    size = [round(side * short_side / min(image.size)) for side in image.size]
    image.resize(size, Image.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


def bench_data(options, args, folder):
    torch.set_num_threads(1)
    settings = parse(["--batch_size=64", "--image_size=224", *options])
    check(settings.train_data, "data needs --train_data: shards of photographs")
    pairs, path = data.Pairs(data.expand(settings.train_data), None, 0), f"{folder}/samples.tar"
    rows = pairs.index[: args.samples].tolist()
    images = [pairs.read(row, data.IMAGE) for row in rows]
    texts = [pairs.read(row, data.TEXT) for row in rows]
    larger = [enlarge(image, 512) for image in images]  # the size of many images on the web
    for what, versions in (("as they are", images), ("with a short side of 512 px", larger)):
        write_shard(path, [{"jpg": image, "txt": text} for image, text in zip(versions, texts)])
        print(f"{len(rows)} images {what} -> {settings.image_size} px, one thread")
        compare_loaders(path, settings.image_size, settings.batch_size, args.repeat)


def compare_loaders(path, image_size, batch_size, rounds):
    pairs = data.Pairs([path], find_tokenizer("clip"), image_size)
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
    print_times(seconds, len(jpegs), "us an image", 1e6 / len(jpegs), "this project")


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
        tokenizer = find_tokenizer(self.args.vocab or "clip")
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

    def backward(self):
        towers, rows = train.Towers(self.model), slice(None)
        return train.forward_backward(
            towers, self.model, self.parts, self.keep, rows, self.autocast, self.scaler
        )

    def step(self):
        self.backward()
        train.update(self.model, self.optimizer, self.scaler, self.args.learning_rate)
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
    ids = torch.randint(1, tokenizer.start, (args.batch_size, WORDS)).tolist()
    tokens = tokenizer.rows(ids, min(config.context_length, data.round_up(ids)))
    batch = {"images": images, "tokens": tokens, "label_tokens": tokens}
    split = [x.to(device).split(args.micro_batch_size or len(x)) for x in batch.values()]
    return [dict(zip(batch, part)) for part in zip(*split)]


def bench_step(options, args, _):
    runs = {
        "SuperCLIP": Run(options),
        "CLIP (--cls_weight 0)": Run([*options, "--cls_weight=0"]),
        "open_clip's CLIP": OpenClipRun(options),
    }
    run = runs["SuperCLIP"]
    # A product of two large matrices is the most that the device can do.
    n = 8192 if run.device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=run.device, dtype=run.dtype)
    rivals = {name: each.step for name, each in runs.items()}
    rivals["matrix product"] = lambda: torch.mm(a, b)[0, 0].item()
    # Wall time: a step uses all cores, and on a GPU no processor time at all.
    seconds = take_turns(rivals, args.repeat, time.perf_counter)
    peak = 2 * n**3 / min(seconds.pop("matrix product"))
    print(f"{run.args.model}, batch {run.args.batch_size}, {run.args.dtype}, {WORDS} tokens a text")
    print_times(seconds, run.args.batch_size, "ms a step", 1e3, "CLIP (--cls_weight 0)")
    patches = run.model.visual.grid**2 if run.keep is None else run.keep.shape[1]
    length = run.parts[0]["tokens"].shape[1]
    flops = run.args.batch_size * pair_flops(run.model.config, length, patches)
    share = flops / statistics.median(seconds["SuperCLIP"]) / peak
    print(f"SuperCLIP: {flops / 1e12:.3f} TFLOP a step, at {share:.0%} of a matrix product's speed")


# -----------------------------------------------------------------------------
# memory: a large batch in micro-batches


def bench_memory(options, *_):
    """A step of one micro-batch, and one of a whole batch in micro-batches."""
    options = ["--model=tiny", "--batch_size=4096", "--micro_batch_size=64", *options]
    args = parse(options)
    for batch_size in (args.micro_batch_size, args.batch_size):
        # Each in its own process, because a process's peak memory never goes down.
        with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as pool:
            peak = pool.submit(peak_of_step, [*options, f"--batch_size={batch_size}"]).result()
        print(f"batch {batch_size:6,} in micro-batches of {args.micro_batch_size:,}: {peak}")


def peak_of_step(options):
    run = Run(options)
    before, start = peak_memory_gb(run.device), time.perf_counter()
    float(run.backward()["contrastive_loss"])  # waits for the device
    seconds = time.perf_counter() - start
    return f"{peak_memory_gb(run.device):.2f} GB, {before:.2f} of it before; {seconds:.1f} s"


# -----------------------------------------------------------------------------
# cuda: what needs a GPU

# Each is checked in every dtype.
OPTIONS = ("", "--micro_batch_size=16", "--grad_checkpointing", "--compile")
TIMED = (("tiny", 1024), ("ViT-B-32", 512), ("ViT-B-16", 256), ("ViT-L-16", 64))


def gradients(*options):
    """-> losses (2,), all gradients as one vector; both float32 on the CPU."""
    run = Run(["--model=tiny", "--batch_size=64", *options])
    torch.set_float32_matmul_precision("highest")  # no TF32, which train.py allows
    torch.backends.cudnn.allow_tf32 = False  # the same for convolutions
    losses = torch.stack([*run.backward().values()])
    flat = torch.cat([p.grad.flatten() for p in run.model.parameters()]) / run.scaler.get_scale()
    return losses.cpu(), flat.cpu()


def bench_cuda(options, args, folder):
    check(torch.cuda.is_available(), "there is no CUDA device here")
    print(f"{torch.cuda.get_device_name()}: difference from the CPU in float32")
    expected_losses, expected = gradients("--device=cpu", "--dtype=float32")
    for dtype, option in itertools.product(("float32", "bfloat16", "float16"), OPTIONS):
        losses, flat = gradients("--device=cuda", f"--dtype={dtype}", *option.split())
        loss_error = (losses - expected_losses).abs().max()
        error = (flat - expected).norm() / expected.norm()
        print(f"  {dtype:9}{option:24}losses {loss_error:.1e}   gradients, relative {error:.1e}")
    for model, batch_size in TIMED:
        for compiled in ("--no-compile", "--compile"):
            print(f"\n{compiled}")
            settings = f"--model={model}", f"--batch_size={batch_size}", "--device=cuda", compiled
            bench_step([*settings, *options], args, folder)


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
    args, options = parser.parse_known_args(argv)
    print(f"{os.cpu_count()} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # where indices are cached
        COMMANDS[args.command](options, args, folder)


if __name__ == "__main__":
    cli(main)
