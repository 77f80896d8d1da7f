"""Train CLIP with SuperCLIP's word head: on one CPU or GPU, or under torchrun on many.

    python train.py                       built-in shapes, minutes on a laptop
    python train.py --batch_size 256 --train_data 'cc3m/*.tar' --model ViT-B-16
    torchrun --nproc_per_node 8 train.py --batch_size 4096 --train_data 'cc3m/*.tar'

Apart from the weights, all that a step needs is a function of (arguments, step): the batch, its
crops, the patches that are dropped, the learning rate. So a checkpoint needs no state of any random
generator, and a run that was killed and resumed ends with the same bits as one that was not (on a
CPU: some CUDA kernels add up in any order).
"""

import argparse
import hashlib
import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

import data
import eval as evaluation
from superclip import PRESETS, InputError, SuperCLIP, SuperCLIPConfig, read_checkpoint

# -----------------------------------------------------------------------------
# Arguments

LOSSES = ("softmax", "sigmoid")
DTYPES = ("float32", "bfloat16", "float16")
# What a bare `python train.py` stands for: chosen together, see the README.
BUILT_IN = dict(
    train_data=["shapes/train-*.tar"],
    val_data=["shapes/val-*.tar"],
    zeroshot_data=["shapes/zeroshot/colour", "shapes/zeroshot/shape"],
    captions="json.captions",  # short or long, drawn anew each time: zero-shot's prompts are short
    val_captions="json.long",  # a short one is true of many scenes
    model="tiny",
    weight_decay=0.1,
    epochs=2.8,
    batch_size=32,
)
DEFAULTS = dict(
    captions="txt", model="ViT-B-16", learning_rate=5e-4, weight_decay=0.2, batch_size=256
)


def make_parser():
    flag = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="Without --train_data: the built-in shapes, with settings of their own.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100),
        allow_abbrev=False,
    )

    def add(name, metavar=None, help=None, **options):
        group.add_argument("--" + name, metavar=metavar, help=help, **options)

    group = parser.add_argument_group("data")
    add("train_data", "SHARDS", "tar shards: paths, globs or braces {0000..0575}", nargs="+")
    add("val_data", "SHARDS", "shards for validation by retrieval", nargs="+")
    add("zeroshot_data", "DIR", "folders of class folders, scored at the end", nargs="+")
    add("captions", "SOURCE", "txt, or json.FIELD: a string or a list (default txt)")
    add("label_captions", "SOURCE", "for the word labels alone (default: --captions)")
    add("val_captions", "SOURCE", "of the validation data (default: --captions)")
    add("vocab", "FILE", "or clip (default: vocab.tiktoken beside the shards, else clip)")
    add(
        "max_bad",
        "SHARE",
        "stop if more of the data is bad (default 0.05)",
        type=float,
        default=0.05,
    )
    add("workers", "N", "processes that decode, per GPU (default: the cores, 8 at most)", type=int)

    group = parser.add_argument_group("model")
    add("model", None, "preset (default ViT-B-16, or what --init_from is)", choices=PRESETS)
    add("image_size", "PIXELS", "side of the square input (default: the preset's)", type=int)
    add("context_length", "TOKENS", "that the text tower sees (default 77)", type=int)
    add("init_from", "PATH", "start from weights of SuperCLIP, open_clip or OpenAI's CLIP")
    add(
        "cls_weight",
        "LAMBDA",
        "of the word loss; 0: plain CLIP (default 1)",
        type=float,
        default=1.0,
    )
    add("loss", None, "CLIP's softmax or SigLIP's sigmoid", choices=LOSSES, default="softmax")

    group = parser.add_argument_group("training")
    add("steps", "N", "updates in all (default: by --epochs)", type=int)
    add("epochs", "N", "passes over the data (default 30)", type=float)
    add("batch_size", "PAIRS", "global, however many processes (default 256)", type=int)
    add("micro_batch_size", "PAIRS", "at a time, per process: less memory, same result", type=int)
    add("learning_rate", "LR", "peak; cosine to 0 (default 5e-4)", type=float)
    add("warmup_steps", "N", "linear (default: a tenth of the steps, 1000 at most)", type=int)
    add("weight_decay", "W", "of matrices (default 0.2)", type=float)
    add(
        "patch_dropout",
        "SHARE",
        "of patches left out, FLIP: faster (default 0)",
        type=float,
        default=0.0,
    )
    add("seed", "N", "of weights, order, crops, dropped patches (default 0)", type=int, default=0)

    group = parser.add_argument_group("machine")
    add("device", "NAME", "cuda, mps or cpu (default: the first there is)")
    add("dtype", None, "of autocast (default: CUDA's best; CPU float32)", choices=DTYPES)
    add("compile", None, "torch.compile the towers (default: on CUDA)", action=flag)
    add("grad_checkpointing", None, "less memory, a third slower", action=flag, default=False)
    add("profile", None, "trace steps 10-15 to out_dir/trace.json", action=flag, default=False)

    group = parser.add_argument_group("run")
    add("out_dir", "DIR", "for checkpoints and log.jsonl (default out)", default="out")
    add(
        "resume", None, "go on from out_dir, with the arguments of then", action=flag, default=False
    )
    add("log_every", "STEPS", "(default 50)", type=int, default=50)
    add("eval_every", "STEPS", "validation (default: five times a run or more)", type=int)
    add("save_every", "STEPS", "last.pt (default: as --eval_every)", type=int)
    add("wandb", "PROJECT", "log to Weights & Biases too (needs the package wandb)")
    return parser


