"""Train CLIP with SuperCLIP's word head, on one CPU or GPU, or with torchrun on many.

    python train.py                       built-in scenes, minutes on a laptop
    python train.py --batch_size 256 --train_data 'cc3m/*.tar' --model ViT-B-16
    torchrun --nproc_per_node 8 train.py --batch_size 4096 --train_data 'cc3m/*.tar'

The file reads from top to bottom: the options, the processes and the device, one step, the parts of
a run, and the run. What a run prints and logs is in scripts/log.py.

Apart from weights, counts and optimizer state, what a step needs is a function of the options and
the step number: the batch, its crops, the dropped patches, the learning rate. So a checkpoint needs
no state of a random generator, and a run that was killed and resumed ends with the same bits as one
that was not. (That holds on a CPU. Some CUDA kernels add numbers in no fixed order.)

Axes are those of superclip.py: B pairs of this process, N pairs of all processes together, P
patches (K of them kept), E embedding. `rows` is the slice of the N pairs that are this process's.
"""

import argparse
import fcntl
import math
import os
import tempfile
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import eval as evaluation
from scripts.log import Log, describe_run, fingerprint, summary, validate
from scripts.scenes import TRAIN_DATA, built_in, make_scenes
from scripts.stop import Stop, all_sum
from superclip import PRESETS, SuperCLIP, SuperCLIPConfig, check, cli, number

# -----------------------------------------------------------------------------
# Options

# What argparse needs to know of an option: the range of a number, or its kind.
COUNT, ZERO_OR_MORE = {"type": number(int, 1)}, {"type": number(int, 0)}
NOT_NEGATIVE = {"type": number(float, 0)}
SEVERAL, FLAG = {"nargs": "+"}, {"action": argparse.BooleanOptionalAction}  # --name, --no-name
DTYPES = "float32", "bfloat16", "float16"
# Each option has a name, a placeholder for --help, one of these, a default, and a help text. If the
# default is None, the option is off, or DEFAULTS, built_in() or train() sets it.
# fmt: off
OPTIONS = (
    # the data
    ("train_data", "SHARDS", SEVERAL, None, "tar shards: paths, folders, globs, {0000..0575}"),
    ("val_data", "SHARDS", SEVERAL, None, "the same, or none (default: hold out 1 pair in 100)"),
    ("zeroshot_data", "DIR", SEVERAL, None, "folders of class folders, scored like val_data"),
    ("captions", "SOURCE", SEVERAL, None, "sources of the captions: txt (default) or json.FIELD"),
    ("label_captions", "SOURCE", SEVERAL, None, "sources of the word labels (default: --captions)"),
    ("val_captions", "SOURCE", SEVERAL, None, "sources for val_data (default: --captions)"),
    ("vocab", "FILE", {}, None, "or clip (default: vocab.tiktoken beside the shards, or clip)"),
    ("workers", "N", ZERO_OR_MORE, None, "loading processes per GPU (default: its share of cores)"),
    # the model
    ("model", None, {"choices": PRESETS}, None, "preset (default ViT-B-16)"),
    ("image_size", "PIXELS", COUNT, None, "side of the square input (default: the model's)"),
    ("context_length", "TOKENS", {"type": number(int, 3)}, None, "tokens that the text tower sees"),
    ("init_from", "FILE", {}, None, "checkpoint to take the model and vocabulary from"),
    ("cls_weight", "LAMBDA", NOT_NEGATIVE, 1.0, "weight of the word loss; 0 is plain CLIP"),
    ("loss", None, {"choices": ("softmax", "sigmoid")}, None, "CLIP's (default) or SigLIP's"),
    # the training
    ("steps", "N", COUNT, None, "updates in all (default: from --epochs)"),
    ("epochs", "N", {"type": number(float, 1e-6)}, None, "passes over the data (default 30)"),
    ("batch_size", "PAIRS", COUNT, None, "pairs per update, of all processes (default 256)"),
    ("micro_batch_size", "PAIRS", COUNT, None, "pairs in memory at a time (default: all of them)"),
    ("learning_rate", "LR", NOT_NEGATIVE, None, "peak (default 5e-4; with --init_from 5e-5)"),
    ("head_learning_rate", "LR", NOT_NEGATIVE, None, "of the head (default: the same; new: 5e-4)"),
    ("warmup_steps", "N", ZERO_OR_MORE, None, "linear warm-up (default: steps / 10, at most 1000)"),
    ("weight_decay", "W", NOT_NEGATIVE, None, "AdamW's decay of the weight matrices (default 0.2)"),
    ("patch_dropout", "SHARE", {"type": number(float, 0, 0.99)}, 0.0, "of patches to drop (FLIP)"),
    ("seed", "N", {"type": number(int, 0, 2**31)}, 0, "of weights, order, crops, dropout"),
    # the machine
    ("device", "NAME", {}, None, "cuda, mps or cpu (default: the first there is)"),
    ("dtype", None, {"choices": DTYPES}, None, "of autocast (default: what suits the device)"),
    ("compile", None, FLAG, None, "torch.compile the towers (default: on CUDA)"),
    ("grad_checkpointing", None, FLAG, False, "less memory, a third slower"),
    # the run
    ("out_dir", "DIR", {}, "out", "folder for checkpoints and log.jsonl"),
    ("resume", None, FLAG, False, "continue the run in out_dir with its saved options"),
    ("log_every", "STEPS", COUNT, None, "between log rows (default: steps / 20, at most 50)"),
    ("eval_every", "STEPS", COUNT, None, "between validations (default: steps / 5, at most 2000)"),
    ("save_every", "STEPS", COUNT, None, "between saves of last.pt (default: --eval_every)"),
    ("wandb", "PROJECT", {}, None, "log to Weights & Biases, too (needs the package wandb)"),
)
# Without --train_data, built_in() of scripts/scenes.py takes precedence: options that were chosen
# together with the built-in data.
DEFAULTS = dict(captions=["txt"], epochs=30.0, batch_size=256, learning_rate=5e-4, weight_decay=0.2)
GENTLE = dict(learning_rate=5e-5)  # --init_from: a tenth, or the old knowledge would be lost
# fmt: on
# Options that a checkpoint fixes for --resume and --init_from.
FIXED = ("model", "vocab", "loss", "image_size", "context_length")


