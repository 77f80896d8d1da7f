"""Train CLIP with SuperCLIP's word head, on one CPU or GPU, or with torchrun on many.

    python train.py                       built-in scenes, minutes on a laptop
    python train.py --batch_size 256 --train_data 'cc3m/*.tar' --model ViT-B-16
    torchrun --nproc_per_node 8 train.py --batch_size 4096 --train_data 'cc3m/*.tar'

The file reads from top to bottom: the options, the processes and the device, one step, what a run
is made of, its log, validation, and the run.

Apart from weights, token counts and optimizer state, what a step needs is a function of the options
and the step number: the batch, its crops, the dropped patches, the learning rate. So a checkpoint
needs no state of a random generator, and a run that was killed and resumed ends with the same bits
as one that was not. (That holds on a CPU. Some CUDA kernels add numbers in no fixed order.)

Axes are those of superclip.py: B pairs of this process, N pairs of all processes together, P
patches (K of them kept), E embedding.
"""

import argparse
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import eval as evaluation
from cli import (
    InputError,
    cache_folder,
    check,
    number,
    optional,
    pick_device,
    printable,
    run_command,
)
from scripts.scenes import TRAIN_DATA, built_in, make_scenes
from superclip import PRESETS, SuperCLIP, SuperCLIPConfig

try:
    import fcntl
except ImportError:
    sys.exit("error: train.py needs Linux, macOS or WSL")
warnings.filterwarnings("ignore", "`broadcast_buffers`")  # newer torch has another name for it

# torchrun tells each process its number, and how many there are.
NAMES = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
started = dist.is_torchelastic_launched()
RANK, WORLD, LOCAL_RANK = (int(os.environ[k]) if started else v for k, v in NAMES.items())

# -----------------------------------------------------------------------------
# Options


def make_parser():
    """All options, one a line: name, type, default and help. A default of None is a rule that the
    help states, because it depends on the data or on the length of the run."""
    # no abbreviations, because a typo should not become another option
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.usage = "python train.py [options]   (--help explains them)"  # not a list of them all
    parser.epilog = "Other defaults, of built-in scenes and --init_from, are printed at the start."
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    count, rate = number(int, 1), number(float, 0)
    # fmt: off
    # the data
    add("--train_data", nargs="+", metavar="SHARDS", help="tars, folders, globs, {0000..0575}")
    add("--val_data", nargs="+", metavar="SHARDS", help="or none (default: hold 1 pair in 100 out)")
    add("--zeroshot_data", nargs="+", metavar="DIR", help="folders of class folders, to score")
    add("--captions", nargs="+", default=["txt"], help="txt (default) or json.FIELD, one or more")
    add("--label_captions", nargs="+", help="for the word labels (default: --captions)")
    add("--val_captions", nargs="+", help="for --val_data (default: --captions)")
    add("--vocab", help="file, or clip (default: vocab.tiktoken beside the shards, else clip)")
    add("--workers", type=number(int, 0, 999), help="loading processes a GPU (default: its cores)")
    # the model
    add("--model", choices=PRESETS, default="ViT-B-16", help="(default %(default)s)")
    add("--image_size", type=count, metavar="PIXELS", help="a side (default: the model's)")
    add("--context_length", type=number(int, 3), metavar="TOKENS", help="(default: the model's)")
    add("--init_from", metavar="FILE", help="checkpoint to take model and vocabulary from")
    add("--freeze", choices=("image", "text"), help="tower whose weights stay as they are")
    add("--cls_weight", type=rate, default=1.0, help="of the word loss; 0 is CLIP (default 1)")
    add("--loss", choices=("softmax", "sigmoid"), default="softmax", help="CLIP's, or SigLIP's")
    # the training. 5e-4 is the rate of CLIP's own ViT-B, and of published runs on CC3M.
    add("--steps", type=count, help="updates in all (default: as many as --epochs makes)")
    add("--epochs", type=number(float, 1e-6), default=30.0, help="over the data (default 30)")
    add("--batch_size", type=count, default=256, help="pairs, of all processes (default 256)")
    add("--micro_batch_size", type=count, help="pairs in memory at a time (default: all)")
    add("--learning_rate", type=rate, default=5e-4, help="peak (5e-4; with --init_from 5e-5)")
    add("--head_learning_rate", type=rate, help="(default: the same; 5e-4 for a new head)")
    add("--warmup_steps", type=number(int, 0), help="(default: steps / 10, at most 1000)")
    add("--weight_decay", type=rate, default=0.2, help="of the weight matrices (default 0.2)")
    add("--crop_area", type=number(float, 0.01, 1), default=0.9, help="share of a random crop")
    add("--patch_dropout", type=number(float, 0, 0.99), default=0.0, help="share that is dropped")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of weights, order, crops, dropout")
    # the machine
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: what suits it)")
    add("--compile", action=flag, help="torch.compile towers and losses (default: on CUDA)")
    add("--grad_checkpointing", action=flag, default=False, help="less memory, a third slower")
    # the run
    add("--out_dir", default="out", help="folder for checkpoints and log.jsonl (default out)")
    add("--resume", action=flag, default=False, help="go on in --out_dir, with its saved options")
    add("--log_every", type=count, help="steps (default: steps / 20, at most 20)")
    add("--eval_every", type=count, help="steps (default: steps / 5, at most 2000)")
    add("--save_every", type=count, help="steps (default: before each validation)")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases, too (needs the package wandb)")
    # fmt: on
    return parser