def parse(argv):
    """-> (args with everything filled in, args as given, checkpoint to go on from or None)."""
    parser = make_parser()
    args = parser.parse_args(argv)
    checkpoint = find_checkpoint(Path(args.out_dir)) if args.resume else None
    if checkpoint:  # its arguments become the defaults, what is given overrides them
        before = {k: v for k, v in checkpoint["arguments"].items() if k != "out_dir"}
        if args.steps or args.epochs:  # the length is said anew, in the one way or the other
            before["steps"] = before["epochs"] = None
        parser.set_defaults(**before)
        args = parser.parse_args(argv)
    elif args.resume:
        print(f"no checkpoint in {args.out_dir} yet: starting from the beginning")
    given = {name: value for name, value in vars(args).items() if name != "resume"}
    built_in = BUILT_IN if args.train_data is None else {}
    if args.init_from and given["model"]:
        raise InputError("--init_from says which model it is: leave --model out")
    for name, value in {**DEFAULTS, **built_in}.items():
        if getattr(args, name) is None and not (name == "epochs" and args.steps):
            setattr(args, name, value)
    if args.steps is None and args.epochs is None:
        args.epochs = 30.0
    if given["steps"] and given["epochs"]:
        raise InputError("--steps and --epochs both say how long: give one of them")
    positive = "steps epochs batch_size micro_batch_size image_size context_length"
    for name in f"{positive} log_every eval_every save_every".split():
        if (value := getattr(args, name)) is not None and value <= 0:
            raise InputError(f"--{name} is a positive number, not {value}")
    if not 0 <= args.patch_dropout < 1:
        raise InputError(f"--patch_dropout is a share from 0 to below 1, not {args.patch_dropout}")
    if (args.workers or 0) < 0:
        raise InputError(f"--workers is 0 or more, not {args.workers}")
    return args, given, checkpoint


# -----------------------------------------------------------------------------
# Processes and devices