def say(text):
    """Print, in the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def make_parser():
    parser = argparse.ArgumentParser(
        usage="python train.py [options]   (--help explains them)",  # not a list of all options
        description=__doc__.partition("\n")[0],
        epilog="Without --train_data: the built-in scenes, with defaults that a run prints.",
        allow_abbrev=False,  # a typo should not become another option
    )
    for name, placeholder, kind, default, text in OPTIONS:
        text += f" (default {default})" if default else ""
        kind = kind | ({"metavar": placeholder} if placeholder else {})
        parser.add_argument(f"--{name}", default=default, help=text, **kind)
    return parser


def parse(argv):
    """-> (options with all defaults filled in, checkpoint to resume or None). Raises InputError."""
    parser, saved = make_parser(), None
    args = parser.parse_args(argv)
    # A resumed run gets its options from the checkpoint, except for those that are given again.
    last = Path(args.out_dir) / "last.pt"
    if args.resume and not last.exists():  # killed before it could save anything
        say(f"there is no {last}: a new run starts")
    elif args.resume:
        saved = evaluation.read_checkpoint(last)
        check("optimizer" in saved, f"{last} cannot be resumed: it holds weights only")
        # A new length replaces the old one, whichever of the two options gave it.
        length = {"steps": None, "epochs": None} if args.steps or args.epochs else {}
        parser.set_defaults(**{**saved["arguments"], "out_dir": args.out_dir, **length})
        args = parser.parse_args(argv)
        for name in (*FIXED, "init_from", "cls_weight", "weight_decay"):
            old, new = saved["arguments"][name], getattr(args, name)
            check(old == new, f"--resume cannot change --{name} from {old} to {new}")
    check(not (args.steps and args.epochs), "give --steps or --epochs, not both")
    for name in FIXED if args.init_from and not saved else ():
        check(getattr(args, name) is None, f"--init_from sets the {name}: leave --{name} out")
    chosen = {**DEFAULTS, **({} if args.train_data else built_in(args.batch_size))}
    chosen |= GENTLE if args.init_from else {}
    needless = {"epochs": args.steps, "model": args.init_from}  # they say it already
    chosen = {k: v for k, v in chosen.items() if getattr(args, k) is None and not needless.get(k)}
    vars(args).update(chosen)
    if chosen:
        texts = (f"--{k} {' '.join(v) if isinstance(v, list) else v}" for k, v in chosen.items())
        say(f"defaults: {' '.join(texts)}")
    return args, saved


# -----------------------------------------------------------------------------
# Processes and the device


def set_up(args):
    """-> rank, number of processes, device, dtype. Under torchrun every process has its own GPU."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and args.device in (None, "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # first, or all would use GPU 0
    device = evaluation.pick_device(args.device)
    if world > 1:
        # CPU tensors travel by gloo, so that processes can agree on something without waiting for
        # their GPUs. Two hours, because all others wait while rank 0 validates.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    dtype = args.dtype or "float32"
    if args.dtype is None and device.type == "cuda":
        # Ampere, compute capability 8, is the first with bfloat16 units. float16 on older GPUs has
        # a small range, which the loss scaler of train() makes up for.
        dtype = "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"
    elif args.dtype is None and args.train_data == TRAIN_DATA:
        units = getattr(torch.cpu, "get_capabilities", dict)()  # older torch has none
        if units.get("avx512_bf16") or units.get("amx_bf16"):
            dtype = "bfloat16"  # the built-in run takes half the time
    return rank, world, device, getattr(torch, dtype)