FIELDS = vars(SuperCLIPConfig()).keys()  # an option of such a name sets that field
# What --resume may not change, or it would silently make another run.
FIXED = {"model", "init_from", "vocab", "captions", "label_captions", "freeze", "weight_decay"}
FIXED |= {"patch_dropout", "crop_area", "seed", *FIELDS}
IN_A_CHECKPOINT = {"model", "image_size", "context_length", "vocab", "loss"}  # for --init_from


def parse(argv):
    """-> (options with all defaults, the checkpoint to resume or None)"""
    parser, saved = make_parser(), None
    defaults = vars(parser.parse_args([]))
    # argparse leaves alone what a namespace has, so None marks the options that were not given.
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults)))
    given = {name: value for name, value in vars(given).items() if value is not None}
    check(not {"steps", "epochs"} <= given.keys(), "give --steps or --epochs, not both")
    last = Path({**defaults, **given}["out_dir"], "last.pt")
    if given.get("resume") and last.exists():
        saved = evaluation.read_checkpoint(last)
        whole = {"optimizer", "scaler", "arguments", "data_fingerprint", "samples"} <= saved.keys()
        check(whole, f"{last} cannot be resumed: it holds weights only, or is of another version")
        base = saved["arguments"] | ({"steps": None} if "epochs" in given else {})
        # An option that is newer than the checkpoint had its default.
        changed = [k for k in given.keys() & FIXED if given[k] != base.get(k, defaults[k])]
        check(not changed, f"--resume cannot change --{' --'.join(changed)}")
        if {"steps", "epochs"} & given.keys():
            print("The new length changes the learning rate. (--init_from starts a new run.)")
    else:
        # A scheduler that repeats its command may have killed it before the first save.
        new = "train_data" in given and not last.with_name("best.pt").exists()
        check(new or not given.get("resume"), f"--resume: there is no {last}")
        # Options that were chosen together with the built-in scenes, or for fine-tuning
        base = {} if "train_data" in given else built_in(given.get("batch_size"))
        if "init_from" in given:
            base["learning_rate"] = 5e-5  # larger steps would destroy what the weights know
            known = given.keys() & IN_A_CHECKPOINT
            check(not known, f"--init_from sets it: leave --{' --'.join(known)} out")
        print("defaults unlike --help's:", {k: base[k] for k in base if k not in given})
    return argparse.Namespace(**{**defaults, **base, **given}), saved


# -----------------------------------------------------------------------------
# Processes and the device


def set_up(name):
    """--device -> device, after the processes have found each other. Each has its own GPU."""
    if WORLD > 1 and name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{LOCAL_RANK}"
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # so that streams are of this device, too
    if WORLD > 1:
        # CPU tensors travel by gloo, so that processes can agree on something without waiting for
        # their GPUs. Two hours, because all others wait while rank 0 validates.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return device


