"""Measure speed and memory, on this machine and beside the packages that do the same.

    python scripts/bench.py data --data SHARDS   from shard to batch, beside webdataset
    python scripts/bench.py index                the pass over the tar headers, and its cache
    python scripts/bench.py step --model NAME    an update of the weights, beside open_clip
    python scripts/bench.py memory               a large batch in micro-batches
    python scripts/bench.py cuda                 all that needs a GPU, checked and timed

Rivals run in turn, several rounds in one process. For the data path, on one thread, processor time
counts, so that other work on the machine disturbs little; for steps it is wall time. A ratio is the
median over the rounds of the ratio within a round; it holds on other machines better than the
images per second do.
"""

import argparse
import copy
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import train  # noqa: E402
from superclip import PRESETS, InputError, SuperCLIP, SuperCLIPConfig  # noqa: E402


def add_member(tar, name, content):
    """Bytes -> a member of a tar file that is open for writing."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def interleave(rivals, repeat, clock=time.process_time):
    """dict of name -> function without arguments. Each runs `repeat` times, in turn. -> dict of
    name -> list of seconds of processor time."""
    seconds = {name: [] for name in rivals}
    for function in rivals.values():
        function()  # imports, caches, the first pages of memory
    for _ in tqdm(range(repeat), desc="rounds", leave=False, disable=None):
        for name, function in rivals.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return seconds


# -----------------------------------------------------------------------------
# data: from shard to batch


def bench_data(args):
    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = None
    shards = data.expand(args.data)
    samples = read_samples(shards, args.samples)
    with tempfile.TemporaryDirectory() as folder:
        for short_side in (None, 512):
            path = f"{folder}/{short_side}.tar"
            with tarfile.open(path, "w") as tar:
                for i, (image, text) in enumerate(samples):
                    add_member(
                        tar, f"{i:08d}.jpg", enlarge(image, short_side) if short_side else image
                    )
                    add_member(tar, f"{i:08d}.txt", text)
            what = f"enlarged to a short side of {short_side} px" if short_side else "as they are"
            print(f"{len(samples)} images of {shards[0]}, {what} -> {args.size} px")
            compare(path, args)


def read_samples(shards, n):
    """The first n pairs of the shards, as (bytes of a JPEG, bytes of the caption)."""
    pairs = data.Pairs(shards, None, 0)
    rows = pairs.index[:n].tolist()
    return [(pairs.read(row, data.IMAGE), pairs.read(row, data.TEXT)) for row in rows]


def enlarge(image, short_side):
    image = Image.open(io.BytesIO(image)).convert("RGB")
    scale = short_side / min(image.size)
    out = io.BytesIO()
    image.resize([round(v * scale) for v in image.size], Image.BICUBIC).save(
        out, "JPEG", quality=90
    )
    return out.getvalue()


def compare(path, args):
    tokenizer = data.find_tokenizer("clip")
    pairs = data.Pairs([path], tokenizer, args.size)
    images = [pairs.read(row, data.IMAGE) for row in pairs.index.tolist()]

    def ours():
        batches = data.Batches(len(pairs), args.batch_size, 0, 0, len(pairs) // args.batch_size)
        for _ in data.loader(pairs, batches, workers=0):
            pass

    peer = make_peer(path, args)

    def bound():
        for image in images[: len(pairs) // args.batch_size * args.batch_size]:
            Image.open(io.BytesIO(image)).load()

    rivals = {
        "this project": ours,
        "webdataset + Pillow + float": peer,
        "JPEG decoding alone": bound,
    }
    seconds = interleave(rivals, args.repeat)
    n = len(pairs) // args.batch_size * args.batch_size
    print(f"{'':30}{'images/s':>9}{'min':>8}{'max':>8}{'us/image':>10}{'this project is':>18}")
    for name, times in seconds.items():
        ratio = statistics.median(
            a / b for a, b in zip(times, seconds["this project"], strict=True)
        )
        print(
            f"{name:30}{n / statistics.median(times):9.0f}"
            f"{n / max(times):8.0f}{n / min(times):8.0f}"
            f"{statistics.median(times) / n * 1e6:10.0f}{ratio:14.2f} x"
        )
    print()


def make_peer(path, args):
    """The path that most CLIP training takes: open_clip's get_wds_dataset
    (open_clip_train/data.py), on one thread."""
    import open_clip
    import webdataset as wds
    from open_clip.transform import image_transform

    preprocess = image_transform(args.size, is_train=True)
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    n = len(data.Pairs([path], None, 0)) // args.batch_size

    def peer():
        pipeline = wds.DataPipeline(
            wds.SimpleShardList([path]),
            wds.tarfile_to_samples(),
            wds.shuffle(args.batch_size),
            wds.decode("pilrgb"),
            wds.rename(image="jpg;png;jpeg;webp", text="txt"),
            wds.map_dict(image=preprocess, text=lambda text: tokenizer(text)[0]),
            wds.to_tuple("image", "text"),
            wds.batched(args.batch_size, partial=False),
        )
        for i, _ in enumerate(pipeline, start=1):
            if i == n:
                break

    return peer


# -----------------------------------------------------------------------------
# index: from headers to rows


def bench_index(args):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        shards = make_shards(folder, args.shards, args.samples)
        start = time.perf_counter()
        for shard in shards:
            data._read_headers(shard)
        one_core = time.perf_counter() - start
        start = time.perf_counter()
        first_index, _ = data.build_index(shards)
        first = time.perf_counter() - start
        start = time.perf_counter()
        data.build_index(shards)
        cached = time.perf_counter() - start
        n = len(first_index)
        size = first_index.element_size() * first_index.nelement()
        print(f"{n:,} samples in {len(shards)} shards")
        print(f"{'header pass, one core':30}{one_core:9.2f} s{n / one_core:14,.0f} samples/s")
        print(
            f"{'first start':30}{first:9.2f} s{n / first:14,.0f} samples/s, {os.cpu_count()} cores"
        )
        print(f"{'second start, from the cache':30}{cached:9.3f} s{n / cached:14,.0f} samples/s")
        print(f"{'memory':30}{size / n:9.0f} bytes a sample")


def make_shards(folder, shards, samples):
    """Shards of image, caption and json each. The images are none, and small: the pass seeks over
    them anyway."""
    paths = []
    for shard in tqdm(range(shards), desc="making shards", leave=False, disable=None):
        paths.append(f"{folder}/{shard:05d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for i in range(samples * shard // shards, samples * (shard + 1) // shards):
                add_member(tar, f"{i:09d}.jpg", bytes(200))
                add_member(tar, f"{i:09d}.txt", b"a caption")
                add_member(tar, f"{i:09d}.json", json.dumps({"key": i}).encode())
    return paths


# -----------------------------------------------------------------------------
# step: one update of the weights


def synthetic_batch(config, batch_size, words, device):
    """Random pixels, and captions of `words` tokens with start and end, trimmed as the loader
    trims."""
    generator = torch.Generator().manual_seed(0)
    size = (batch_size, 3, config.image_size, config.image_size)
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    ids = torch.randint(1, config.vocab_size - 2, (batch_size, words), generator=generator)
    tokens = torch.zeros(
        batch_size, min(config.context_length, data.round_up(ids)), dtype=torch.long
    )
    tokens[:, 0], tokens[:, 1 : words + 1] = config.vocab_size - 2, ids
    tokens[:, words + 1] = config.vocab_size - 1
    return images.to(device), tokens.to(device)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def our_step(config, args, device, dtype):
    """A function that makes one training step with this project's model and loop."""
    torch.manual_seed(0)
    model = SuperCLIP(config).to(device).train()
    if args.compile:
        model.encode_pairs = torch.compile(model.encode_pairs)
    images, tokens = synthetic_batch(config, args.batch_size, args.words, device)

    def backward(autocast, scaler):
        train.forward_backward(model, images, tokens, tokens, None, None, autocast, scaler)

    return update_of(model, backward, device, dtype)