def set_up(args):
    """-> rank, world, device, dtype. Under torchrun every process takes its own GPU."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = args.device
    if name is None:
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    try:
        device = torch.device(name)
        if device.type == "cuda" and world > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name} is not there: {str(error).splitlines()[0]}") from None
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # The others wait while rank 0 evaluates, hence the long patience.
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2)
        )
    dtype = args.dtype
    if dtype is None:
        dtype = "float32"
        if device.type == "cuda":  # compute capability 8: Ampere, the first with bfloat16 units
            dtype = "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"
        elif device.type == "cpu" and args.train_data == BUILT_IN["train_data"]:
            units = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.10 or so
            if units.get("avx512_bf16") or units.get("amx_bf16"):
                dtype = "bfloat16"  # the built-in run, in two minutes instead of four
    if dtype == "float16" and device.type != "cuda":
        raise InputError(
            "float16 needs a CUDA device, for its loss scaling: take bfloat16 or float32"
        )
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    return rank, world, device, getattr(torch, dtype)


def learning_rate_at(step, peak, warmup_steps, steps):
    """Linear warm-up, then cosine to 0: a pure function of the step."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return (
        peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
    )


# -----------------------------------------------------------------------------
# One step


def patches_to_keep(args, step, patches, rank, world, device):
    """Which patches this process looks at in a step, (B, K) indices, or None for all (FLIP, arXiv
    2212.00794). Drawn for the global batch, so that it depends on nothing but seed and step."""
    if not args.patch_dropout:
        return None
    generator = torch.Generator(device).manual_seed(args.seed * 1_000_003 + step)
    noise = torch.rand(args.batch_size, patches, generator=generator, device=device)
    keep = noise.argsort(dim=1)[:, : max(1, round(patches * (1 - args.patch_dropout)))]
    local = args.batch_size // world
    return keep[rank * local : (rank + 1) * local]


def forward_backward(model, images, tokens, label_tokens, keep, micro_batch_size, autocast, scaler):
    """Losses of a batch of B pairs (of this process), as a dict, with their gradients left in
    .grad.

    With a micro_batch_size m < B the gradients are the same, at the memory of m pairs (GradCache,
    arXiv 2101.06983): the contrastive loss needs all features at once, but the towers do not."""
    B, m = len(images), micro_batch_size or len(images)
    if m >= B:
        with autocast:
            out = model(images, tokens, label_tokens, keep)
        scaler.scale(out["loss"]).backward()
        return {name: out[name].detach() for name in ("contrastive_loss", "classification_loss")}

    token_weights = None
    if model.head is not None:  # the whole batch is counted before any of it is weighted
        model.count_tokens(label_tokens)
        token_weights = model.token_weights()
    parts = [slice(i, i + m) for i in range(0, B, m)]
    keeps = [None if keep is None else keep[p] for p in parts]
    # 1. All features, without a graph.
    with torch.no_grad(), autocast:
        pairs = [model.encode_pairs(images[p], tokens[p], keep=k) for p, k in zip(parts, keeps)]
    image_features = torch.cat([pair[0] for pair in pairs]).requires_grad_()
    text_features = torch.cat([pair[1] for pair in pairs]).requires_grad_()
    # 2. The contrastive loss, and its gradient at the features.
    contrastive = model.pair_loss(image_features, text_features)
    scaler.scale(contrastive).backward()
    # 3. Each part once more with a graph, its features pulled along those gradients.
    classification = 0
    for p, k in zip(parts, keeps):
        with autocast:
            image_part, text_part, word_loss = model.encode_pairs(
                images[p], tokens[p], label_tokens[p], token_weights, k
            )
        word_loss = word_loss * len(image_part) / B
        pull = (image_part * image_features.grad[p]).sum() + (
            text_part * text_features.grad[p]
        ).sum()
        (pull + scaler.scale(model.config.cls_weight * word_loss)).backward()
        classification = classification + word_loss.detach()
    return {"contrastive_loss": contrastive.detach(), "classification_loss": classification}