def pick_dtype(device, scenes):
    """What suits the device. scenes: are the data the built-in scenes?"""
    if device.type == "cuda":
        # Ampere, compute capability 8, is the first with bfloat16 units. float16, on older GPUs,
        # has a small range, which the loss scaler of train() makes up for.
        return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"
    # A CPU with bfloat16 units takes half the time. (Older torch does not tell.)
    units = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if scenes and units.get("avx512_bf16") else "float32"


def all_sum(tensor):
    """The sum over all processes, in place. With one process, the tensor itself."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def listen_for_signals():
    """-> a list that is empty until SIGINT (Ctrl-C) or SIGTERM (from schedulers) asks the run to
    save and leave. Within three seconds another signal counts as the same one, because torchrun
    passes on what a scheduler sends to all processes. A later one ends the process at once."""
    asked = []  # when, in seconds

    def ask(number_of_signal, _):
        if not asked:
            # os.write, because print may be what the signal has interrupted
            os.write(2, b"\nThe run stops after this step or validation. Again: at once.\n")
            asked.append(time.monotonic())
        elif time.monotonic() > asked[0] + 3:
            os._exit(128 + number_of_signal)

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return asked


# -----------------------------------------------------------------------------
# One step


def learning_rate_at(step, peak, warmup_steps, steps):
    """Linear warm-up to `peak`, then cosine to 0: a pure function of the step, so that a resumed
    run needs no scheduler. Early steps are small because Adam's second moments are still noise."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def patches_to_keep(dropout, grid, batch_size, seed, step, device):
    """The patches that each image keeps in a step (FLIP, arXiv 2212.00794): indices (N, K), or None
    for all. They are drawn for the global batch, so that they do not depend on the processes."""
    if not dropout:
        return None
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
    noise = torch.rand(batch_size, grid**2, generator=generator, device=device)  # (N, P)
    # the first K of a random permutation of all patches
    return noise.argsort(dim=1)[:, : max(1, round(grid**2 * (1 - dropout)))]


def grad_cache_step(model, micro_batches, autocast, scaler):
    """The losses of a batch, as model(**batch) gives them, and in .grad their gradient, with the
    memory of one micro-batch (GradCache, arXiv 2101.06983). That takes a third more time, because
    the towers run forward twice.

    The contrastive loss needs the features of all pairs at once, but the towers do not. So the loss
    is computed on features that have no graph. Then each micro-batch runs again, with a graph, and
    backpropagates the gradient of its own features: by the chain rule, d loss / d weights is the
    sum over micro-batches of d loss / d features * d features / d weights.

    micro_batches: an iterator over equal parts of the batch, so that the first ones are computed
    while the loader is at work on the last ones. scaler: for float16, as in the plain step.
    """
    batches, features = [], []
    for batch in micro_batches:
        with autocast, torch.no_grad():
            images, texts, _ = model.features_and_terms(**batch)
        features.append((images, texts))
        batches.append(batch)
    # All of them are counted before any is weighted, as in the plain step.
    model.count_tokens(data.pad_and_join([batch["label_tokens"] for batch in batches]))
    images, texts = (torch.cat(parts).requires_grad_() for parts in zip(*features))  # (B, E)
    terms = model.compare(images, texts)
    scaler.scale(model.total_loss(terms)).backward()
    n = len(batches)
    gradients = zip(images.grad.chunk(n), texts.grad.chunk(n))
    for batch, (image_gradient, text_gradient) in zip(batches, gradients):
        with autocast:
            images, texts, own_terms = model.features_and_terms(**batch)
        # A number whose gradient is, by the chain rule, that of the terms between pairs
        surrogate = (images * image_gradient).sum() + (texts * text_gradient).sum()
        (surrogate + scaler.scale(model.total_loss(own_terms) / n)).backward()
        for name, value in own_terms.items():
            terms[name] = terms.get(name, 0.0) + value.detach() / n
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained if dist.is_initialized() else ():
        all_sum(p.grad).div_(dist.get_world_size())
    return {"loss": model.total_loss(terms), **terms}


