"""Train CLIP with SuperCLIP's word head, on one CPU or GPU, or with torchrun on many.

    python train.py                       built-in scenes, two to three minutes on two cores
    python train.py --batch_size 256 --train_data 'cc3m/cc3m-train-*.tar' --model ViT-B-16
    torchrun --nproc_per_node 8 train.py --batch_size 4096 --train_data 'cc3m/cc3m-train-*.tar'

The file reads from top to bottom: the options, the processes and the device, one step, what a run
is made of, its log, validation, checkpoints, and the run.

Apart from weights, token counts and optimizer state, what a step needs is a function of the options
and the step number: the batch, its crops, the dropped patches, the learning rate. So a checkpoint
needs no state of a random generator, and a run that was killed and resumed ends with the same bits
as one that was not. (That holds on a CPU. Some CUDA kernels add numbers in no fixed order.)

Axes are those of superclip.py: B pairs of this process, N pairs of all processes together, P
patches (K of them kept), E embedding. M pairs are in memory at a time.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import fields
from datetime import timedelta
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import eval as evaluation
from cli import (
    InputError,
    add_options,
    check,
    lock_folder,
    number,
    optional,
    outlive_readers,
    pick_device,
    pick_dtype,
    printable,
    run_command,
    unlock_folders,
)
from scripts.scenes import make_scenes
from superclip import PRESETS, SuperCLIP, SuperCLIPConfig

warnings.filterwarnings("ignore", "`broadcast_buffers`")  # newer torch has another name for it

# torchrun tells each process its number, and how many there are. Schedulers set some of these, too.
environ = os.environ if dist.is_torchelastic_launched() else {}
RANK = int(environ.get("RANK", 0))
WORLD = int(environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(environ.get("LOCAL_RANK", 0))

# -----------------------------------------------------------------------------
# Options


def make_parser():
    """All options. A default of None is a rule that the help states."""
    # no abbreviations, because a typo should not become another option
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.usage = "python train.py [options]   (--help explains them)"  # not a list of them all
    parser.epilog = "The built-in scenes and --init_from have other defaults, printed at the start."
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    count = number(int, 1)
    positive = number(float, 0)
    # fmt: off
    add("--train_data", nargs="+", metavar="SHARDS",
        help="tar files, folders, globs or {0000..0575} (default: built-in scenes)")
    add("--val_data", nargs="+", metavar="SHARDS",
        help="shards to validate on, or none (default: those named val or test, else 1 in 100)")
    add("--zeroshot_data", nargs="+", default=[], metavar="DIR",
        help="folders with a folder of images per class, to classify at each validation")
    add_options(parser, "captions")
    add("--label_captions", nargs="+", metavar="SOURCE",
        help="where the words to predict come from (default: --captions)")
    add("--val_captions", nargs="+", metavar="SOURCE",
        help="where the captions of --val_data are (default: --captions)")
    add("--vocab", metavar="FILE",
        help="vocabulary, or clip (default: vocab.tiktoken beside the shards, else clip)")
    add("--crop_area", type=number(float, 0.01, 1), default=0.9, metavar="SHARE",
        help="smallest share of a picture that a random crop shows; 1: no crops (default 0.9)")
    add("--workers", type=number(int, 0, 999),
        help="loading processes per GPU (default: the cores, divided among the GPUs)")
    # the model
    add("--model", choices=PRESETS, default="ViT-B-16",
        help="size of both towers (default ViT-B-16)")
    add("--image_size", type=count, metavar="PIXELS",
        help="side of an image (default: the model's)")
    add("--context_length", type=number(int, 3), metavar="TOKENS",
        help="tokens of a caption that the text tower sees (default: the model's)")
    add("--init_from", metavar="FILE", help="checkpoint to take weights and vocabulary from")
    add("--freeze", choices=("image", "text"), help="tower whose weights stay as they are")
    add("--cls_weight", type=positive, default=1.0,
        help="weight of the classification loss; 0 trains plain CLIP (default 1)")
    add("--loss", choices=("softmax", "sigmoid"), default="softmax",
        help="contrastive loss, CLIP's softmax or SigLIP's sigmoid (default softmax)")
    # the training. 5e-4 is the rate of CLIP's own ViT-B, and of published runs on CC3M.
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, help="updates in all (default: by --epochs)")
    length.add_argument("--epochs", type=number(float, 1e-6),
        help="passes over the data (default 30)")
    add("--batch_size", type=count, default=256, help="pairs of all processes (default 256)")
    add("--micro_batch_size", type=count,
        help="pairs of a process in memory at a time (default: all of its batch)")
    add("--learning_rate", type=positive, default=5e-4, help="peak learning rate (default 5e-4)")
    add("--head_learning_rate", type=positive,
        help="peak learning rate of the word head (default: --learning_rate; 5e-4 if --init_from "
        "has no head)")
    add("--warmup_steps", type=number(int, 0),
        help="updates over which the rate rises (default: a tenth of all, at most 1000)")
    add("--weight_decay", type=positive, default=0.2,
        help="weight decay of AdamW, for matrices only (default 0.2)")
    add("--patch_dropout", type=number(float, 0, 0.99), default=0.0, metavar="SHARE",
        help="share of an image's patches that a step leaves out (default 0)")
    add("--seed", type=number(int, 0, 2**31), default=0,
        help="seed of weights, order, crops and patch dropout (default 0)")
    # the machine
    add_options(parser, "device")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="numbers to compute with (default: the fastest that the device has units for)")
    add("--compile", action=switch, help="compile towers and losses (default: on CUDA)")
    add("--grad_checkpointing", action=switch, default=False,
        help="keep fewer activations: less memory, a third more time")
    # the run
    add("--out_dir", default="out", metavar="DIR",
        help="folder for checkpoints and log.jsonl (default out)")
    add("--resume", action=switch, default=False,
        help="go on with the run in --out_dir, with its saved options")
    add("--log_every", type=count, help="steps between log rows (default: steps / 20, at most 20)")
    add("--eval_every", type=count,
        help="steps between validations (default: steps / 3, at most 2000)")
    add("--save_every", type=count, help="steps between saves (default: before each validation)")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases, too (pip install wandb)")
    # fmt: on
    return parser


OF_THIS_CALL = ("out_dir", "resume", "wandb")  # --resume never takes them from a checkpoint
FIELDS = {field.name for field in fields(SuperCLIPConfig)}  # an option of such a name sets it
# What --resume may not change, or it would silently make another run.
FIXED = FIELDS | {
    "model", "init_from", "vocab", "captions", "label_captions", "freeze", "weight_decay",
    "crop_area", "patch_dropout", "seed",
}  # fmt: skip
IN_A_CHECKPOINT = ("model", "image_size", "context_length", "vocab", "loss")  # for --init_from

# The options of a bare `python train.py`, which were chosen together.
SCENES = {
    "train_data": ["scenes/train-*.tar"],
    "val_data": ["scenes/val-*.tar"],
    "zeroshot_data": [
        "scenes/zeroshot/colour",
        "scenes/zeroshot/shape",
        "scenes/zeroshot/colour_shape",
        "scenes/zeroshot/held_out",
    ],
    "captions": ["json.short", "json.long"],
    "val_captions": ["json.long"],
    "crop_area": 1.0,  # captions name the border, which a crop cuts off
    "model": "tiny",
    "batch_size": 32,
    "weight_decay": 0.1,
    "workers": 0,  # the scenes are small, and the model keeps the cores busy
}


def parse(argv):
    """Returns the options with all defaults, and the checkpoint to resume or None."""
    parser = make_parser()
    given = parser.parse_args(argv)
    path = Path(given.out_dir, "last.pt")
    if given.resume and path.exists():
        saved = read_resumable(path)
        return resumed_options(saved["arguments"], argv), saved

    parser.set_defaults(epochs=30.0)
    special = {}
    if given.train_data is None:
        parser.set_defaults(**SCENES)
        # A batch four times as large takes half as many steps, at twice the learning rate: a
        # compromise between as many samples and as many steps, found by trial.
        ratio = math.sqrt(parser.parse_args(argv).batch_size / 32)
        special = {**SCENES, "epochs": round(2.4 * ratio, 3)}
        special["learning_rate"] = round(3.5e-4 * ratio, 6)
    if given.init_from is not None:
        special["learning_rate"] = 5e-5  # larger steps would destroy what the weights know
        special["model"] = None  # these two are the checkpoint's
        special["loss"] = None
    if special:
        print("defaults of this run:", special)
    parser.set_defaults(**special)
    args = parser.parse_args(argv)
    if args.steps is not None:
        args.epochs = None
    if args.init_from is not None:
        for name in IN_A_CHECKPOINT:
            if getattr(args, name) is not None:
                raise InputError(f"--{name} comes from the checkpoint of --init_from: leave it out")
    return args, None


def resumed_options(saved, argv):
    """Returns the saved options of a run, changed by those that are given. The saved ones become a
    command line, so that argparse checks a file from elsewhere as it checks a user."""
    parser = make_parser()
    given = parser.parse_args(argv)
    unknown = saved.keys() - vars(given).keys()
    check(not unknown, f"{given.out_dir}/last.pt has options that are unknown: {unknown}")
    options = {name: value for name, value in saved.items() if name not in OF_THIS_CALL}
    if given.steps is not None or given.epochs is not None:  # the one drives out the other
        options["steps"] = None
        options["epochs"] = None
    unset = [name for name, value in options.items() if value is None]
    parser.set_defaults(**dict.fromkeys(unset))  # a saved None stays None
    before = as_command_line(options)
    args = parser.parse_args([*before, *argv])
    check(args.train_data is not None, f"{given.out_dir}/last.pt does not name its data")
    old_args = parser.parse_args(before)
    for name in FIXED.intersection(vars(args)):
        if getattr(args, name) != getattr(old_args, name):
            raise InputError(f"--resume cannot change --{name}")
    return args


def as_command_line(options):
    """Options as a dict -> the command line that gives them."""
    argv = []
    for name, value in options.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            texts = [str(x) for x in value]
            # or a list in a file from elsewhere could set another option, such as --out_dir
            check(not any(text.startswith("-") for text in texts), f"--{name} has an option in it")
            if texts:
                argv += [f"--{name}", *texts]
        elif value is not None:
            argv.append(f"--{name}={value}")
    return argv


# -----------------------------------------------------------------------------
# Processes and the device


def join_processes():
    """Lets the processes that torchrun has started find each other."""
    if WORLD > 1:
        # CPU tensors travel by gloo, so that processes can agree on something without waiting for
        # their GPUs. Two hours, because all others wait while rank 0 validates.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))


def all_sum(tensor):
    """The sum over all processes, in place. With one process, the tensor itself."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def wait_for_all():
    """Returns when all processes have come here."""
    all_sum(torch.zeros(1))  # dist.barrier would use the GPU