def gather(features):
    """(B, E) on each process -> (N, E) on all of them, in rank order. Without gradients: the step
    works on copies of the features anyway."""
    if not dist.is_initialized():
        return features
    everyone = features.new_empty(dist.get_world_size() * len(features), features.shape[1])
    dist.all_gather(list(everyone.chunk(dist.get_world_size())), features)
    return everyone


# -----------------------------------------------------------------------------
# One step


def learning_rate_at(step, peak, warmup_steps, steps):
    """Linear warm-up to `peak`, then cosine to 0: a pure function of the step, so that a resumed
    run needs no scheduler. Early steps are small because Adam's second moments are still noise."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def patches_to_keep(args, step, patches, rows, device):
    """The patches that this process looks at in a step (FLIP, arXiv 2212.00794): indices (B, K), or
    None for all. The choice is random for each image. It is made for the global batch, so that it
    does not depend on the number of processes."""
    if not args.patch_dropout:
        return None
    generator = torch.Generator(device).manual_seed(args.seed * 1_000_003 + step)
    noise = torch.rand(args.batch_size, patches, generator=generator, device=device)  # (N, P)
    # The first K of a random permutation of all patches.
    return noise.argsort(dim=1)[rows, : max(1, round(patches * (1 - args.patch_dropout)))]


class Towers(nn.Module):
    """The part of the model that looks at each pair alone, as a module: DistributedDataParallel
    wraps modules, and averages their gradients over the processes during the backward pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model.features_and_word_loss(*inputs)


def forward_backward(towers, model, parts, keep, rows, autocast, scaler):
    """The losses of this process's pairs, as a dict. The gradient of the global batch's loss is
    left in .grad.

    parts: the batch as one micro-batch or several, dicts of images, tokens and label_tokens; keep:
    patches_to_keep; rows: where these pairs lie in the global batch; scaler: for float16.

    The contrastive loss needs all features at once, but the towers do not. So the loss is computed
    on copies of the features. Then each micro-batch runs alone and backpropagates the gradient of
    its copies (GradCache, arXiv 2101.06983). By the chain rule d loss / d weights is the sum over
    micro-batches of d loss / d features * d features / d weights. With several micro-batches the
    towers run forward twice, which takes a third more time, and need the memory of one.
    """
    for part in parts:  # the whole batch is counted before any of it is weighted
        model.count_tokens(part["label_tokens"])
    token_weights = model.token_weights()
    sizes = [len(part["images"]) for part in parts]
    keeps = [None] * len(parts) if keep is None else keep.split(sizes)

    def run_towers(part, keep):
        with autocast:
            inputs = part["images"], part["tokens"], part["label_tokens"]
            return towers(*inputs, token_weights, keep)

    # 1. The features. A batch in one part keeps its graph and needs no second run.
    with torch.set_grad_enabled(len(parts) == 1):
        outputs = [run_towers(*inputs) for inputs in zip(parts, keeps)]
    # 2. The contrastive loss, and its gradient at copies of all that it depends on: the features
    # of all processes (N, E), and the scale and bias of the logits.
    images = gather(torch.cat([image.detach() for image, _, _ in outputs])).requires_grad_()
    texts = gather(torch.cat([text.detach() for _, text, _ in outputs])).requires_grad_()
    scalars = model.logit_scale, model.logit_bias  # the bias is None in CLIP's own loss
    scale, bias = (p if p is None else p.detach().requires_grad_() for p in scalars)
    contrastive = model.pair_loss(images, texts, scale, bias, rows)
    scaler.scale(contrastive).backward()
    # Each process has the gradient of its own rows' loss. The sum is the whole.
    image_grad, text_grad = (all_sum(x.grad)[rows].split(sizes) for x in (images, texts))
    # 3. The same gradient at the parameters. Only the last part's backward pass is synchronised.
    classification = 0
    for i, inputs in enumerate(zip(parts, keeps)):
        last = i == len(parts) - 1
        # no_sync: DistributedDataParallel adds up the gradients of the earlier parts locally.
        with nullcontext() if last or not dist.is_initialized() else towers.no_sync():
            image, text, word_loss = outputs[0] if len(parts) == 1 else run_towers(*inputs)
            word_loss = word_loss * len(image) / sum(sizes)  # its share of the mean over B pairs
            surrogate = (image * image_grad[i]).sum() + (text * text_grad[i]).sum()
            if last:  # the scale and the bias, too, or their gradients would not be averaged
                copies = zip(scalars, (scale, bias))
                surrogate = surrogate + sum(p * copy.grad for p, copy in copies if p is not None)
            (surrogate + scaler.scale(model.config.cls_weight * word_loss)).backward()
        classification = classification + word_loss.detach()
    return {"contrastive_loss": contrastive.detach(), "classification_loss": classification}