def plain_step(model, batch, autocast, scaler):
    """The losses of a batch, and in .grad their gradient."""
    with autocast:
        losses = model(**batch)
    scaler.scale(losses["loss"]).backward()  # unscaled, float16's small gradients would be 0
    return losses


def update(model, optimizer, scaler, factor):
    """One step of the optimizer. Returns the norm of the gradient before it was clipped to 1.

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


def prepare(args, saved):
    """What the processes of a machine must not do all at once -> (the checkpoint to start from or
    None, tokenizer). Drawing and indexing start processes, so they come before CUDA does."""
    with open(cache_folder() / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first one does the work, the others find it done
        if args.train_data == TRAIN_DATA and not Path("scenes").exists():
            make_scenes("scenes")
        for patterns in (args.train_data, args.val_data):
            if patterns not in (None, ["none"]):
                data.build_index(data.expand(patterns))
        start_from = saved or (args.init_from and evaluation.read_checkpoint(args.init_from))
        if start_from:
            return start_from, data.Tokenizer(start_from["vocab"])
        return None, data.tokenizer_for(data.expand(args.train_data), args.vocab)


def make_model(args, start_from, tokenizer, device):
    """A new model, or that of a checkpoint (--resume, --init_from). A word head that the checkpoint
    does not have starts from random weights."""
    new = {**PRESETS[args.model], "vocab_size": tokenizer.vocab_size}
    config, held = (start_from["config"], IN_A_CHECKPOINT) if start_from else (new, set())
    options = {k: v for k, v in vars(args).items() if k in FIELDS - held and v is not None}
    torch.manual_seed(args.seed)  # the same initial weights on every process and machine
    try:
        model = SuperCLIP(SuperCLIPConfig(**{**config, **options}))
    except ValueError as error:
        raise InputError(str(error)) from error
    if start_from:
        # Not strict: the head may be new, or not be wanted. read_checkpoint has checked the rest.
        if model.load_state_dict(start_from.pop("model"), strict=False).missing_keys:
            if args.head_learning_rate is None:
                args.head_learning_rate = 5e-4  # the usual rate: it knows nothing yet
            print(f"a new word head: random weights, learning rate {args.head_learning_rate:g}")
    if device.type == "cpu" and model.visual.grid < 10:
        # Despite its name this governs the CPU, too, whose flash kernel is slow for so few tokens.
        torch.backends.cuda.enable_flash_sdp(False)
    for name, tower in (("image", model.visual), ("text", model.text)):
        tower.requires_grad_(name != args.freeze)  # with its projection
        tower.transformer.grad_checkpointing = args.grad_checkpointing
    cuda = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    if cuda if args.compile is None else args.compile:  # older GPUs cannot run what it makes
        # Older torch cannot split what it compiles where recomputation begins.
        torch._dynamo.config.optimize_ddp = not args.grad_checkpointing
        # one by one, so that captions of another length do not recompile the image tower
        model.visual.compile()
        model.text.compile()
        model.terms_of_each_pair = torch.compile(model.terms_of_each_pair)
        model.terms_between_pairs = torch.compile(model.terms_between_pairs)
    tokenizer.context_length = model.config.context_length
    return model.to(device).train()


def open_data(args, tokenizer, image_size):
    """-> training pairs, and on rank 0 validation pairs if there are any. What is wrong with the
    data ends the run before it starts."""
    shards, val_captions = data.expand(args.train_data), args.val_captions or args.captions
    sources = args.captions, args.label_captions
    pairs = data.Pairs(shards, tokenizer, image_size, *sources, args.seed, args.crop_area)
    for folder in args.zeroshot_data or ():
        evaluation.ClassFolders(folder, image_size)  # it is scored later, but checked now
    val_pairs = None
    if args.val_data is None and len(pairs) >= 200:
        val_pairs = data.Pairs(shards, tokenizer, image_size, val_captions)
        data.hold_out(pairs, val_pairs)
        print(f"{len(val_pairs):,} pairs are held out for validation: see --val_data")
    elif args.val_data not in (None, ["none"]):
        val_shards = data.expand(args.val_data)
        both = {*map(os.path.realpath, shards)} & {*map(os.path.realpath, val_shards)}
        check(not both, f"training and validation data share {' '.join(sorted(both)[:1])}")
        val_pairs = data.Pairs(val_shards, tokenizer, image_size, val_captions)
    check(args.batch_size <= len(pairs), f"--batch_size is more than the {len(pairs):,} pairs")
    if val_pairs and RANK == 0:
        next(evaluation.batches(evaluation.ShardImages(val_pairs), 4, 0, "checking"))
    return pairs, val_pairs if RANK == 0 else None


def make_optimizer(model, learning_rate, head_learning_rate, weight_decay):
    """AdamW. Weight decay is for matrices only: not for biases, norms, class token, logit scale.
    The word head is apart, because it may have a learning rate of its own."""
    groups = {}
    for name, p in model.named_parameters():
        in_head, is_matrix = name.startswith("head."), p.ndim >= 2
        peak = head_learning_rate if in_head else learning_rate
        new = {"params": [], "peak": peak, "weight_decay": weight_decay * is_matrix}
        groups.setdefault((in_head, is_matrix), new)["params"].append(p)
    # The betas and eps of CLIP and SuperCLIP. fused: one kernel for all parameters, on a CPU, too.
    return torch.optim.AdamW([*groups.values()], learning_rate, (0.9, 0.98), 1e-6, fused=True)


def schedule(args, pairs):
    """-> steps in all, and steps of warm-up, between rows of the log, between validations, and
    between saves, by the rules that --help states. Validations are at equal distances, so that no
    two of them are close."""
    steps = args.steps or max(1, round(args.epochs * (len(pairs) // args.batch_size)))
    warmup_steps = min(1000, steps // 10) if args.warmup_steps is None else args.warmup_steps
    log_every = args.log_every or max(1, min(20, steps // 20))
    eval_every = args.eval_every or math.ceil(steps / max(5, math.ceil(steps / 2000)))
    return steps, warmup_steps, log_every, eval_every, args.save_every or steps


# -----------------------------------------------------------------------------
# The log


def describe(args, model, pairs, data_print, steps, dtype, device):
    """Print what this run is, and return the header of its log, without which no number in the
    rows that follow means anything."""
    git = f"git -C {str(Path(__file__).parent)!r} describe --always --dirty 2>/dev/null"
    cores, cuda = f"{os.cpu_count()} CPU cores", device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else cores
    header = {"samples": len(pairs), "parameters": sum(p.numel() for p in model.parameters())}
    header |= {"steps": steps, "batch_size": args.batch_size, "processes": WORLD, "dtype": dtype}
    header |= {"torch": torch.__version__, "device": name, "commit": subprocess.getoutput(git)}
    header |= {"date": time.strftime("%Y-%m-%d %H:%M"), "data_fingerprint": data_print}
    print(", ".join(f"{name} {value}" for name, value in header.items()))
    if pairs.unused:
        print(f"{len(pairs.unused):,} parts of shards are not used: see python -m scripts.show")
    return {**header, "arguments": vars(args), "config": vars(model.config)}


def open_log(out_dir, resume):
    """The log of a run, locked, so that no other run writes into this folder. The lock ends with
    the process, however that ends, and loading processes do not inherit it."""
    out_dir.mkdir(parents=True, exist_ok=True)
    file = open(out_dir / "log.jsonl", "a+", errors="replace")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another run is using {out_dir}: name another --out_dir") from None
    # Checked here, with the lock, because another run may have begun while this one was starting.
    holds_run = any(out_dir.glob("*.pt"))
    check(resume or not holds_run, f"{out_dir} holds a run: --resume it, or name another --out_dir")
    for temporary in out_dir.glob(".*.pt.*.tmp"):  # from a run that was killed as it saved
        temporary.unlink()
    file.truncate(None if holds_run else 0)  # drop what an earlier attempt, never saved, has logged
    file.write("\n" if holds_run else "")  # the last line may have been cut by a kill
    return file


class Log:
    """The progress of a run: a bar on the terminal, and log.jsonl, which rank 0 writes. It has a
    header, a row for each logged step and one for each validation. A resumed run adds another
    header, and may log a step twice: the later row counts."""

    def __init__(self, args, header, step):
        self.header, self.first_step, self.bad_samples = header, step, 0
        self.file = open(os.devnull, "a") if RANK else open_log(Path(args.out_dir), args.resume)
        # None: a bar if this is a terminal
        self.bar = tqdm(total=header["steps"], initial=step, unit="step", disable=RANK > 0 or None)
        wandb = optional("wandb") if args.wandb and RANK == 0 else None
        self.wandb = wandb and wandb.init(project=args.wandb, config=header)
        self.write({"header": header, "step": step})

    def fetch(self, batches):
        """The next micro-batch. Measures the wait, and counts the bad samples in it."""
        start = time.perf_counter()
        batch, bad_samples = next(batches)
        self.waited += time.perf_counter() - start
        self.bad_samples += bad_samples
        return batch

    def row(self, step, losses, grad_norm, learning_rate, model):
        """The row of a step, which is the same on all processes. Speed and waiting are of the steps
        since the last row, bad samples of those since the start or the resumption."""
        names = [name for name in losses if name.endswith("loss")]
        N = self.header["batch_size"]
        means = [losses[name].detach() / WORLD for name in names]
        bad = torch.tensor(float(self.bad_samples), device=grad_norm.device)
        *means, bad = all_sum(torch.stack([*means, bad])).tolist()
        terms = dict(zip(names, means))
        loss = terms["loss"]
        check(math.isfinite(loss), f"the loss is {loss} at step {step}: {evaluation.DIVERGED}")
        # A bad sample may be replaced by another one, so that one pair may count several.
        seen, seconds = (step - self.first_step) * N, time.perf_counter() - self.clock
        check(bad <= seen, f"more than half are bad: {bad:,.0f} of {seen + bad:,.0f} samples read")
        speed, waiting = (step - self.last_step) * N / seconds, self.waited / seconds
        memory = torch.cuda.max_memory_allocated() / 2**30  # 0 without a GPU
        row = {"step": step, "samples": step * N, **terms}
        row |= {"logit_scale": model.logit_scale.exp().item()}
        row |= {"grad_norm": grad_norm.nan_to_num().item(), "learning_rate": learning_rate}
        row |= {"images_per_second": round(speed, 1), "data_wait": round(waiting, 3)}
        return row | {"bad_samples": round(bad), "memory_gb": round(memory, 2)}

    def write(self, row):
        """Add a row to the log, and show it if it is one of training."""
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:  # a lost line is no reason to lose a run
            tqdm.write(f"warning: cannot write the log: {error}")
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        if "loss" in row:
            terms = [f"{name} {row[name]:.3f}, " for name in row if name.endswith("_loss")]
            text = "step {step:6d}  " + "".join(terms)
            text += "{images_per_second:.0f} images/s, {data_wait:.0%} waiting"
            samples = (self.header["steps"] - row["step"]) * self.header["batch_size"]
            left = timedelta(seconds=samples // max(row["images_per_second"], 0.1))
            long = ": a smaller --model or fewer --epochs take less" if left.days else ""
            tqdm.write(f"{text.format(**row)}, {left} left{long}")
        # Here begins the interval over which the next row measures speed and waiting.
        self.clock, self.waited, self.last_step = time.perf_counter(), 0.0, row["step"]


# -----------------------------------------------------------------------------
# Validation


@torch.compiler.set_stance("force_eager")  # other shapes and dtypes than in training
def validate(model, tokenizer, pairs, args, step):
    """Retrieval among the validation pairs, if there are any, and zero-shot classification. Prints
    the scores, and the head's top words for two pictures. Returns the row of the log."""
    row = {"step": step, "zeroshot": {}}
    tqdm.write(f"\nvalidation after step {step}")
    model.eval()
    if pairs:
        features = evaluation.encode_shards(model, pairs, workers=args.workers)
        row["validation"] = evaluation.retrieval(*features)
        row["mean_r1"], row["at_most"] = evaluation.mean_r1(row["validation"])
        evaluation.print_retrieval(row["validation"])
    for folder in args.zeroshot_data or ():
        images = evaluation.ClassFolders(folder, model.config.image_size)
        names = evaluation.class_names(images)
        score = evaluation.zeroshot(model, tokenizer, images, names, workers=args.workers)["top1"]
        print(evaluation.line(f"zero-shot {Path(folder).name}", score))
        row["zeroshot"][folder] = score
    if pairs and model.head is not None:
        images, captions = next(evaluation.batches(evaluation.ShardImages(pairs), 2, 0, "words"))
        for texts, words in zip(captions, evaluation.top_words(model, tokenizer, images)):
            print(printable(f'"{texts[0]}" {", ".join(word for word, _, _ in words)}'))
    model.train()
    return row