def average_gradients(model, world):
    """The mean of the processes' gradients is the gradient of the global batch's loss."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = parameters_to_vector(gradients)
    all_sum(flat)
    vector_to_parameters(flat / world, gradients)


def all_sum(tensor):
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# -----------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path, content):
    """Write a checkpoint whole or not at all: a temporary file, flushed to the disk, then renamed.
    The last.pt before becomes previous.pt. Returns whether it worked; a full disk leaves the old
    one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == "last.pt" and path.exists():
            os.replace(path, path.with_name("previous.pt"))
        os.replace(temporary, path)
        return True
    except (OSError, RuntimeError) as error:  # torch wraps some of the disk's errors
        temporary.unlink(missing_ok=True)
        tqdm.write(f"warning: {path} could not be written ({error}); the one before is untouched")
        return False


def weights_of(model, tokenizer, step):
    """What inference needs: best.pt holds this, and last.pt the rest as well."""
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    return {
        "model": state, "config": asdict(model.config), "vocab": tokenizer.vocab, "step": step
    }  # fmt: skip


def find_checkpoint(out_dir):
    """The newest checkpoint of a run that can be read, or None."""
    paths = [path for name in ("last.pt", "previous.pt") if (path := out_dir / name).exists()]
    for path in paths:
        try:
            return read_checkpoint(path)
        except InputError as error:
            print(f"warning: {error}", file=sys.stderr)
    if paths:
        raise InputError(
            f"no checkpoint in {out_dir} can be read ({', '.join(p.name for p in paths)}): start "
            "anew in another --out_dir, perhaps with --init_from its best.pt"
        )
    return None


# -----------------------------------------------------------------------------
# Watching


class Log:
    """log.jsonl: a header, then a row per logged step and per validation. Rank 0 writes it."""

    def __init__(self, path, header, step, seen, wandb_project):
        self.wandb = None
        if wandb_project:
            try:
                import wandb
            except ImportError:
                raise InputError("--wandb needs the package wandb: pip install wandb") from None
            self.wandb = wandb.init(project=wandb_project, config=header)
        rows = []
        if seen and path.exists():  # what was logged after the checkpoint will be logged again
            rows = [row for row in path.read_text().splitlines(True) if row.endswith("\n")]
            rows = [row for row in rows if json.loads(row).get("samples", math.inf) <= seen]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(rows))
        os.replace(temporary, path)  # killed in between, the old log is still there
        self.file = open(path, "a")
        self.write({"resumed" if seen else "header": header, "step": step, "samples": seen})

    def write(self, row):
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.wandb and not {"header", "resumed"} & row.keys():
            self.wandb.log({k: v for k, v in row.items() if k != "step"}, step=row.get("step"))


def git_commit():
    """The commit of this code, "" where there is no git."""
    command, here = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def header_of(args, steps, world, device, dtype, pairs, model):
    """What a reader of the log needs to believe it: arguments, versions, machine, commit, data."""
    fingerprint = hashlib.sha1(pairs.index.numpy().tobytes()).hexdigest()[:12]
    return {
        "arguments": vars(args),
        "model": args.init_from or args.model,
        "batch_size": args.batch_size,
        "steps": steps,
        "config": asdict(model.config),
        "samples": len(pairs),
        "data_fingerprint": fingerprint,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {platform.machine()}, {os.cpu_count()} cores",
        "dtype": str(dtype).removeprefix("torch."),
        "processes": world,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def make_profiler(args, out_dir, rank):
    """--profile: torch.profiler over steps 10 to 15, for chrome://tracing or ui.perfetto.dev."""
    if not args.profile or rank > 0:
        return SimpleNamespace(step=lambda: None)

    def write(profile):
        profile.export_chrome_trace(str(out_dir / "trace.json"))
        tqdm.write(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))

    schedule = torch.profiler.schedule(wait=9, warmup=1, active=5, repeat=1)
    profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=write)
    profiler.start()
    return profiler


def peak_memory_gb(device):
    """Of the device where it is a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def show_words(model, tokenizer, pairs, n=4):
    """The head's top words for the first images of the validation data, beside their captions."""
    images, texts = next(evaluation.batches(evaluation.ShardImages(pairs), n, 0, "words"))
    words = evaluation.top_words(model, tokenizer, images.to(next(model.parameters()).device))
    for number, (own, captions) in enumerate(zip(words, texts)):
        tqdm.write(f'  image {number}, captioned "{captions[0]}"')
        tqdm.write("    " + ", ".join(f"{word} {p:.2f}" for word, p, _ in own))