def update(model, optimizer, scaler, learning_rate, head_learning_rate):
    """One step of the optimizer. Returns the norm of the gradient before it was clipped to 1."""
    for group in optimizer.param_groups:
        group["lr"] = head_learning_rate if group["in_head"] else learning_rate
    scaler.unscale_(optimizer)  # float16's gradients were scaled up, or small ones would be 0
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))  # CLIP's bounds: a larger scale is unstable
    return grad_norm


# -----------------------------------------------------------------------------
# The parts of a run


def make_model(args, start_from, tokenizer, device):
    """A new model, or that of a checkpoint (--resume, --init_from). A word head that the checkpoint
    does not have starts from random weights."""
    base = start_from["config"] if start_from else PRESETS[args.model or "ViT-B-16"]
    names = ("image_size", "context_length", "loss", "cls_weight")
    changes = {name: value for name in names if (value := getattr(args, name)) is not None}
    torch.manual_seed(args.seed)  # the same initial weights on every process and machine
    model = SuperCLIP(SuperCLIPConfig(**{**base, "vocab_size": tokenizer.vocab_size, **changes}))
    if start_from:
        new = model.state_dict()  # the checkpoint may have no head, or one that is not wanted now
        loaded = {name: x for name, x in start_from["model"].items() if name in new}
        model.load_state_dict({**new, **loaded})
        if new.keys() > loaded.keys():
            if args.head_learning_rate is None:
                args.head_learning_rate = DEFAULTS["learning_rate"]
            rate = f"its learning rate is {args.head_learning_rate:g}"
            say(f"the checkpoint has no word head: it starts from random weights, and {rate}")
    if device.type == "cpu" and model.visual.grid < 10:
        # Despite its name this governs the CPU, too. Its flash kernel is slow for so few tokens.
        torch.backends.cuda.enable_flash_sdp(False)
    for tower in (model.visual, model.text):
        tower.transformer.grad_checkpointing = args.grad_checkpointing
    cuda = device.type == "cuda"
    if cuda and torch.cuda.get_device_capability(device) < (7, 0) and args.compile is not False:
        say("this GPU is too old for torch.compile: the run goes without it")
    elif args.compile or (cuda and args.compile is None):
        # Older torch cannot split what it compiles where recomputation begins.
        torch._dynamo.config.optimize_ddp = not args.grad_checkpointing
        # One by one, so that captions of another length do not recompile the image tower.
        model.visual.compile()
        model.text.compile()
        model.word_loss, model.pair_loss = map(torch.compile, (model.word_loss, model.pair_loss))
    tokenizer.context_length = model.config.context_length
    return model.to(device).train()