def print_next(args, best, last):
    """Say where the model is, and which commands come next. best: mean R@1 of best.pt, below 0
    without validation pairs; last: the last validation."""
    # A better step in between may have been luck. Then the last one has seen more of the data.
    luck = last.get("mean_r1", best) < best <= last.get("at_most", 1.0)
    path = f"{args.out_dir}/{'last.pt' if best < 0 or luck else 'best.pt'}"
    print(f"\nThe model is in {path}{' (best.pt is hardly better)' * luck}. What it has learned:")
    if args.val_data not in (None, ["none"]):
        pairs = *map(repr, args.val_data), "--captions", *(args.val_captions or args.captions)
        print(f"  python -m scripts.report --checkpoint {path!r} --out report.html --data", *pairs)
    print(f"  python -m scripts.words --checkpoint {path!r} --image FILE --out words.png")
    print(f"  python -m scripts.search --checkpoint {path!r} --images DIR TEXT")


# -----------------------------------------------------------------------------
# The run


def resume(args, saved, data_print, val_print, optimizer, scaler):
    """-> (the step at which a saved run goes on, its best mean R@1 so far). The prints are the
    fingerprints of training and validation data."""
    fits, path, best = saved["data_fingerprint"] == data_print, Path(args.out_dir, "best.pt"), -1.0
    check(fits, f"--train_data is not that of the run in {args.out_dir}: start a new run")
    peaks = [group["peak"] for group in optimizer.param_groups]  # --learning_rate may be another
    optimizer.load_state_dict(saved["optimizer"])
    for group, peak in zip(optimizer.param_groups, peaks):
        group["peak"] = peak
    scaler.load_state_dict(saved["scaler"] or scaler.state_dict())  # empty without float16
    if val_print and path.exists():
        content = evaluation.read_checkpoint(path)
        # With other validation data the old score is not comparable.
        best = content["mean_r1"] if content.get("data_fingerprint") == val_print else best
    # Counted in samples, so that a run may go on with another batch size.
    return saved["samples"] // args.batch_size, best