# -----------------------------------------------------------------------------
# Putting a run together


def make_model(args, tokenizer, checkpoint):
    """The arguments' model: new, from --init_from, or of the run to go on with."""
    changes = {"loss": args.loss, "cls_weight": args.cls_weight}
    for name in ("image_size", "context_length"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    torch.manual_seed(args.seed)
    if checkpoint:
        old = checkpoint["config"]
        if not args.init_from:
            changes = {**PRESETS[args.model], **changes}
        config = SuperCLIPConfig(**{**old, **changes})
        for name, value in asdict(config).items():
            # The weight of the word loss may change on the way; to have a head or none may not.
            same = bool(value) == bool(old[name]) if name == "cls_weight" else value == old[name]
            if not same:
                raise InputError(
                    f"--resume: the run in {args.out_dir} has {name} {old[name]}, not {value}"
                )
        model = SuperCLIP(config)
        model.load_state_dict(checkpoint["model"])
    elif args.init_from:
        model = SuperCLIP.from_pretrained(args.init_from, **changes)
        if model.config.vocab_size != tokenizer.vocab_size:
            raise InputError(
                f"{args.init_from} has a vocabulary of {model.config.vocab_size:,} tokens, --vocab "
                f"one of {tokenizer.vocab_size:,}: a model needs the one it was trained with"
            )
        vocab = read_checkpoint(args.init_from).get("vocab")  # of this project's own alone
        if vocab not in (None, tokenizer.vocab):
            raise InputError(
                f"{args.init_from} was trained with another vocabulary of that size: a token would "
                "mean another word"
            )
    else:
        changes["vocab_size"] = tokenizer.vocab_size
        model = SuperCLIP(SuperCLIPConfig.preset(args.model, **changes))
    for tower in (model.visual, model.text):
        tower.transformer.grad_checkpointing = args.grad_checkpointing
    return model


def make_optimizer(model, args, device):
    """AdamW; weight decay on matrices alone, not on biases, norms, class token and logit scale."""
    fused = device.type != "mps"  # one kernel for all parameters; on the CPU it is faster, too
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, args.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=fused)


class BadSamples:
    """Names each bad sample once, counts them, and ends the run when they are too many."""

    def __init__(self, pairs, max_bad, seen=()):
        self.unusable, self.total = len(pairs.bad), len(pairs) + len(pairs.bad)
        self.max_bad, self.seen = max_bad, set(seen)  # seen: numbers of samples found bad when read
        for shard, key, reason in pairs.bad[:20]:
            tqdm.write(f"skipped {shard}: {key}: {reason}")
        if self.unusable > 20:
            tqdm.write(f"skipped {self.unusable - 20:,} more: see python data.py show SHARDS")
        self.check()

    def __len__(self):
        return self.unusable + len(self.seen)

    def add(self, entries):
        for sample, shard, key, reason in entries:
            if sample not in self.seen:
                tqdm.write(f"skipped {shard}: {key}: {reason}")
                self.seen.add(sample)
                self.check()

    def share(self, world):
        """Make what each process has found known to all of them."""
        if world > 1:
            found = [None] * world
            dist.all_gather_object(found, self.seen)
            self.seen = set().union(*found)
            self.check()

    def check(self):
        share = len(self) / self.total
        if share > self.max_bad:
            raise InputError(
                f"{100 * share:.1f} % of the samples are bad, more than --max_bad {self.max_bad}"
            )


def stop_on_signals():
    """SIGINT and SIGTERM become a flag, so that a run saves and leaves; a second one ends it."""
    asked = threading.Event()

    def ask(number, _):
        asked.set()
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, ask)
        signal.signal(signal.SIGTERM, ask)
    return asked