def open_clip_step(config, args, device, dtype):
    """The same update with open_clip's model and loss: float images, captions padded to the
    context."""
    import open_clip
    from open_clip.loss import ClipLoss

    torch.manual_seed(0)
    with torch.device("meta"):
        shape = SuperCLIP(config).open_clip_config()
    model = open_clip.model.CLIP(**shape).to(device).train()
    if args.compile:
        model = torch.compile(model)
    loss_of = ClipLoss()
    images, short = synthetic_batch(config, args.batch_size, args.words, device)
    images = (images / 255 - 0.45) / 0.27
    tokens = torch.nn.functional.pad(short, (0, config.context_length - short.shape[1]))

    def backward(autocast, scaler):
        with autocast:
            image_features, text_features, scale = model(images, tokens)[:3]
            loss = loss_of(image_features, text_features, scale)
        scaler.scale(loss).backward()

    return update_of(model, backward, device, dtype)


def update_of(model, backward, device, dtype):
    """A function that makes one training step, the optimizer's part the same for all: `backward`
    (autocast, scaler) leaves the gradients."""
    settings = argparse.Namespace(learning_rate=1e-4, weight_decay=0.2)
    optimizer = train.make_optimizer(model, settings, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def step():
        optimizer.zero_grad(set_to_none=True)
        backward(autocast, scaler)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        synchronize(device)

    return step


def step_flops(config, args):
    """Floating point operations of the forward and backward pass, counted on tensors without
    memory."""
    with torch.device("meta"):
        model = SuperCLIP(config)
        images = torch.empty(1, 3, config.image_size, config.image_size)
        tokens = torch.zeros(1, data.round_up([range(args.words)]), dtype=torch.long)
        weights = torch.empty(config.vocab_size)
    with FlopCounterMode(display=False) as counter:
        image, text, words = model.encode_pairs(images, tokens, tokens, weights)
        (image.sum() + text.sum() + words).backward()
    return counter.get_total_flops() * args.batch_size


def matrix_product(device, dtype, n):
    """A function that multiplies two n x n matrices: what the device can do at its best."""
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)

    def multiply():
        torch.mm(a, b)
        synchronize(device)

    return multiply