def open_data(args, shards, tokenizer, image_size, rank):
    """-> training pairs, and on rank 0 validation pairs if there are any. Raises InputError if
    anything is wrong with the data, before the run starts."""
    pairs = data.Pairs(shards, tokenizer, image_size, args.captions, args.label_captions, args.seed)
    for folder in args.zeroshot_data or ():
        evaluation.ClassFolders(folder, image_size)  # it is scored later, but checked now
    val_pairs, val_captions = None, args.val_captions or args.captions
    if args.val_data is None and len(pairs) >= 200:
        held_out = torch.arange(len(pairs)) % max(100, math.ceil(len(pairs) / 1000)) == 0
        val_pairs = data.Pairs(shards, tokenizer, image_size, val_captions)
        pairs.index, val_pairs.index = pairs.index[~held_out], pairs.index[held_out]
        say(f"{len(val_pairs):,} pairs are held out for validation: see --val_data")
    elif args.val_data not in (None, ["none"]) and rank == 0:
        val_shards = data.expand(args.val_data)
        both = {*map(os.path.realpath, shards)} & {*map(os.path.realpath, val_shards)}
        check(not both, f"training and validation data share {' '.join(sorted(both)[:1])}")
        val_pairs = data.Pairs(val_shards, tokenizer, image_size, val_captions)
    check(args.batch_size <= len(pairs), f"--batch_size is more than the {len(pairs):,} pairs")
    if val_pairs and rank == 0:
        next(evaluation.batches(evaluation.ShardImages(val_pairs), 4, 0, "checking"))
    return pairs, val_pairs if rank == 0 else None


def make_optimizer(model, args):
    """AdamW. Weight decay is for matrices only: not for biases, norms, class token, logit scale.
    The word head is apart, because it may have a learning rate of its own."""
    groups = {}
    for name, p in model.named_parameters():
        groups.setdefault((name.startswith("head."), p.ndim >= 2), []).append(p)
    groups = [
        {"params": parameters, "in_head": in_head, "weight_decay": args.weight_decay * is_matrix}
        for (in_head, is_matrix), parameters in groups.items()
    ]
    # The betas and eps of CLIP and SuperCLIP. fused: one kernel for all parameters, on a CPU, too.
    return torch.optim.AdamW(groups, args.learning_rate, (0.9, 0.98), 1e-6, fused=True)


def save(path, model, tokenizer, **more):
    """Write a checkpoint: what inference needs, and in last.pt also what resuming needs. Returns
    whether that worked. If not, as on a full disk, the one before is still there and the run goes
    on."""
    state = {name: value.cpu() for name, value in model.state_dict().items()}  # loads anywhere
    content = {"model": state, "config": vars(model.config), "vocab": tokenizer.vocab, **more}
    try:
        data.write_file(path, lambda file: torch.save(content, file))
        return True
    except (OSError, RuntimeError) as error:  # torch wraps some of the disk's errors
        tqdm.write(f"warning: cannot write {path}: {error}")
        return False


# -----------------------------------------------------------------------------
# The run


