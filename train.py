"""Train CLIP with SuperCLIP's word head, on one CPU or GPU, or with torchrun on many.

    python train.py                       built-in scenes, one to two minutes on two cores
    python train.py --batch_size 256 --train_data cc3m/ --model ViT-B-16
    torchrun --nproc_per_node 8 train.py --batch_size 4096 --train_data cc3m/ --model ViT-B-16

The most important comes first: the run with its loop, then the parts of a step, the parts of the
set-up, and the options. Read superclip.py before this file.

last.pt holds weights, token counts, optimizer and loss scaler. Everything else that a step needs
follows from the options and the number of the step: the batch, its crops, the patches that are
kept, the learning rate. So no state of a random generator is saved, and on a CPU a run that was
killed and resumed ends with the same bits as a run that was not. On a GPU it may not, because some
CUDA kernels add numbers in no fixed order.

common/run_folder.py saves, resumes and logs. You need not open it, nor the rest of common/.

Axes: N pairs of all processes, B pairs of this process.
"""

import argparse
import math
import os
import sys
import time
import warnings
from dataclasses import fields

# Let a waiting thread sleep after a thousand rounds. GNU's OpenMP would let it spin for so long
# that beside another busy program a run would hardly advance. torch reads this at its import.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import eval as evaluation
from common import cli
from common.checkpoint import DIVERGED, read_model
from common.cli import check, number, run_command
from common.distributed import RANK, WORLD, joined_processes, one_first, prepare_device
from common.index import shards_of_run
from common.machine import can_compile, pick_dtype
from common.run_folder import RunFolder, header_of, names_of
from common.scenes import find_or_make_scenes
from common.tokenizer import tokenizer_for
from superclip import PRESETS, SuperCLIP, SuperCLIPConfig

warnings.filterwarnings("ignore", "`broadcast_buffers`")  # newer versions of torch rename it

# -----------------------------------------------------------------------------
# The run