def train(args, saved, start_from, tokenizer):
    """A run from its first step, or from a checkpoint, to its last."""
    device, N, B = set_up(args.device), args.batch_size, args.batch_size // WORLD
    micro, local = args.micro_batch_size or B, slice(RANK * B, (RANK + 1) * B)
    check(N % WORLD == 0, f"--batch_size is not divisible by {WORLD} processes")
    check(B % micro == 0, f"--micro_batch_size does not divide the {B} pairs of a process")
    dtype = args.dtype or pick_dtype(device, args.train_data == TRAIN_DATA)
    autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    model = wrapped = make_model(args, start_from, tokenizer, device)
    if WORLD > 1 and not args.micro_batch_size:
        # Gradients live in the buckets that are sent, or they would be stored twice. Buffers are
        # not sent, because all processes count the same tokens.
        options = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
        wrapped = torch.nn.parallel.DistributedDataParallel(model, **options)
    head_rate = args.learning_rate if args.head_learning_rate is None else args.head_learning_rate
    optimizer = make_optimizer(model, args.learning_rate, head_rate, args.weight_decay)
    pairs, val_pairs = open_data(args, tokenizer, model.config.image_size)
    steps, warmup_steps, log_every, eval_every, save_every = schedule(args, pairs)
    prints = data_print, val_print = pairs.fingerprint(), val_pairs and val_pairs.fingerprint()
    code = int.from_bytes(hashlib.sha1(f"{vars(args)} {data_print}".encode()).digest()[:6], "big")
    check(all_sum(torch.tensor(code)) == WORLD * code, "the processes differ in options or data")
    step, best = resume(args, saved, *prints, optimizer, scaler) if saved else (0, -1.0)
    check(step <= steps, f"--resume: step {step} is past --steps {steps}")
    batches = data.load_batches(pairs, N, local, micro, step, steps, args.workers, device)
    header = describe(args, model, pairs, data_print, steps, dtype, device)
    log, asked_to_stop = Log(args, header, step), listen_for_signals()
    out_dir, grid, validation = Path(args.out_dir), model.visual.grid, {}
    counts = [x.clone() for x in model.buffers()]  # as they were after the last whole step
    # A fine-tuning saves and scores its start, too, because training may harm the model.
    saved_step = -1 if args.init_from and not saved else step
    save = partial(evaluation.write_checkpoint, model=model, vocab=tokenizer.vocab)

    def due(every):
        return step % every == 0 or step == steps

    def save_last():
        nonlocal saved_step
        for buffer, count in zip(model.buffers(), counts):
            buffer.copy_(count)
        state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step}
        state |= {"arguments": vars(args), "data_fingerprint": data_print, "samples": step * N}
        if RANK > 0 or save(out_dir / "last.pt", **state):
            saved_step = step

    try:
        while True:
            # 1. What is due after `step` steps. The save comes first, so that nothing is lost
            # whatever happens to the validation. Rank 0 does both, and the others wait below.
            eval_due = due(eval_every) and (step > 0 or args.init_from)
            if step > saved_step and (eval_due or due(save_every)):
                save_last()
            if eval_due and RANK == 0 and not asked_to_stop and (val_pairs or args.zeroshot_data):
                validation = validate(model, tokenizer, val_pairs, args, step)
                score = validation.get("mean_r1", -2.0)  # without validation pairs never the best
                more = {"step": step, "mean_r1": score, "data_fingerprint": val_print}
                if score >= best and save(out_dir / "best.pt", **more):
                    best = score
                log.write(validation)
            # If one process was asked to stop, all leave now, or some would wait for the features
            # of the others for ever. (A CPU tensor, so that nobody waits for a GPU.)
            if all_sum(torch.tensor(len(asked_to_stop))) or step == steps:
                break
            # 2. the batch, in one micro-batch or several
            keep = patches_to_keep(args.patch_dropout, grid, N, args.seed, step, device)
            keeps = [None] * (B // micro) if keep is None else keep[local].split(micro)
            micro_batches = ({**log.fetch(batches), "keep": part} for part in keeps)
            # 3. its gradient
            if args.micro_batch_size:
                losses = grad_cache_step(model, micro_batches, autocast, scaler)
            else:
                losses = plain_step(wrapped, next(micro_batches), autocast, scaler)
            # 4. the update
            factor = learning_rate_at(step, 1.0, warmup_steps, steps)
            grad_norm = update(model, optimizer, scaler, factor)
            step, counts = step + 1, [x.clone() for x in model.buffers()]
            # 5. the log, at a few steps only, because to read the losses is to wait for the device
            log.bar.update()
            if due(log_every) or due(eval_every):
                log.write(log.row(step, losses, grad_norm, args.learning_rate * factor, model))
    finally:  # whatever has ended the loop, its last whole step is sound
        log.bar.close()
        if step > saved_step:
            save_last()
        if step < steps:
            print(f"stopped after step {step}. To go on, give the same command with --resume")
    check(saved_step == step, f"step {step} was the last, but last.pt could not be written")
    if step == steps:
        print_next(args, best, validation)


def main(argv):
    if RANK > 0:  # one process speaks for all
        sys.stdout = open(os.devnull, "w")
    args, saved = parse(argv)
    try:
        train(args, saved, *prepare(args, saved))
    except RuntimeError as error:  # torch has no classes for these errors, so their text must tell
        text = str(error)
        check("by peer" not in text, "stopped because another process has ended")
        check(" compiler" not in text, "torch.compile needs a C++ compiler: --no-compile")
        memory = "out of memory" in text or "allocate memory" in text
        check(not memory, "out of memory: a smaller --micro_batch_size needs less")
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
