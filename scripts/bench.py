"""Measure the speed of a step on this machine: of CLIP, of SuperCLIP and of open_clip's CLIP.

    python -m scripts.bench --model ViT-B-16 --batch_size 16

All options but --repeat are train.py's, because train.py's own functions build the model and update
it here. A step is a plain one, without micro-batches and patch dropout, on random pixels and
tokens. In the results 3 (2-5) is a median with the lowest and the highest value.

Rivals take turns in one process, for several rounds. Ratios are taken within a round, so that slow
phases of the machine fall on both sides. A ratio carries over to other machines better than seconds
do.
"""

import importlib.util
import statistics
import time

import torch
import torch.nn.functional as F

import data
import distributed
import train
from cli import make_parser, number, pick_dtype, run_command
from scripts.convert import open_clip_config
from tokenizer import Tokenizer

LENGTH = 16  # tokens of a caption with start and end, which is usual on the web
# Learning rate and weight decay, which make no difference here
RATES = 5e-4, 0.2


def parse(options):
    """train.py's options -> args, with defaults for a benchmark."""
    defaults = ["--model=ViT-B-16", "--batch_size=16", "--no-compile"]
    return train.make_parser().parse_args([*defaults, *options])


def race(rivals, rounds, clock):
    """rivals: dict of name -> function without arguments. Returns a dict of name -> list of the
    seconds that it takes in each round."""
    seconds = {name: [] for name in rivals}
    for _ in data.progress(range(rounds + 1), "rounds", unit="round"):
        for name, function in rivals.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    # The first round pays for imports, caches and compilation.
    return {name: times[1:] for name, times in seconds.items()}


def print_speeds(seconds, images):
    """Print a line for each rival of a race. images: that each of them takes in a round."""
    first = next(iter(seconds))
    for name, times in seconds.items():
        speed = images / statistics.median(times)
        took = spread(times)
        ratio = spread([a / b for a, b in zip(times, seconds[first])])
        print(f"{name}: {speed:,.1f} images/s, {took} seconds, {ratio} times as long as {first}")


def spread(values):
    """Numbers -> "median (lowest-highest)"."""
    median = statistics.median(values)
    low, high = min(values), max(values)
    return f"{median:.3g} ({low:.3g}-{high:.3g})"


class Run:
    """A model, random pixels and tokens, and a step as train.py makes it. args: train.py's."""

    def __init__(self, args):
        self.device = distributed.device_of_process(args.device)
        self.dtype = args.dtype or pick_dtype(self.device)
        tokenizer = Tokenizer.from_file(args.vocab or "clip")
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
        with self.autocast:
            loss = self.model(**self.batch)["loss"]
        self.scaler.scale(loss).backward()

    def step(self):
        self.backward()
        train.update(self.model, self.optimizer, self.scaler, 1.0)
        self.model.logit_scale.item()  # waits for the device


class OpenClipRun(Run):
    """The same with open_clip's model and loss. Its images are floats, and its captions are padded
    to the context length, which takes a part of its time."""

    def __init__(self, args):
        open_clip = importlib.import_module("open_clip")
        super().__init__(args)
        self.model = open_clip.model.CLIP(**open_clip_config(self.model.config)).to(self.device)
        self.model.compile(disable=not args.compile)
        self.optimizer = train.make_optimizer(self.model, *RATES)
        self.contrastive_loss = open_clip.loss.ClipLoss()
        self.texts = F.pad(self.batch["tokens"], (0, self.model.context_length - LENGTH))
        self.images = (self.batch["images"] / 255 - 0.45) / 0.27

    def backward(self):
        with self.autocast:
            image_features, text_features, scale, *_ = self.model(self.images, self.texts)
            loss = self.contrastive_loss(image_features, text_features, scale)
        self.scaler.scale(loss).backward()


def main(argv):
    parser = make_parser(__doc__)
    parser.epilog = "All other options are those of train.py."
    parser.add_argument("--repeat", type=number(int, 1), default=10, help="rounds (default 10)")
    args, options = parser.parse_known_args(argv)
    superclip = parse(options)
    clip = parse([*options, "--cls_weight=0"])
    runs = {"CLIP": Run(clip), "SuperCLIP": Run(superclip)}
    if runs["CLIP"].device.type == "cuda":
        runs["CLIP --compile"] = Run(parse([*options, "--cls_weight=0", "--compile"]))
        runs["SuperCLIP --compile"] = Run(parse([*options, "--compile"]))
    if importlib.util.find_spec("open_clip"):
        runs["open_clip"] = OpenClipRun(clip)
    dtype = runs["CLIP"].dtype
    machine = f"{torch.get_num_threads()} threads"
    if runs["CLIP"].device.type == "cuda":
        machine = torch.cuda.get_device_name()
    print(f"{clip.model}, batch {clip.batch_size}, {dtype}, {machine}, torch {torch.__version__}")
    rivals = {name: run.step for name, run in runs.items()}
    # Wall time, because a step uses all cores, and on a GPU no processor time at all.
    print_speeds(race(rivals, args.repeat, time.perf_counter), clip.batch_size)


if __name__ == "__main__":
    run_command(main)