def check_processes_agree(*facts):
    """All processes must have the same facts: options, data and step."""
    if dist.is_initialized():
        everyone = [None] * WORLD
        dist.all_gather_object(everyone, facts)
        same = all(theirs == facts for theirs in everyone)
        check(same, "the processes differ in options, data or step")


def set_up_device(name):
    """Returns the device of this process, by --device."""
    if WORLD > 1 and name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{LOCAL_RANK}"
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # so that streams are of this device, too
    return device


def precision(device, dtype):
    """Returns the context in which a step computes, and the loss scaler, which float16 needs."""
    autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    return autocast, scaler


class StopSignal:
    """SIGINT (Ctrl-C), SIGTERM (from schedulers) or SIGHUP (the terminal has gone) asks a run to
    save and leave. Until then `number` is 0. Within three seconds another signal counts as the same
    one, because torchrun passes on what a scheduler sends to all processes. A later one ends the
    process at once."""

    def __init__(self):
        self.number = 0
        self.time = None
        signal.signal(signal.SIGINT, self.receive)
        signal.signal(signal.SIGTERM, self.receive)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(signal.SIGHUP, self.receive)

    def receive(self, number, _):
        if self.number == 0:
            self.number = number
            self.time = time.monotonic()
            # os.write, because print may be what the signal has interrupted
            with suppress(OSError):
                os.write(2, b"\nThe run stops after this step or validation. Again: at once.\n")
        elif time.monotonic() > self.time + 3:
            os._exit(128 + number)

    def agreed(self):
        """Returns the signal that any of the processes has received, or 0."""
        number = torch.tensor(self.number)  # on the CPU, so that nobody waits for a GPU
        if dist.is_initialized():
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)