def bench_step(args):
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype)
    vocab = {"vocab_size": args.vocab_size} if args.vocab_size else {}
    with_head = SuperCLIPConfig.preset(args.model, **vocab)
    without = SuperCLIPConfig.preset(args.model, cls_weight=0.0, **vocab)
    if device.type == "cpu" and args.model == "tiny":
        torch.backends.cuda.enable_flash_sdp(False)  # as train.py does for so few patches
    n = 8192 if device.type == "cuda" else 2048
    rivals = {
        "SuperCLIP": our_step(with_head, args, device, dtype),
        "its CLIP (--cls_weight 0)": our_step(without, args, device, dtype),
        "open_clip's CLIP": open_clip_step(without, args, device, dtype),
        "matrix product": matrix_product(device, dtype, n),
    }
    # wall time: a step uses all cores, and on a GPU no processor time at all
    seconds = interleave(rivals, args.repeat, time.perf_counter)
    peak = 2 * n**3 / min(seconds["matrix product"])
    print(
        f"{args.model}, batch {args.batch_size}, captions of {args.words} tokens, {args.dtype}, "
        f"{device_name(device)}, {args.repeat} rounds; matrix product {peak / 1e9:,.0f} GFLOP/s"
    )
    print(f"{'':28}{'ms, median (min-max)':>28}{'images/s':>10}{'TFLOP':>8}{'of peak':>9}")
    for name, config in (("SuperCLIP", with_head), ("its CLIP (--cls_weight 0)", without),
                         ("open_clip's CLIP", None)):  # fmt: skip
        times = seconds[name]
        median = statistics.median(times)
        spread = f"{1e3 * median:.0f} ({1e3 * min(times):.0f}-{1e3 * max(times):.0f})"
        row = f"{name:28}{spread:>28}{args.batch_size / median:10.1f}"
        if config:
            flops = step_flops(config, args)
            row += f"{flops / 1e12:8.3f}{flops / median / peak:9.0%}"
        print(row)
    ratio = paired(seconds, "open_clip's CLIP", "its CLIP (--cls_weight 0)")
    cost = paired(seconds, "SuperCLIP", "its CLIP (--cls_weight 0)")
    print(f"open_clip's step takes {ratio} times this project's without head")
    print(f"the head makes a step {cost} times as long")
    if device.type == "cuda":
        gigabytes = torch.cuda.max_memory_allocated(device) / 2**30
        print(f"peak memory {gigabytes:.2f} GB, all models together")
    if args.profile:
        with torch.profiler.profile() as profile:
            rivals["SuperCLIP"]()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=16))