def train(args):
    """Train from the first step, or from the last.pt of --resume."""
    N = args.batch_size
    B = N // WORLD
    device = prepare_device(args.device)
    on_gpu = device.type == "cuda"
    dtype = args.dtype or pick_dtype(device)
    autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    with one_first():  # the first process draws, indexes and downloads for all
        if args.train_data == SCENE_OPTIONS["train_data"]:  # see the end of this file
            find_or_make_scenes("scenes")
        shards, val_shards = shards_of_run(args.train_data, args.val_data)
        model, tokenizer, new_parameters = build_model(args, shards, device)
        pairs, val_samples = open_data(args, shards, val_shards, model, tokenizer)
    optimizer = make_optimizer(model, args.learning_rate, args.weight_decay, new_parameters)
    steps, warmup_steps, eval_every = count_steps(args, len(pairs))
    # The header is the first row of the log. RunFolder makes the folder, or loads last.pt into the
    # model, the optimizer and the scaler.
    header = header_of(args, steps, eval_every, model, pairs, val_samples, dtype, device)
    run = RunFolder(args, header, model, tokenizer, optimizer, scaler)
    start = run.start  # the step of last.pt if the run is resumed, else 0
    ddp_model = distribute(model) if WORLD > 1 else model
    local = slice(RANK * B, (RANK + 1) * B)  # the part of a batch that this process trains on
    batches = data.load_batches(pairs, N, local, start, steps, args.workers, on_gpu)

    seen, seconds, waited = 0, 0.0, 0.0  # pairs and times since the last row of the log
    todo = range(start, steps + 1)  # the round after the last step only saves and validates
    no_bar = True if RANK > 0 else None  # None means: a bar on a terminal only
    for step in tqdm(todo, total=steps, initial=start, unit="step", disable=no_bar):
        # 1. Save last.pt every ten minutes (RunFolder has the clock), and before a validation,
        # because that can take minutes, too. best.pt is written if the mean R@1 of both ways is at
        # least the best so far, and without validation pairs each time.
        eval_due = step % eval_every == 0 or step == steps
        run.save_last(step, at_once=eval_due)
        if eval_due and RANK == 0:  # the other processes wait in the next step
            row = validate(args, model, tokenizer, val_samples, step)
            run.log(row)
            run.save_best(row)
        if step == steps:
            break

        # 2. The losses and their gradient. batch holds the arguments of SuperCLIP.forward, and
        # output what forward returns. Gradients are not accumulated here: the contrastive loss
        # needs all pairs at once, so forward itself splits a batch into micro-batches.
        began = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - began
        batch = {name: x.to(device, non_blocking=on_gpu) for name, x in batch.items()}
        with autocast:
            output = ddp_model(**batch)
        # The scaler is for float16 alone, in which small gradients would underflow to 0.
        scaler.scale(output["loss"]).backward()

        # 3. The update
        factor = learning_rate_factor(step, warmup_steps, steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        scaler.unscale_(optimizer)
        # Clip to length 1, as nanoGPT does. In our runs every gradient was longer, so all get the
        # same length. The authors do not clip, and runs without it scored the same.
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # CLIP's bounds; training is unstable beyond

        # 4. The log, at few steps only, because reading the losses makes the CPU wait for the GPU.
        # They are read before the clock is, so that the time includes the work of the GPU.
        done = step + 1
        log_due = done % args.log_every == 0 or done == steps
        if log_due:
            losses = mean_losses(output)
        seen += N
        seconds += time.perf_counter() - began
        if log_due:
            check(math.isfinite(losses["loss"]), f"the loss is not finite: {DIVERGED}")
            row = {
                "step": done,
                **losses,
                "logit_scale": model.logit_scale.exp().item(),
                # None if float16's gradients have overflowed. Then the optimizer skips the step.
                "grad_norm": grad_norm.item() if grad_norm.isfinite() else None,
                "learning_rate": args.learning_rate * factor,
                "images_per_second": round(seen / seconds, 1),
                "data_wait": round(waited / seconds, 3),
                "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),  # 0 on a CPU
            }
            if new_parameters:
                row["new_learning_rate"] = NEW_LEARNING_RATE * factor
            run.log(row)
            seen, seconds, waited = 0, 0.0, 0.0
    print_commands(run, has_val_pairs=val_samples is not None)


# -----------------------------------------------------------------------------
# The parts of a step, and what is printed at the end


def learning_rate_factor(step, warmup_steps, steps):
    """Return the learning rate of a step as a share of its peak. The share rises linearly to 1,
    and then falls to 0 along a cosine. It depends on the step alone, so there is no scheduler."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def mean_losses(output):
    """Return the loss and its terms as a dict of floats, averaged over all processes. output: what
    SuperCLIP.forward returns, which also holds features. Reading makes the CPU wait for the GPU."""
    names = [name for name in output if name.endswith("loss")]  # also one that you have added
    values = torch.stack([output[name].detach() for name in names])
    if WORLD > 1:
        dist.all_reduce(values)
        values /= WORLD
    return dict(zip(names, values.tolist()))


def validate(args, model, tokenizer, samples, step):
    """Score retrieval among the validation samples, if there are any, and zero-shot classification,
    in float32. Print the scores, and return the row of the log."""
    tqdm.write(f"\nvalidation after step {step}")
    row = {"step": step, "zeroshot": {}}
    model.eval()
    # Do not use the compiled towers: shapes and dtypes differ from those of training.
    with torch.compiler.set_stance("force_eager"):
        if samples is not None:
            # Compute the contrastive loss in groups as large as a batch of the training.
            group = args.batch_size
            row |= evaluation.score_pairs(model, tokenizer, samples, group, workers=args.workers)
            evaluation.print_words(model, tokenizer, samples)
        for folder, name in names_of(args.zeroshot_data).items():
            top1 = evaluation.zeroshot(model, tokenizer, folder, workers=args.workers)["top1"]
            tqdm.write(evaluation.format_score(f"zero-shot {name}", top1))
            row["zeroshot"][folder] = top1
    model.train()
    return row


def print_commands(run, has_val_pairs):
    """Print the commands that show what the model of a RunFolder has learned."""
    path = run.best
    if not path.exists():
        path = run.last
        print("There is no best.pt: no validation was as good as the first. Lower --learning_rate.")
    print("\nWhat the model has learned:")
    pictures = "" if has_val_pairs else " --images PICTURES"
    checkpoint = f"--checkpoint {path.as_posix()}"
    print(f'  python -m scripts.search {checkpoint} "TEXT"{pictures}')
    if run.model.head is not None:
        print(f"  python -m scripts.words {checkpoint} --out words.png{pictures}")
    print(f"  python -m scripts.curves {run.rows.as_posix()} --out curves.png")


# -----------------------------------------------------------------------------
# The parts of the set-up


def build_model(args, shards, device):
    """Return the model on its device, its tokenizer, and the names of the parameters that keep
    their random weights, because --init_from lacks them."""
    pretrained = None
    if args.init_from is None:
        tokenizer = tokenizer_for(shards, args.vocab)
        config = {**PRESETS[args.model], "vocab_size": tokenizer.vocab_size}
    else:
        pretrained, tokenizer = read_model(args.init_from)
        print(f"vocabulary: from {args.init_from}, {tokenizer.vocab_size:,} entries")
        config = dict(vars(pretrained.config))
        if pretrained.head is None and args.cls_weight is None:
            print(f"{args.init_from} has no word head. A new one is trained with --cls_weight 1.")
            config["cls_weight"] = 1.0
    # An option that has the name of a field sets it: image_size, loss and cls_weight. So a field
    # that you add needs only an option of the same name.
    for field in fields(SuperCLIPConfig):
        value = getattr(args, field.name, None)
        if value is not None:
            config[field.name] = value
    config = SuperCLIPConfig(**config)
    is_whole = config.image_size % config.patch_size == 0
    check(is_whole, f"--image_size must be a multiple of the patch_size, {config.patch_size}")
    torch.manual_seed(args.seed)  # each process begins with the same weights
    model = SuperCLIP(config)
    new_parameters = []
    if pretrained is not None:
        # Not strict, because the head may be new, or --cls_weight 0 may leave it out.
        new_parameters = model.load_state_dict(pretrained.state_dict(), strict=False).missing_keys
    tokenizer.context_length = model.config.context_length
    model.micro_batch_size = args.micro_batch_size

    compiles = args.compile
    if compiles is None:
        compiles = device.type == "cuda" and sys.platform == "linux" and can_compile(device)
    if compiles:
        print("The first steps compile the model, which can take minutes.")
        for part in (model.visual, model.text, model.head):
            # Compile part by part. Otherwise longer captions would recompile the image tower, too.
            if part is not None:
                part.compile()
    return model.to(device).train(), tokenizer, new_parameters


def open_data(args, shards, val_shards, model, tokenizer):
    """Return the training pairs (data.Pairs), and the validation samples (data.Samples), or None if
    there are none."""
    val_samples = None
    if val_shards:
        val_samples = data.Samples(val_shards, args.val_captions or args.captions)
    for folder in args.zeroshot_data:  # a mistake in a folder ends the run before its first step
        evaluation.ClassFolders(folder, model.config.image_size)
    pairs = data.Pairs(
        shards,
        tokenizer,
        model.config.image_size,
        args.captions,
        args.label_captions,
        seed=args.seed,
        crop_area=args.crop_area,
        num_patches=model.visual.grid**2,
        patch_dropout=args.patch_dropout,
    )
    N = args.batch_size
    check(N <= len(pairs), f"--batch_size is {N}, but there are only {len(pairs):,} pairs.")
    return pairs, val_samples


def make_optimizer(model, learning_rate, weight_decay, new_parameters=()):
    """Return AdamW. Only matrices decay: no biases, norms, class token or logit scale. Each group
    of parameters keeps its peak rate, which is NEW_LEARNING_RATE for those in new_parameters, at
    any --learning_rate."""
    groups = []
    for is_new, peak in ((False, learning_rate), (True, NEW_LEARNING_RATE)):
        params = [p for name, p in model.named_parameters() if (name in new_parameters) == is_new]
        matrices = [p for p in params if p.ndim >= 2]
        vectors = [p for p in params if p.ndim < 2]
        groups.append({"params": matrices, "peak": peak, "weight_decay": weight_decay})
        groups.append({"params": vectors, "peak": peak, "weight_decay": 0.0})
    # CLIP and SuperCLIP have these betas and eps. fused computes all of Adam in one kernel.
    # The loop sets lr at each step.
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


def count_steps(args, num_pairs):
    """Return three numbers of steps: the length of the run, the length of its warm-up, and the
    distance between two validations. num_pairs: number of training pairs.

    The warm-up is half of the run, but 3,000 steps at most. A short one hurts plain CLIP most
    (study/results.md). The authors' has 500 steps, and the one of CLIP's paper 2,000.
    """
    steps = args.steps or max(1, round(args.epochs * (num_pairs // args.batch_size)))
    warmup_steps = min(3000, steps // 2)
    eval_every = args.eval_every or min(2000, math.ceil(steps / 3))
    return steps, warmup_steps, eval_every


def distribute(model):
    """Return the model in torch's wrapper that averages gradients over the processes."""
    # A bucket view avoids a copy of all gradients. Buffers need no broadcast, because all processes
    # count the same tokens.
    return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


# -----------------------------------------------------------------------------
# Options


def make_parser():
    """Return the parser of all options. Where a default is None, the help states the rule."""
    parser = cli.make_parser(__doc__, "captions", "device")  # options that other commands have, too
    parser.usage = "python train.py [options]   (--help explains them)"  # a list would be long
    parser.epilog = """The built-in scenes have other defaults (SCENE_OPTIONS). A run prints its
        options when it starts."""
    add = parser.add_argument
    count = number(int, 1)
    not_negative = number(float, 0)
    # fmt: off
    add("--train_data", nargs="+", metavar="SHARDS",
        help="tar files, folders, globs or {0000..0575} (default: built-in scenes)")
    add("--val_data", nargs="+", metavar="SHARDS",
        help="shards to validate on, or none (default: those of --train_data named val or test)")
    add("--zeroshot_data", nargs="+", default=[], metavar="DIR",
        help="folders to classify at each validation; each holds a folder of images per class")
    add("--label_captions", nargs="+", metavar="SOURCE",
        help="where the words to predict come from (default: --captions)")
    add("--val_captions", nargs="+", metavar="SOURCE",
        help="where the captions of the validation pairs are (default: --captions)")
    add("--vocab", metavar="FILE",
        help="file, or clip for CLIP's (default: vocab.tiktoken beside the shards, else clip)")
    add("--crop_area", type=number(float, 0.01, 1), default=0.9, metavar="SHARE",
        help="smallest share of a picture in a crop; 1: the square in the middle (default 0.9)")
    add("--patch_dropout", type=number(float, 0, 0.99), default=0.0, metavar="SHARE",
        help="share of the patches that is left out in each step, at random (default 0)")
    add("--workers", type=number(int, 0, 999),
        help="loading processes per GPU (default: the cores, divided among the GPUs, at most 16)")
    # the model
    add("--model", choices=PRESETS, default="ViT-B-16",
        help="size of both towers (default ViT-B-16; --init_from brings its own)")
    add("--image_size", type=count, metavar="PIXELS",
        help="side of the square images (default: that of --model, 224 for all but tiny)")
    add("--init_from", metavar="FILE", help="checkpoint whose weights and vocabulary to begin with")
    add("--cls_weight", type=not_negative,
        help="weight of the classification loss; 0 trains plain CLIP (default 1, or the weight in "
        "--init_from if that has a word head)")
    add("--loss", choices=("softmax", "sigmoid"),
        help="contrastive loss: CLIP's softmax or SigLIP's sigmoid (default softmax)")
    # the training
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count,
        help="length of the run in steps (default: by --epochs)")
    length.add_argument("--epochs", type=number(float, 1e-6),
        help="length of the run in passes over the data (default 30)")
    add("--batch_size", type=count, default=256,
        help="pairs in each step, counted over all processes (default 256)")
    add("--micro_batch_size", type=count,
        help="pairs in the towers at once: less memory, same gradients (default: all of a process)")
    add("--learning_rate", type=not_negative, default=5e-4,  # that of CLIP's ViT-B
        help="peak learning rate (default 5e-4, or 5e-5 with --init_from)")
    add("--weight_decay", type=not_negative, default=0.2,
        help="weight decay of AdamW, which only matrices have (default 0.2)")
    add("--seed", type=number(int, 0, 2**31), default=0,
        help="seed for weights, order, captions, crops and patch dropout (default 0)")
    # the machine
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="dtype of the steps (default: bfloat16 where there are units for it, else float16 on "
        "a GPU and float32 on a CPU)")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="compile towers and word head (default: on CUDA under Linux, if torch can)")
    # the run
    add("--out_dir", metavar="DIR",
        help="folder of the run (default: a new one, or with --resume the one that was saved last)")
    add("--resume", action="store_true",
        help="go on with the run in --out_dir, if it holds one: repeat its command, and add this")
    add("--log_every", type=count, default=20, help="steps between log rows (default 20)")
    add("--eval_every", type=count,
        help="steps between validations (default: steps / 3, at most 2000)")
    # fmt: on
    return parser