# -----------------------------------------------------------------------------
# One step


def learning_rate_factor(step, warmup_steps, steps):
    """The share of its peak that the learning rate has in a step: linear warm-up to 1, then cosine
    to 0. A pure function of the step, so that a resumed run needs no scheduler. Early steps are
    small because Adam's second moments are still noise."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def patches_to_keep(dropout, grid, batch_size, seed, step, device):
    """The patches that each image keeps in a step (FLIP, arXiv 2212.00794): indices (N, K), or None
    for all. They are drawn for the global batch, so that they do not depend on the processes."""
    if dropout == 0:
        return None
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
    noise = torch.rand(batch_size, grid**2, generator=generator, device=device)  # (N, P)
    K = max(1, round(grid**2 * (1 - dropout)))
    return noise.argsort(dim=1)[:, :K]  # the first K of a random permutation of all patches


def load_batches(args, pairs, grid, local, M, start, stop, device):
    """Yields the micro-batches of this process from step `start` to `stop`, as data.load_batches
    does. Adds the patches that their images keep: keep (M, K), or None for all."""
    N = args.batch_size
    batches = data.load_batches(pairs, N, local, M, start, stop, args.workers, device)
    for step in range(start, stop):
        keep = patches_to_keep(args.patch_dropout, grid, N, args.seed, step, device)
        for i in range(local.start, local.stop, M):
            batch, bad_samples = next(batches)
            batch["keep"] = None if keep is None else keep[i : i + M]
            yield batch, bad_samples


def plain_step(model, batch, autocast, scaler):
    """Computes the losses of a batch, and leaves their gradient in .grad."""
    with autocast:
        losses = model(**batch)
    scaler.scale(losses["loss"]).backward()  # unscaled, float16's small gradients would be 0
    return losses


def grad_cache_step(model, micro_batches, autocast, scaler):
    """Does what plain_step does, with the memory of one micro-batch (GradCache, arXiv 2101.06983).
    That takes a third more time, because the towers run forward twice.

    The contrastive loss needs the features of all pairs at once, but the towers do not. So the loss
    is computed on features that have no graph. Then each micro-batch runs again, with a graph, and
    backpropagates the gradient of its own features: by the chain rule, d loss / d weights is the
    sum over micro-batches of d loss / d features * d features / d weights.

    micro_batches: an iterator over equal parts of the batch, so that the first ones are computed
    while the loader is at work on the last ones.
    """
    batches = []
    image_parts = []
    text_parts = []
    for batch in micro_batches:
        with autocast, torch.no_grad():
            image_features, text_features, _ = model.features_and_terms(**batch)
        batches.append(batch)
        image_parts.append(image_features)
        text_parts.append(text_features)
    # All of them are counted before any is weighted, as in the plain step.
    model.count_tokens(data.pad_and_join([batch["label_tokens"] for batch in batches]))

    images = torch.cat(image_parts).requires_grad_()  # (B, E)
    texts = torch.cat(text_parts).requires_grad_()
    terms = model.compare(images, texts)
    scaler.scale(model.total_loss(terms)).backward()

    n = len(batches)
    gradients = zip(images.grad.chunk(n), texts.grad.chunk(n))
    for batch, (image_gradient, text_gradient) in zip(batches, gradients):
        with autocast:
            image_features, text_features, pair_terms = model.features_and_terms(**batch)
        # A number whose gradient is, by the chain rule, that of the terms between pairs. It is
        # scaled already, because image_gradient and text_gradient are.
        surrogate = (image_features * image_gradient).sum() + (text_features * text_gradient).sum()
        pair_loss = scaler.scale(model.total_loss(pair_terms) / n)
        (surrogate + pair_loss).backward()
        for name, value in pair_terms.items():
            terms[name] = terms.get(name, 0.0) + value.detach() / n

    if dist.is_initialized():
        for p in model.parameters():
            if p.requires_grad:
                all_sum(p.grad).div_(dist.get_world_size())
    return {"loss": model.total_loss(terms), **terms}


def update(model, optimizer, scaler, factor):
    """One step of the optimizer, at `factor` times the peak rates. Returns the norm of the gradient
    before it was clipped to 1.

    The authors, with batches of 16,384, do not clip. A small batch now and then has a gradient many
    times as long as usual, and clipping keeps such a step from undoing the ones before it.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))  # CLIP's bounds: a larger scale is unstable
    return grad_norm