def main(argv=None):
    args, given, checkpoint = parse(argv)
    rank, world, device, dtype = set_up(args)
    try:
        train(args, given, checkpoint, rank, world, device, dtype)
    except RuntimeError as error:  # which torch.OutOfMemoryError is, and the CPU's own message
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            now = args.micro_batch_size or args.batch_size // world
            raise InputError(
                f"out of memory: --micro_batch_size {max(1, now // 2)} gives the same in less; "
                "--grad_checkpointing, --patch_dropout and a smaller --model need less, too"
            ) from None
        raise
    finally:
        if world > 1:
            dist.destroy_process_group()


def train(args, given, checkpoint, rank, world, device, dtype):
    """A run from its first step, or from the checkpoint, to its last."""
    out_dir = Path(args.out_dir)
    taken = [name for name in ("last.pt", "log.jsonl") if (out_dir / name).exists()]
    if taken and not args.resume:
        raise InputError(
            f"{out_dir} holds a run: add --resume to go on with it, or name another --out_dir"
        )
    if args.batch_size % world:
        raise InputError(f"--batch_size {args.batch_size} is no multiple of {world} processes")

    # ---- data and model
    if args.train_data == BUILT_IN["train_data"] and rank == 0 and not Path("shapes").exists():
        from scripts.shapes import make_shapes

        make_shapes("shapes")
    if world > 1:
        dist.barrier()
    shards = data.expand(args.train_data)
    if checkpoint:
        tokenizer = data.Tokenizer(checkpoint["vocab"])
        changed = args.vocab and args.vocab != checkpoint["arguments"]["vocab"]
        if changed and data.find_tokenizer(args.vocab).vocab != checkpoint["vocab"]:
            raise InputError(
                f"--resume: the run in {out_dir} has another vocabulary than {args.vocab}"
            )
    else:
        tokenizer = data.find_tokenizer(args.vocab, shards)
    model = make_model(args, tokenizer, checkpoint).to(device).train()
    config = model.config
    tokenizer.context_length = config.context_length
    pairs = data.Pairs(
        shards, tokenizer, config.image_size, args.captions, args.label_captions, args.seed
    )
    val_pairs = None
    if args.val_data and rank == 0:
        source = args.val_captions or args.captions
        val_pairs = data.Pairs(data.expand(args.val_data), tokenizer, config.image_size, source)
    optimizer = make_optimizer(model, args, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if args.compile or (args.compile is None and device.type == "cuda"):
        model.encode_pairs = torch.compile(model.encode_pairs)

    # ---- where to start and to stop
    steps = args.steps or max(1, round(args.epochs * (len(pairs) // args.batch_size)))
    warmup_steps = args.warmup_steps if args.warmup_steps is not None else min(1000, steps // 10)
    eval_every = args.eval_every or max(1, min(2000, steps // 5))
    save_every = args.save_every or eval_every
    start, best, known_bad = 0, -1.0, ()
    if checkpoint:
        # Counted in samples, so that a run may go on with another batch size.
        start = checkpoint["samples_seen"] // args.batch_size
        best, known_bad = checkpoint["best"], checkpoint["bad_samples"]
        decay = [group["weight_decay"] for group in optimizer.param_groups]
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group, value in zip(optimizer.param_groups, decay):
            group["weight_decay"], group["fused"] = value, device.type != "mps"
        if checkpoint["scaler"]:  # a run in another precision has none
            scaler.load_state_dict(checkpoint["scaler"])
    if world > 1:  # weights are not sent around: each process reads them from the checkpoint
        starts = [None] * world
        dist.all_gather_object(starts, start)
        if len(set(starts)) > 1:
            raise InputError(f"--resume: the nodes do not see the same checkpoint in {out_dir}")
    bad = BadSamples(pairs, args.max_bad, known_bad)
    workers = args.workers if args.workers is not None else min(8, os.cpu_count() or 1)
    order = data.Batches(len(pairs), args.batch_size, args.seed, start, steps, rank, world)
    loader = iter(data.loader(pairs, order, workers, pin_memory=device.type == "cuda"))

    if rank == 0:
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to {out_dir}: {error.strerror}") from None
        header = header_of(args, steps, world, device, dtype, pairs, model)
        if checkpoint:
            before = checkpoint["arguments"]
            header["changed"] = {
                k: [before.get(k), v] for k, v in given.items() if v != before.get(k)
            }
            for name, (old, new) in header["changed"].items():
                tqdm.write(f"resuming with {name} {new} instead of {old}")
        seen = checkpoint["samples_seen"] if checkpoint else 0
        log = Log(out_dir / "log.jsonl", header, start, seen, args.wandb)
        tqdm.write(
            f"{header['model']}: {header['parameters']:,} parameters, "
            f"{tokenizer.vocab_size:,} tokens; {len(pairs):,} pairs; "
            f"steps {start:,} to {steps:,} of {args.batch_size} pairs; "
            f"{header['device']}, {header['dtype']}"
        )
    stop = stop_on_signals()
    patches = (config.image_size // config.patch_size) ** 2
    if device.type == "cpu" and patches < 100:
        # It governs the CPU too, whose flash kernel is 1.4 times slower for so few tokens.
        torch.backends.cuda.enable_flash_sdp(False)
    bar = tqdm(total=steps, initial=start, unit="step", disable=rank > 0 or not sys.stderr.isatty())
    profiler = make_profiler(args, out_dir, rank)
    step, clock, waited, logged, result = start, time.perf_counter(), 0.0, start, None

    while step < steps:
        # 1. the batch
        asked = time.perf_counter()
        batch = next(loader)
        waited += time.perf_counter() - asked
        bad.add(batch["bad"])
        images, tokens, label_tokens = (
            batch[name].to(device, non_blocking=True)
            for name in ("images", "tokens", "label_tokens")
        )
        # 2. gradients
        optimizer.zero_grad(set_to_none=True)
        keep = patches_to_keep(args, step, patches, rank, world, device)
        losses = forward_backward(
            model, images, tokens, label_tokens, keep, args.micro_batch_size, autocast, scaler
        )
        if world > 1:
            average_gradients(model, world)
        # 3. the update
        learning_rate = learning_rate_at(step, args.learning_rate, warmup_steps, steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # CLIP's bounds: a larger scale is unstable
        step += 1
        bar.update()
        profiler.step()
        # 4. is there anything to do but train?
        log_due, eval_due, save_due = (
            step % every == 0 or step == steps for every in (args.log_every, eval_every, save_every)
        )
        leave = stop.is_set()
        if world > 1:  # all must leave at the same step, so they ask each other when they log
            leave = log_due and bool(all_sum(torch.tensor(float(leave), device=device)))
        if not (log_due or eval_due or save_due or leave):
            continue
        # 5. the log; reading the losses waits for the device, so it is not done at every step
        bad.share(world)
        values = torch.stack([losses["contrastive_loss"], losses["classification_loss"]])
        contrastive, classification = all_sum(values / world).tolist()
        row = {
            "step": step,
            "samples": step * args.batch_size,
            "epoch": round(step * args.batch_size / len(pairs), 4),
            "loss": contrastive + config.cls_weight * classification,
            "contrastive_loss": contrastive,
            "classification_loss": classification,
            "logit_scale": model.logit_scale.exp().item(),
            "grad_norm": grad_norm.item(),
            "learning_rate": learning_rate,
            "bad_samples": len(bad),
        }
        # float16's scaler skips steps of infinite gradients
        finite = math.isfinite(row["grad_norm"]) or scaler.is_enabled()
        if not (finite and math.isfinite(row["loss"])):
            raise InputError(
                f"loss {row['loss']}, gradient norm {row['grad_norm']} at step {step}; what "
                f"{out_dir} holds is from before. Lower --learning_rate, longer --warmup_steps, "
                "--dtype bfloat16 or float32 may help; then --resume"
            )
        if log_due and rank == 0:
            seconds = time.perf_counter() - clock
            row["images_per_second"] = round((step - logged) * args.batch_size / seconds, 1)
            row["data_wait"] = round(waited / seconds, 3)
            row["memory_gb"] = round(peak_memory_gb(device), 2)
            log.write(row)
            bar.set_postfix_str(
                f"contrastive {contrastive:.3f}, words {classification:.3f}, "
                f"{row['images_per_second']:.0f} img/s"
            )
            if bar.disable:  # no terminal: plain lines
                print(
                    f"step {step:6d}  {bar.postfix}, data wait {row['data_wait']:.0%}", flush=True
                )
            clock, waited, logged = time.perf_counter(), 0.0, step
        # 6. validation
        if eval_due and val_pairs:
            paused = time.perf_counter()
            with autocast:
                result = validate(model, tokenizer, val_pairs, step, workers)
            score = evaluation.mean_r1(result)
            samples = {"step": step, "samples": step * args.batch_size}
            log.write({**samples, "validation": result, "mean_r1": score})
            if score > best:
                best = score
                save_checkpoint(out_dir / "best.pt", weights_of(model, tokenizer, step))
            clock += time.perf_counter() - paused
        # 7. the checkpoint
        if (save_due or leave) and rank == 0:
            content = weights_of(model, tokenizer, step) | {
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "arguments": given,
                "samples_seen": step * args.batch_size,
                "best": best,
                "bad_samples": sorted(bad.seen),
            }
            save_checkpoint(out_dir / "last.pt", content)
        if leave:
            break
        if world > 1 and eval_due:
            dist.barrier()

    bar.close()
    if rank > 0:
        return
    if step < steps:
        print(f"stopped after step {step}. To go on: python train.py --out_dir {out_dir} --resume")
        return
    with autocast:
        if result is None and val_pairs:  # a run that had ended already was resumed
            result = validate(model, tokenizer, val_pairs, step, workers)
        summary(model, tokenizer, args, result, best, out_dir, log)


def validate(model, tokenizer, val_pairs, step, workers):
    """Retrieval among the validation pairs, and what the head sees in the first four, printed."""
    model.eval()
    result = evaluation.retrieval(*evaluation.encode_pairs(model, val_pairs, workers=workers))
    value = evaluation.mean_r1(result)
    tqdm.write(
        f"step {step:6d}  validation: mean R@1 {100 * value:.1f} % of {len(val_pairs):,} pairs"
    )
    if model.head is not None:
        show_words(model, tokenizer, val_pairs)
    model.train()
    return result


def summary(model, tokenizer, args, result, best_r1, out_dir, log):
    """What the run has reached, beside what chance would give; and what to do next."""
    model.eval()
    row = {"retrieval": result}
    if result:
        print("\nretrieval among the validation pairs")
        evaluation.print_retrieval(result)
    for folder in args.zeroshot_data or []:
        dataset, classes = evaluation.class_folders(folder, model.config.image_size)
        top1 = evaluation.zeroshot(model, tokenizer, dataset, classes)["top1"]
        row[f"zeroshot {folder}"] = top1
        print(evaluation.line(f"zero-shot {Path(folder).name}", top1))
    log.write({"final": row})
    best = out_dir / ("best.pt" if (out_dir / "best.pt").exists() else "last.pt")
    if result and evaluation.mean_r1(result) < best_r1:
        print(
            f"\nThese are scores of the last step, in {out_dir / 'last.pt'}. Validation was best "
            f"before, mean R@1 {100 * best_r1:.1f} %: {best} is of then."
        )
    print(f"\nThe model is in {best}. What it sees, and where, in a picture of your own:")
    print(f"  python eval.py words --checkpoint {best} --image FILE --out words.png")


if __name__ == "__main__":
    data.cli(main)