def train(args, saved, rank, world, device, dtype):
    """A run from its first step, or from a checkpoint, to its last."""
    out_dir, local = Path(args.out_dir), args.batch_size // world
    check(args.batch_size % world == 0, f"--batch_size is not divisible by {world} processes")
    # What the run is made of: data, model, optimizer
    start_from = saved or (evaluation.read_checkpoint(args.init_from) if args.init_from else None)
    shards = data.expand(args.train_data)
    if start_from:
        tokenizer = data.Tokenizer(start_from["vocab"])
    else:
        tokenizer = data.Tokenizer.from_file(args.vocab or data.vocabulary_beside(shards))
    model = make_model(args, start_from, tokenizer, device)
    pairs, val_pairs = open_data(args, shards, tokenizer, model.config.image_size, rank)
    head_rate = args.learning_rate if args.head_learning_rate is None else args.head_learning_rate
    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    towers = Towers(model)
    if world > 1:  # gradients live in the buckets that are sent, or they would be stored twice
        towers = DistributedDataParallel(towers, gradient_as_bucket_view=True)

    # Where the run starts and ends. By default it validates five times, and more often if it is
    # long. A run that is resumed may have other options than before, but the same data.
    steps = args.steps or max(1, round(args.epochs * (len(pairs) // args.batch_size)))
    warmup_steps = min(1000, steps // 10) if args.warmup_steps is None else args.warmup_steps
    log_every = args.log_every or max(1, min(50, steps // 20))
    eval_every = args.eval_every or max(1, min(2000, steps // 5))
    save_every = args.save_every or eval_every
    fingerprints = [fingerprint(pairs), fingerprint(val_pairs)]
    step, best, validation, is_saved = 0, -1.0, None, True
    if saved:
        same = saved["data_fingerprints"][0] == fingerprints[0]
        check(same, f"the training data is not that of the run in {out_dir}: start a new run")
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"] or scaler.state_dict())  # empty without float16
        # Counted in samples, so that a run may go on with another batch size.
        step = saved["samples"] // args.batch_size
        if saved["data_fingerprints"] == fingerprints:  # else the old best score is not comparable
            best = saved["best"]
    if start_from:
        start_from.clear()  # its tensors are copied, and would take as much memory as the model
    rows, micro = slice(rank * local, (rank + 1) * local), args.micro_batch_size or local
    order = data.micro_batches(len(pairs), args.batch_size, rows, micro, args.seed, step, steps)
    batches = data.load_batches(pairs, order, micro, args.workers, device)
    about = describe_run(args, steps, world, device, dtype, pairs, model)
    log, stop = Log(args, rank, step, about, pairs.unused), Stop()

    if args.init_from and step == 0 and val_pairs:  # the start counts, too: training may harm it
        validation = stop.unless_asked(validate, model, val_pairs, args, log, step)
        if validation and save(out_dir / "best.pt", model, tokenizer, step=step):
            best = validation["mean_r1"]
    leave = stop.agreed()
    while step < steps and not leave:
        # 1. the batch: this process's rows of it, in one micro-batch or several
        parts = log.wait_for(batches, math.ceil(local / micro))
        # 2. its gradient
        keep = patches_to_keep(args, step, model.visual.grid**2, rows, device)
        losses = forward_backward(towers, model, parts, keep, rows, autocast, scaler)
        # 3. the update
        of_peak = learning_rate_at(step, 1.0, warmup_steps, steps)
        rates = of_peak * args.learning_rate, of_peak * head_rate
        grad_norm = update(model, optimizer, scaler, *rates)
        step += 1
        # 4. what is due after this step; at the last step, everything is
        log_due, eval_due, save_due = (
            step % every == 0 or step == steps for every in (log_every, eval_every, save_every)
        )
        numbers = step, losses, grad_norm, rates[0], model
        # 5. the log: reading the losses waits for the device, so most steps go without. It comes
        # before a validation, because it raises if the loss is not finite.
        if log_due or eval_due:
            log.write(log.measure(*numbers))
        # 6. validation, on rank 0; the others wait for it in stop.agreed()
        if eval_due and val_pairs:
            validation = stop.unless_asked(validate, model, val_pairs, args, log, step)
            better = validation and validation["mean_r1"] >= best
            if better and save(out_dir / "best.pt", model, tokenizer, step=step):
                best = validation["mean_r1"]
        # 7. the checkpoint, from which the run can be resumed
        leave = stop.agreed()
        if save_due or leave:
            log.measure(*numbers)  # raises if the loss is not finite: the old checkpoint is better
            content = {"step": step, "samples": step * args.batch_size, "best": best}
            content |= {"arguments": vars(args), "data_fingerprints": fingerprints}
            content |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            is_saved = rank > 0 or save(out_dir / "last.pt", model, tokenizer, **content)

    log.bar.close()
    check(is_saved, f"stopped after step {step}, and {out_dir / 'last.pt'} could not be written")
    if leave:
        say(f"stopped after step {step}. To go on, give the same command with --resume")
    elif rank == 0:
        summary(model, tokenizer, args, val_pairs, validation, best, log, step)


def main(argv):
    args, saved = parse(argv)
    # Drawing and indexing start processes, so they come before CUDA does. On each machine the first
    # process does the work, while the others wait for the lock and find it done.
    with open(Path(tempfile.gettempdir(), f"superclip-{os.getuid()}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if args.train_data == TRAIN_DATA and not Path("scenes").exists():
            make_scenes("scenes")
        for patterns in (args.train_data, args.val_data):
            if patterns not in (None, ["none"]):
                data.build_index(data.expand(patterns))
    try:
        train(args, saved, *set_up(args))
    except RuntimeError as error:  # torch has no classes for these errors, so their text must tell
        text = str(error)
        check("by peer" not in text, "stopped because another process has ended")
        check("DataLoader worker (" not in text, "a loading process has died: see --workers")
        check(" compiler" not in text, "torch.compile needs a C++ compiler: --no-compile")
        memory = "out of memory" in text or "allocate memory" in text
        check(not memory, "out of memory: a smaller --micro_batch_size needs less")
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main)