def paired(seconds, a, b):
    """Median and range of the ratio a / b within a round."""
    ratios = sorted(x / y for x, y in zip(seconds[a], seconds[b]))
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})"


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores"


# -----------------------------------------------------------------------------
# memory: a large batch in small pieces


def bench_memory(args):
    """Peak memory of a step, each measured in a process of its own."""
    if args.child:
        return memory_child(args)
    sizes = [(args.micro_batch_size, None), (args.batch_size, args.micro_batch_size)]
    if args.whole:
        sizes.append((args.batch_size, None))
    for batch_size, micro in sizes:
        command = [
            sys.executable,
            __file__,
            "memory",
            "--model",
            args.model,
            "--device",
            args.device,
        ]
        command += ["--batch_size", str(batch_size), "--dtype", args.dtype, "--child"]
        command += ["--micro_batch_size", str(micro or 0)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise InputError(f"batch {batch_size}: {result.stderr.strip().splitlines()[-1]}")
        print(
            f"batch {batch_size:6,d}  micro-batch {micro or 'none':>6}  {result.stdout.strip()}",
            flush=True,
        )


def memory_child(args):
    """One step; prints the peak memory, and how much of it was there before the step."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    config = SuperCLIPConfig.preset(args.model)
    model = SuperCLIP(config).to(device).train()
    images, tokens = synthetic_batch(config, args.batch_size, 16, device)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    before = train.peak_memory_gb(device)
    start = time.perf_counter()
    train.forward_backward(
        model, images, tokens, tokens, None, args.micro_batch_size or None, autocast, scaler
    )
    synchronize(device)
    print(f"peak {train.peak_memory_gb(device):6.2f} GB, {before:.2f} GB of it before the step; "
          f"{time.perf_counter() - start:.1f} s")  # fmt: skip


# -----------------------------------------------------------------------------
# cuda: everything that needs a GPU, checked and timed in one go


def bench_cuda(args):
    if not torch.cuda.is_available():
        raise InputError("there is no CUDA device here")
    device = torch.device("cuda")
    config = SuperCLIPConfig.preset("tiny", vocab_size=4096)
    images, tokens = synthetic_batch(config, 64, 16, torch.device("cpu"))
    torch.manual_seed(0)
    model = SuperCLIP(config).train()
    keep = torch.rand(64, model.visual.grid**2).argsort(dim=1)[:, :20]

    def gradients(device, dtype, micro=None, compiled=False):
        copy_of = copy.deepcopy(model).to(device)
        if compiled:
            copy_of.encode_pairs = torch.compile(copy_of.encode_pairs)
        on = [x.to(device) for x in (images, tokens, tokens, keep)]
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        losses = train.forward_backward(copy_of, *on, micro, autocast, scaler)
        flat = torch.cat([p.grad.flatten().float().cpu() for p in copy_of.parameters()])
        return torch.stack(list(losses.values())).float().cpu(), flat

    print(f"{device_name(device)}, torch {torch.__version__}: difference from the CPU in float32")
    losses, reference = gradients(torch.device("cpu"), torch.float32)
    for name, dtype, micro, compiled in (
        ("float32", torch.float32, None, False),
        ("float32, micro-batches", torch.float32, 16, False),
        ("float32, compiled", torch.float32, None, True),
        ("bfloat16", torch.bfloat16, None, False),
        ("bfloat16, compiled", torch.bfloat16, None, True),
        ("float16", torch.float16, None, False),
    ):
        own_losses, own = gradients(device, dtype, micro, compiled)
        cosine = torch.nn.functional.cosine_similarity(own, reference, dim=0)
        difference = (own_losses - losses).abs().max()
        print(f"  {name:26}losses {difference:.1e}  gradients, 1 - cosine {1 - cosine:.1e}")
    for model_name, batch_size in (
        ("tiny", 1024),
        ("ViT-B-32", 512),
        ("ViT-B-16", 256),
        ("ViT-L-16", 64),
    ):
        for compiled in (False, True):
            print(f"\n{'compiled' if compiled else 'not compiled'}")
            torch.cuda.reset_peak_memory_stats()
            bench_step(argparse.Namespace(
                model=model_name, batch_size=batch_size, dtype="bfloat16", device="cuda", words=16,
                repeat=10, compile=compiled, profile=False, vocab_size=None))  # fmt: skip
            torch.cuda.empty_cache()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("data", help="images per second from shard to batch")
    command.add_argument(
        "--data", nargs="+", required=True, metavar="SHARDS", help="tar shards of real photographs"
    )
    command.add_argument("--size", type=int, default=224, metavar="PIXELS", help="(default 224)")
    command.add_argument(
        "--samples", type=int, default=768, metavar="N", help="images to use (default 768)"
    )
    command.add_argument("--batch_size", type=int, default=64, metavar="PAIRS", help="(default 64)")
    command.add_argument("--repeat", type=int, default=5, metavar="ROUNDS", help="(default 5)")
    command.set_defaults(run=bench_data)
    command = commands.add_parser(
        "index", help="samples per second of the header pass, and the cached start"
    )
    command.add_argument("--shards", type=int, default=20, metavar="N", help="(default 20)")
    command.add_argument(
        "--samples", type=int, default=50_000, metavar="N", help="in all the shards (default 50000)"
    )
    command.set_defaults(run=bench_index)
    command = commands.add_parser("step", help="one update of the weights, beside open_clip's")
    command.add_argument("--model", default="ViT-B-16", choices=PRESETS, help="(default ViT-B-16)")
    command.add_argument("--batch_size", type=int, default=16, metavar="PAIRS", help="(default 16)")
    command.add_argument(
        "--words", type=int, default=14, metavar="N", help="tokens a caption (default 14)"
    )
    command.add_argument("--repeat", type=int, default=10, metavar="ROUNDS", help="(default 10)")
    command.add_argument("--profile", action="store_true", help="print the costliest operations")
    command.set_defaults(run=bench_step)
    add_machine(command)
    command = commands.add_parser("memory", help="peak memory of a large batch in micro-batches")
    command.add_argument("--model", default="tiny", choices=PRESETS, help="(default tiny)")
    command.add_argument(
        "--batch_size", type=int, default=4096, metavar="PAIRS", help="(default 4096)"
    )
    command.add_argument(
        "--micro_batch_size", type=int, default=64, metavar="PAIRS", help="(default 64)"
    )
    command.add_argument(
        "--whole", action="store_true", help="also the batch without micro-batches"
    )
    command.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    command.set_defaults(run=bench_memory)
    add_machine(command)
    command = commands.add_parser("cuda", help="check and time everything that needs a GPU")
    command.set_defaults(run=bench_cuda)
    args = parser.parse_args(argv)
    return args.run(args)


def add_machine(command):
    command.add_argument(
        "--device", default="cpu", metavar="NAME", help="cpu or cuda (default cpu)"
    )
    command.add_argument(
        "--dtype", default="bfloat16", choices=train.DTYPES, help="(default bfloat16)"
    )
    command.add_argument("--compile", action="store_true", help="torch.compile both")
    command.add_argument("--vocab_size", type=int, metavar="N", help="(default CLIP's 49,408)")


if __name__ == "__main__":
    data.cli(main)