# -----------------------------------------------------------------------------
# What a run is made of


def read_start(args, saved):
    """Returns the checkpoint to start from, or None, and the tokenizer: its own, or else that of
    the shards. The built-in scenes are drawn if they are not there."""
    start_from = saved
    if saved is None and args.init_from is not None:
        start_from = evaluation.read_checkpoint(args.init_from)
    if args.train_data == SCENES["train_data"] and not Path("scenes").exists():
        make_scenes("scenes")
    if start_from is not None:
        return start_from, data.Tokenizer(start_from["vocab"])
    return None, data.tokenizer_for(data.expand(args.train_data), args.vocab)


def print_known_words(args, tokenizer, pairs):
    """Says how many words of the captions the vocabulary of --init_from has. (CLIP's has parts for
    any word.)"""
    if tokenizer.pattern is not data.WORD:
        return
    texts = [*chain.from_iterable(pairs.texts_of_some(1000))]
    share = evaluation.share_of_known_words(tokenizer, texts)
    print(f"{share:.0%} of the words in these captions are in the vocabulary of {args.init_from}")
    if share < 0.5:
        print("warning: the others are spelt in bytes, so that the model learns letters instead of")
        print("words. Train a new model, with a vocabulary of your own (python -m scripts.vocab).")


def open_data(args, tokenizer, image_size):
    """Returns the training pairs, and the validation pairs or None. What is wrong with the data
    ends the run before it starts."""
    shards, val_shards = data.split_sides(data.expand(args.train_data))
    if args.val_data is not None:
        val_shards = [] if args.val_data == ["none"] else data.expand(args.val_data)
    elif val_shards:
        print(f"validating on {len(val_shards):,} of the shards, by their names")
    both = data.real_paths(shards) & data.real_paths(val_shards)
    if both:
        raise InputError(f"training and validation data share {min(both)}")

    sources = (args.captions, args.label_captions)
    pairs = data.Pairs(shards, tokenizer, image_size, *sources, args.seed, args.crop_area)
    val_captions = args.val_captions or args.captions
    val_pairs = None
    if val_shards:
        val_pairs = data.Pairs(val_shards, tokenizer, image_size, val_captions)
    elif args.val_data is None and len(pairs) >= 200:
        val_pairs = data.Pairs(shards, tokenizer, image_size, val_captions)
        data.hold_out(pairs, val_pairs)
        print(f"{len(val_pairs):,} pairs are held out for validation: see --val_data")

    if args.init_from is not None:
        print_known_words(args, tokenizer, pairs)
    if args.batch_size > len(pairs):
        raise InputError(f"--batch_size is more than the {len(pairs):,} pairs")
    for folder in args.zeroshot_data:
        evaluation.ClassFolders(folder, image_size)  # it is scored later, but checked now
    if val_pairs is not None and RANK == 0:
        next(evaluation.batches(evaluation.ShardImages(val_pairs), 4, 0, "checking"))
    return pairs, val_pairs


def make_model(args, start_from, vocab_size, device):
    """Returns a model on the device, new or that of a checkpoint (--resume, --init_from), and
    whether its word head is new: one that the checkpoint does not have keeps its random weights."""
    if start_from is None:
        config = {**PRESETS[args.model], "vocab_size": vocab_size}
    else:
        config = dict(start_from["config"])
    for name in FIELDS:
        value = getattr(args, name, None)
        if value is not None:
            config[name] = value
    torch.manual_seed(args.seed)  # the same initial weights on every process and machine
    try:
        model = SuperCLIP(SuperCLIPConfig(**config))
    except ValueError as error:
        raise InputError(str(error)) from error

    has_new_head = False
    if start_from is not None:
        weights = start_from.pop("model")  # popped, so that no copy is kept for the whole run
        # Not strict: the head may be new, or not be wanted. read_checkpoint has checked the rest.
        missing = model.load_state_dict(weights, strict=False).missing_keys
        has_new_head = len(missing) > 0
    if device.type == "cpu" and model.visual.grid < 10:
        # Despite its name this governs the CPU, too, whose flash kernel is slow for so few tokens.
        torch.backends.cuda.enable_flash_sdp(False)

    model.visual.requires_grad_(args.freeze != "image")  # with its projection
    model.text.requires_grad_(args.freeze != "text")
    model.visual.transformer.grad_checkpointing = args.grad_checkpointing
    model.text.transformer.grad_checkpointing = args.grad_checkpointing
    if wants_compile(args, device):
        # Older torch cannot split a compiled graph for several processes if blocks are recomputed.
        torch._dynamo.config.optimize_ddp = not args.grad_checkpointing
        # one by one, so that captions of another length do not recompile the image tower
        model.visual.compile()
        model.text.compile()
        model.terms_of_each_pair = torch.compile(model.terms_of_each_pair)
        model.terms_between_pairs = torch.compile(model.terms_between_pairs)
    return model.to(device).train(), has_new_head