FINE_TUNING_RATE = 5e-5  # larger steps would destroy what the weights of --init_from know
NEW_LEARNING_RATE = 5e-4  # for parameters that --init_from lacks, which know nothing yet

# The options of `python train.py` without arguments. They were chosen together.
SCENE_OPTIONS = {
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
    "workers": 0,  # the scenes are small, and the model keeps the cores busy
    "compile": False,  # it would take longer than the run
}


def parse(argv):
    """Return the options. With the built-in scenes or --init_from, some defaults are different."""
    # Parse once to see what was given, and then again with the defaults that follow from it.
    parser = make_parser()
    given = parser.parse_args(argv)
    if given.train_data is None:
        parser.set_defaults(**SCENE_OPTIONS)
    if given.init_from is not None:
        parser.set_defaults(learning_rate=FINE_TUNING_RATE, model=None)
    args = parser.parse_args(argv)
    if args.steps is None and args.epochs is None:
        args.epochs = 30.0
        if given.train_data is None:
            # 1,000 steps of 32 pairs. A batch four times as large makes half as many steps. By
            # trial this was a good compromise between as many samples and as many steps.
            args.epochs = round(1.6 * math.sqrt(args.batch_size / 32), 3)
    if args.init_from is not None:
        for name in ("model", "image_size", "vocab", "loss"):
            check(getattr(args, name) is None, f"--init_from sets --{name}. Leave this option out.")
    is_whole = args.batch_size % (WORLD * (args.micro_batch_size or 1)) == 0
    check(is_whole, "--batch_size must be a multiple of the processes times --micro_batch_size")
    print("options:", {name: x for name, x in vars(args).items() if x is not None})
    return args


def main(argv):
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    args = parse(argv)
    with joined_processes():
        train(args)


if __name__ == "__main__":
    run_command(main)