def wants_compile(args, device):
    """By default only CUDA compiles, and not on old GPUs, which cannot run what it makes."""
    if args.compile is not None:
        return args.compile
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def distribute(model):
    """Returns a model that averages the gradients of all processes, or the same one if there is
    only one process."""
    if not dist.is_initialized():
        return model
    # Gradients live in the buckets that are sent, or they would be stored twice. Buffers are not
    # sent, because all processes count the same tokens.
    options = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
    return DistributedDataParallel(model, **options)


def make_optimizer(model, learning_rate, head_learning_rate, weight_decay):
    """AdamW. Weight decay is for matrices only: not for biases, norms, class token, logit scale.
    Each group keeps its peak rate, because the word head may have one of its own. By default it has
    that of the rest."""
    if head_learning_rate is None:
        head_learning_rate = learning_rate
    groups = []
    for in_head, peak in ((False, learning_rate), (True, head_learning_rate)):
        params = [p for name, p in model.named_parameters() if name.startswith("head.") == in_head]
        matrices = [p for p in params if p.ndim >= 2]
        vectors = [p for p in params if p.ndim < 2]
        groups.append({"params": matrices, "peak": peak, "weight_decay": weight_decay})
        groups.append({"params": vectors, "peak": peak, "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]  # plain CLIP has no head
    # The betas and eps of CLIP and SuperCLIP. fused: one kernel for all parameters, on a CPU, too.
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


class Schedule(NamedTuple):
    """The length of a run, and the distance between rows of the log, validations and saves, all in
    steps."""

    steps: int
    warmup_steps: int
    log_every: int
    eval_every: int
    save_every: int


def make_schedule(args, n):
    """Applies the rules that --help states to n pairs. Validations are at equal distances, so that
    no two of them are close."""
    steps = args.steps
    if steps is None:
        steps = max(1, round(args.epochs * (n // args.batch_size)))
    warmup_steps = args.warmup_steps
    if warmup_steps is None:
        warmup_steps = min(1000, steps // 10)
    validations = max(3, math.ceil(steps / 2000))
    return Schedule(
        steps,
        warmup_steps,
        args.log_every or max(1, min(20, steps // 20)),
        args.eval_every or math.ceil(steps / validations),
        args.save_every or steps,
    )


# -----------------------------------------------------------------------------
# The log


def commit():
    """Returns which commit this code is of, or "" if git does not know."""
    git = ["git", "describe", "--always", "--dirty"]
    with suppress(OSError):  # git is not installed
        answer = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
        return answer.stdout.strip()
    return ""


def describe(args, model, pairs, steps, dtype, device):
    """Prints what this run is, and returns the header of its log, without which no number in the
    rows that follow means anything."""
    device_name = f"{data.cores()} CPU cores"
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    header = {
        "pairs": len(pairs),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": model.config.vocab_size,
        "steps": steps,
        "batch_size": args.batch_size,
        "processes": WORLD,
        "dtype": dtype,
        "torch": torch.__version__,
        "device": device_name,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "data_fingerprint": pairs.fingerprint,
    }
    print(", ".join(f"{name} {value}" for name, value in header.items()))
    if pairs.unused:
        print(f"{len(pairs.unused):,} parts of shards are not used: see python -m scripts.show")
    return {**header, "arguments": vars(args), "config": vars(model.config)}


def open_log(path):
    """Opens log.jsonl to add to it. What is there already stays, if it is of this program."""
    file = open(path, "a+", errors="replace")
    file.seek(0)
    first = file.readline().strip()
    if first and not first.startswith('{"header"'):
        raise InputError(f"{path} is not a log of this program: name another --out_dir")
    if first:
        file.write("\n")  # the last line may have been cut by a kill
    return file


class Log:
    """The progress of a run: a bar on the terminal, and on rank 0 the file log.jsonl. The file has
    a header, a row for each logged step and one for each validation. A resumed run adds another
    header, and may log a step twice: the later row counts."""

    def __init__(self, args, header, step):
        self.header = header
        self.first_step = step
        self.bad_samples = 0
        self.best_speed = 0.0  # images per second
        self.slow_rows = 0  # one after the other
        self.is_explained = False
        self.file = None
        self.wandb = None
        if RANK == 0:
            self.file = open_log(Path(args.out_dir, "log.jsonl"))
            if args.wandb is not None:
                self.wandb = optional("wandb").init(project=args.wandb, config=header)
        # None: a bar if this is a terminal
        self.bar = tqdm(total=header["steps"], initial=step, unit="step", disable=RANK > 0 or None)
        self.write({"header": header, "step": step})

    def begin_interval(self, step):
        """The next row measures speed and waiting from here on."""
        self.interval_step = step
        self.interval_time = time.perf_counter()
        self.waited = 0.0

    def fetch(self, batches):
        """Returns the next micro-batch. Measures the wait, and counts the bad samples in it."""
        start = time.perf_counter()
        batch, bad_samples = next(batches)
        self.waited += time.perf_counter() - start
        self.bad_samples += bad_samples
        return batch

    def training_row(self, step, losses, grad_norm, learning_rate, model):
        """Returns the row of a step, which is the same on all processes. Bad samples are those
        since the start or the resumption."""
        N = self.header["batch_size"]
        names = [name for name in losses if name == "loss" or name.endswith("_loss")]
        values = [losses[name].detach() / WORLD for name in names]
        bad_samples = torch.tensor(float(self.bad_samples), device=grad_norm.device)
        sums = all_sum(torch.stack([*values, bad_samples])).tolist()
        bad_samples = round(sums.pop())
        # Each pair that was seen is good. So this is when more than half of all were bad.
        seen = (step - self.first_step) * N
        if bad_samples > seen:
            raise InputError(f"more than half of the samples are bad: {bad_samples:,} so far")
        seconds = time.perf_counter() - self.interval_time
        speed = (step - self.interval_step) * N / seconds
        return {
            "step": step,
            "samples": step * N,
            **dict(zip(names, sums)),
            "logit_scale": model.logit_scale.exp().item(),
            "grad_norm": grad_norm.nan_to_num().item(),
            "learning_rate": learning_rate,
            "images_per_second": round(speed, 1),
            "data_wait": round(self.waited / seconds, 3),
            "bad_samples": bad_samples,
            "memory_gb": round(torch.cuda.max_memory_allocated() / 2**30, 2),  # 0 without a GPU
        }

    def write(self, row):
        """Adds a row to the file, and begins the interval that the next one measures."""
        self.begin_interval(row["step"])
        if self.file is None:
            return
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:  # a lost line is no reason to lose a run
            tqdm.write(f"warning: cannot write the log: {error}")
        if self.wandb is not None and "header" not in row:
            self.wandb.log(row, step=row["step"])

    def show(self, row):
        """Prints a row of training, before it is written."""
        losses = [
            f"{name.removesuffix('_loss')} {value:.3f}"
            for name, value in row.items()
            if name.endswith("_loss")
        ]
        samples_left = (self.header["steps"] - row["step"]) * self.header["batch_size"]
        left = timedelta(seconds=samples_left // max(row["images_per_second"], 0.1))
        speed = f"{row['images_per_second']:.0f} images/s, {row['data_wait']:.0%} waiting"
        tqdm.write(f"step {row['step']:6d}  {', '.join(losses)}, {speed}, {left} left")
        if left.days > 0 and self.interval_step == self.first_step:
            tqdm.write("A smaller --model or fewer --epochs take less time.")
        self.explain_slowness(row)

    def explain_slowness(self, row):
        """Says why, once, if three rows in a row are below a third of the best speed."""
        self.best_speed = max(self.best_speed, row["images_per_second"])
        if row["images_per_second"] > self.best_speed / 3:
            self.slow_rows = 0
        else:
            self.slow_rows += 1
        if self.slow_rows < 3 or self.is_explained:
            return
        self.is_explained = True
        if row["data_wait"] > 0.5:
            tqdm.write("Slow, because it waits for data: more --workers may help.")
        elif torch.get_num_threads() > 1:
            tqdm.write("Slow, because another program computes, too, and threads wait for each")
            tqdm.write("other. OMP_NUM_THREADS=1 is steadier on a CPU. (It changes the last bits.)")


# -----------------------------------------------------------------------------
# Validation


def validate(model, tokenizer, pairs, args, step):
    """Scores retrieval among the validation pairs, if there are any, and zero-shot classification.
    Prints the scores, and the head's top words for two pictures. Returns the row of the log."""
    row = {"step": step, "zeroshot": {}}
    tqdm.write(f"\nvalidation after step {step}")
    model.eval()
    torch.compiler.set_stance("force_eager")  # other shapes and dtypes than in training
    if pairs is not None:
        features = evaluation.encode_shards(model, pairs, workers=args.workers)
        row["validation"] = evaluation.retrieval(*features)
        row["mean_r1"] = evaluation.mean_r1(row["validation"])
        evaluation.print_retrieval(row["validation"])
        # in groups as large as a batch, so that it compares with the loss in training
        size = min(args.batch_size, len(features[0]))
        loss = evaluation.loss_in_groups(model, *features, size)
        row["val_group"] = size
        row["val_contrastive_loss"] = loss
        tqdm.write(
            f"contrastive loss {loss:.3f} in groups of {size} (a guess: {math.log(size):.3f})"
        )
    for folder in args.zeroshot_data:
        images = evaluation.ClassFolders(folder, model.config.image_size)
        names = evaluation.class_names(images)
        score = evaluation.zeroshot(model, tokenizer, images, names, workers=args.workers)["top1"]
        tqdm.write(evaluation.format_score(f"zero-shot {Path(folder).name}", score))
        row["zeroshot"][folder] = score
    if pairs is not None and model.head is not None:
        images, captions = next(evaluation.batches(evaluation.ShardImages(pairs), 2, 0, "words"))
        for texts, words in zip(captions, evaluation.top_words(model, tokenizer, images)):
            found = ", ".join(word for word, _, _ in words)
            tqdm.write(printable(f'"{texts[0]}": the head says {found}'))
    torch.compiler.set_stance("default")
    model.train()
    return row


# -----------------------------------------------------------------------------
# The folder of a run


def claim_folder(args):
    """Locks --out_dir, before anything in it is read, because the run that was there before may
    still be saving. Raises InputError if there is nothing to resume, or a run to be spared."""
    out_dir = Path(args.out_dir)
    path = out_dir / "last.pt"
    if args.resume and args.train_data is None and not path.exists():
        raise InputError(f"--resume: there is no {path}")
    out_dir.mkdir(parents=True, exist_ok=True)
    lock_folder(out_dir)
    holds_run = any(out_dir.glob("*.pt"))
    if holds_run and not args.resume:
        raise InputError(f"{out_dir} holds a run: --resume it, or name another --out_dir")
    # Where there is no checkpoint at all, a run was killed before its first save, and a scheduler
    # that repeats its command with --resume starts it again.
    if holds_run and not path.exists():
        raise InputError(f"--resume: there is no {path}")
    for temporary in out_dir.glob(".*.tmp"):  # of a run that was killed as it saved
        temporary.unlink()


def save_last(args, model, tokenizer, optimizer, scaler, pairs, step):
    """Writes last.pt, from which --resume goes on. Returns whether that worked. Rank 0 does it."""
    if RANK > 0:
        return True
    return evaluation.write_checkpoint(
        Path(args.out_dir, "last.pt"),
        model,
        tokenizer.vocab,
        optimizer=optimizer.state_dict(),
        scaler=scaler.state_dict(),
        step=step,
        samples=step * args.batch_size,
        arguments=vars(args),
        data_fingerprint=pairs.fingerprint,
    )


def read_resumable(path):
    """Returns what save_last has written. Raises InputError."""
    saved = evaluation.read_checkpoint(path)
    for name in ("optimizer", "scaler", "arguments"):
        check(isinstance(saved.get(name), dict), f"{path} cannot be resumed: it has no {name}")
    for name in FIELDS.intersection(saved["arguments"]):
        value = saved["arguments"][name]
        fits = value is None or value == saved["config"].get(name)
        check(fits, f"{path} cannot be resumed: --{name} is not that of its model")
    samples = saved.get("samples")
    check(isinstance(samples, int) and samples >= 0, f"{path} cannot be resumed: no sample count")
    return saved


def resume(args, saved, pairs, optimizer, scaler):
    """Takes up a saved run. Returns its step, counted in samples, so that a run may go on with
    another batch size."""
    if saved.get("data_fingerprint") != pairs.fingerprint:
        reason = "--train_data, --val_data, or the shards themselves"
        raise InputError(f"{args.out_dir} holds a run on other data ({reason}): start a new run")
    moments = saved.pop("optimizer").get("state")  # popped, so that no copy is kept
    evaluation.check_moments(f"{args.out_dir}/last.pt", moments, optimizer)
    # The groups are ours, and not the file's, so that a given --learning_rate counts.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    theirs = saved["scaler"]
    ours = scaler.state_dict()
    if theirs and ours:  # both are empty without float16
        kinds = {name: type(x) for name, x in theirs.items()}
        fits = kinds == {name: type(x) for name, x in ours.items()}
        check(fits, f"{args.out_dir}/last.pt cannot be resumed: its scaler does not fit")
        scaler.load_state_dict(theirs)
    return saved["samples"] // args.batch_size


def save_best(args, model, tokenizer, val_pairs, row):
    """Writes best.pt. Returns whether that worked."""
    return evaluation.write_checkpoint(
        Path(args.out_dir, "best.pt"),
        model,
        tokenizer.vocab,
        step=row["step"],
        mean_r1=row["mean_r1"],
        arguments=vars(args),
        data_fingerprint=val_pairs.fingerprint,
    )


def read_best(args, val_pairs):
    """Returns step and mean_r1 of best.pt, a dict, or None if there is none that compares: a score
    on other validation data does not."""
    path = Path(args.out_dir, "best.pt")
    if val_pairs is None or not path.exists():
        return None
    content = evaluation.read_checkpoint(path)
    if content.get("data_fingerprint") != val_pairs.fingerprint:
        return None
    return {"step": content["step"], "mean_r1": content["mean_r1"]}


def was_validated(args, samples):
    """Whether the log has a validation after so many samples. A run that was killed during one has
    none."""
    rows = evaluation.rows_in(args.out_dir)
    return any(row["samples"] == samples and "zeroshot" in row for row in rows)


def print_next(args, model, best, last):
    """Says where the models are, and which commands come next. best, last: rows of validations, or
    None without validation pairs."""
    folder = quote(args.out_dir)
    name = "last.pt" if best is None else "best.pt"
    if last is not None:
        print(f"\n{folder}/last.pt: step {last['step']}, mean R@1 {last['mean_r1']:.1%}")
    if best is not None:
        print(f"{folder}/best.pt: step {best['step']}, mean R@1 {best['mean_r1']:.1%}")
    evaluation.print_overfitting(args.out_dir)
    # Only shards of their own can be found again. Pairs that were held out cannot.
    shards = " --data SHARDS" if args.val_data in (None, ["none"]) else ""
    print("What the model has learned:")
    print(f"  python -m scripts.report --checkpoint {folder}/{name} --out report.html{shards}")
    if model.head is not None:
        print(f"  python -m scripts.words --checkpoint {folder}/{name} --out words.png")
    print(f"  python -m scripts.search --checkpoint {folder}/{name} TEXT{shards}")
    print("The search is among validation pictures, or among yours with --images DIR.")


# -----------------------------------------------------------------------------
# The run


def train(args, saved):
    """A run, from its first step or a checkpoint. Returns 0, or 128 and the number of a signal."""

    # ---- The device, and the batch: B pairs in this process, M of them at a time
    device = set_up_device(args.device)
    dtype = args.dtype or pick_dtype(device)
    autocast, scaler = precision(device, dtype)
    B = args.batch_size // WORLD
    M = args.micro_batch_size or B
    local = slice(RANK * B, (RANK + 1) * B)
    check(args.batch_size % WORLD == 0, f"--batch_size is not divisible by {WORLD} processes")
    check(B % M == 0, f"--micro_batch_size does not divide the {B} pairs of a process")

    # ---- The tokenizer, the data, the model and its optimizer
    if LOCAL_RANK > 0:
        wait_for_all()  # One process of a machine draws and indexes. The others find it done.
    start_from, tokenizer = read_start(args, saved)  # a checkpoint or None
    model, has_new_head = make_model(args, start_from, tokenizer.vocab_size, device)
    tokenizer.context_length = model.config.context_length
    pairs, val_pairs = open_data(args, tokenizer, model.config.image_size)
    if LOCAL_RANK == 0:
        wait_for_all()
    if has_new_head and args.head_learning_rate is None:
        args.head_learning_rate = 5e-4  # it knows nothing yet; saved with the options, for --resume
    optimizer = make_optimizer(
        model, args.learning_rate, args.head_learning_rate, args.weight_decay
    )
    ddp_model = distribute(model) if M == B else model  # grad_cache_step averages by itself

    # ---- Where the run stands
    plan = make_schedule(args, len(pairs))
    start = 0
    scores_start = args.init_from is not None  # before training can harm such a model
    if saved is not None:
        start = resume(args, saved, pairs, optimizer, scaler)
        scores_start = not was_validated(args, saved["samples"])
    check(start <= plan.steps, f"--resume: step {start} is past --steps {plan.steps}")
    check_processes_agree(vars(args), pairs.fingerprint, start)
    batches = load_batches(args, pairs, model.visual.grid, local, M, start, plan.steps, device)
    log = Log(args, describe(args, model, pairs, plan.steps, dtype, device), start)
    stop = StopSignal()
    best = read_best(args, val_pairs)  # the validation of best.pt
    last = None  # and that of last.pt
    step = start
    saved_step = start
    if scores_start and start == 0:
        saved_step = -1  # what --init_from brings is saved, too
    saved_time = time.monotonic()

    try:
        while True:
            is_last = step == plan.steps
            eval_due = is_last or step % plan.eval_every == 0
            if step == start and not scores_start:
                eval_due = False

            # 1. Save first, so that nothing is lost whatever happens to the validation. Rank 0 also
            # saves after 15 minutes: if another process has died, the next step never ends for it.
            save_due = eval_due or step % plan.save_every == 0
            if RANK == 0 and time.monotonic() > saved_time + 15 * 60:
                save_due = True
            if save_due and step > saved_step:
                if save_last(args, model, tokenizer, optimizer, scaler, pairs, step):
                    saved_step = step
                saved_time = time.monotonic()
                log.begin_interval(step)

            # 2. Validate. Rank 0 does it, and the others wait at 3.
            validates = RANK == 0 and (val_pairs is not None or args.zeroshot_data)
            if validates and eval_due and (is_last or stop.number == 0):
                row = validate(model, tokenizer, val_pairs, args, step)
                if val_pairs is not None:
                    last = row
                    if best is None or row["mean_r1"] >= best["mean_r1"]:
                        if save_best(args, model, tokenizer, val_pairs, row):
                            best = row
                log.write(row)  # after best.pt, because --resume repeats what is not in the log

            # 3. Leave together, or some would wait for the features of the others for ever.
            stop_number = stop.agreed()
            if is_last or stop_number > 0:
                break

            # 4. The losses and their gradient
            if M < B:
                micro_batches = (log.fetch(batches) for _ in range(B // M))
                losses = grad_cache_step(model, micro_batches, autocast, scaler)
            else:
                losses = plain_step(ddp_model, log.fetch(batches), autocast, scaler)

            # 5. The update
            factor = learning_rate_factor(step, plan.warmup_steps, plan.steps)
            grad_norm = update(model, optimizer, scaler, factor)
            step += 1

            # 6. The log, at a few steps only, because to read the losses is to wait for the device
            log.bar.update()
            if step % plan.log_every == 0 or step % plan.eval_every == 0 or step == plan.steps:
                rate = args.learning_rate * factor
                row = log.training_row(step, losses, grad_norm, rate, model)
                if not math.isfinite(row["loss"]):
                    raise InputError(f"the loss is {row['loss']}: {evaluation.DIVERGED}")
                log.show(row)
                log.write(row)
    finally:
        # Whatever has ended the loop, the last whole step is sound. After an error within a step,
        # only the token counts may be one batch ahead.
        log.bar.close()
        if step > saved_step:
            if save_last(args, model, tokenizer, optimizer, scaler, pairs, step):
                saved_step = step
        if step < plan.steps and Path(args.out_dir, "last.pt").exists():
            print(f"stopped after step {step}. To go on, give the same command with --resume")

    check(step == saved_step, f"step {step} was the last, but last.pt could not be written")
    wait_for_all()  # torchrun ends the others as soon as one has left with an exit code
    if step < plan.steps:
        return 128 + stop_number
    print_next(args, model, best, last)
    return 0


def main(argv):
    outlive_readers()
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    given = make_parser().parse_args(argv)  # a mistake ends the run before the processes meet
    try:
        join_processes()
        if RANK == 0:
            claim_folder(given)
        wait_for_all()
        args, saved = parse(argv)
        exit_code = train(args, saved)
    except RuntimeError as error:  # torch has no classes for these errors, so their text must tell
        if "by peer" in str(error):
            raise InputError("stopped because another process has ended") from error
        if " compiler" in str(error):
            raise InputError("torch.compile needs a C++ compiler: --no-compile") from error
        raise
    finally:
        unlock_folders()
    if dist.is_initialized():
        dist.destroy_process_group()
    return exit_code


if __name__ == "__main__":
    run_command(main)
