"""Train CLIP with SuperCLIP's word head, on one CPU or GPU, or with torchrun on many.

    python train.py                       built-in scenes, about two minutes on two cores
    python train.py --batch_size 256 --train_data cc3m/ --model ViT-B-16
    torchrun --nproc_per_node 8 train.py --batch_size 2048 --train_data cc3m/ --model ViT-B-16
    python train.py --resume out          goes on with the run in the folder out

Each step is seeded, so on a CPU a run that is resumed ends as if nothing had interrupted it.
"""

import argparse
import math
import time
from collections import Counter
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import data
import eval as evaluation
from common import cli, devices, run
from common.processes import RANK, WORLD, joined_processes, mean_of_all, one_first
from common.scenes import find_or_make_scenes
from common.shards import shards_of_run
from common.tokenizer import tokenizer_for
from superclip import PRESETS, SuperCLIP, SuperCLIPConfig

# -----------------------------------------------------------------------------
# The options. One with the name of a field of SuperCLIPConfig sets this field.

# Kinds of options, as argparse takes them
text = {"type": str}
names = {"nargs": "+"}
count = {"type": cli.number(int, 1)}
count_or_0 = {"type": cli.number(int, 0)}
amount = {"type": cli.number(float, 0)}
share = {"type": cli.number(float, 0, 1)}
dtypes = {"choices": ("float32", "bfloat16", "float16")}
flag = {"action": argparse.BooleanOptionalAction}

# name: (default, kind, meaning). None: the run chooses, by the rule in the meaning.
OPTIONS = {
    # Data
    "train_data": (None, names, "tars, folders, globs or {0000..0575}; by default built-in scenes"),
    "val_data": (None, names, "shards to validate on, or none; by default those named val or test"),
    "zeroshot_data": ([], names, "folders with a folder of pictures per class, for validations"),
    "captions": (["txt"], names, "sources of captions, one or more of txt and json.FIELD"),
    "label_captions": (None, names, "sources of the words to predict; by default the caption"),
    "val_captions": (None, names, "sources of captions in validations; by default --captions"),
    "vocab": (None, text, "file, or clip; by default vocab.tiktoken beside the shards, else clip"),
    "crop_area": (0.9, share, "least share of a picture to keep; 1: the middle square"),
    "patch_dropout": (0.0, share, "share of the patches to leave out at random"),
    # Model and loss
    "init_from": (None, text, "checkpoint, which sets --model, --image_size, --loss and --vocab"),
    "model": ("ViT-B-16", {"choices": PRESETS}, "size of both towers"),
    "image_size": (None, count, "pixels a side; by default 72 for tiny, else 224"),
    "loss": (None, {"choices": ("softmax", "sigmoid")}, "CLIP's (the default) or SigLIP's"),
    "cls_weight": (None, amount, "weight of the classification loss; 0: plain CLIP; by default 1"),
    # Training. 5e-4 is CLIP's rate for ViT-B in batches of 32,768. It is untuned for 256.
    "steps": (None, count, "length of the run; by default --epochs decides"),
    "epochs": (None, amount, "passes; by default 30, and for scenes 1.6 * sqrt(batch_size / 32)"),
    "batch_size": (256, count, "pairs in each step, over all processes"),
    "micro_batch_size": (None, count, "pairs in the towers at once to save memory; by default all"),
    "learning_rate": (5e-4, amount, "peak; with --init_from 5e-5, but 5e-4 for new parts"),
    "warmup_steps": (None, count_or_0, "steps with a rising rate; by default half, at most 3000"),
    "weight_decay": (0.2, amount, "of AdamW, for matrices"),
    "seed": (0, count_or_0, "of all draws"),
    # Machine and folder
    "workers": (None, count_or_0, "loaders per GPU; by default cores / GPUs; on a CPU 0"),
    "device": (None, text, "cuda, mps or cpu; by default cuda if there is such a GPU, else cpu"),
    "dtype": (None, dtypes, "dtype of steps; by default a fast one of this device"),
    "compile": (None, flag, "compile towers and head; by default on CUDA under Linux, if it works"),
    "out_dir": (None, text, "folder of the run; by default a new one"),
    "resume": (None, text, "folder of a run to go on with; typed options replace its own"),
    "log_every": (20, count, "steps between rows of the log"),
    "eval_every": (None, count, "steps between validations; by default a third, at most 2000"),
}
DEFAULTS = {name: default for name, (default, _, _) in OPTIONS.items()}
SCENES = {  # other defaults without --train_data, chosen so that a CPU learns in minutes
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
    "compile": False,  # it would take longer than the run
}


def parse(argv):
    """Return the options as they are given, and what last.pt holds, or None if the run starts."""
    parser = cli.make_parser(__doc__)  # its first paragraph describes the command
    parser.usage = "python train.py [options]"  # a list of all of them would hide an error
    parser.argument_default = argparse.SUPPRESS  # so it returns only what is typed
    for name, (default, kind, meaning) in OPTIONS.items():
        if default is not None:
            meaning += f" (default: {default})"
        if name in SCENES:
            meaning += f" (without --train_data: {SCENES[name]})"
        parser.add_argument(f"--{name}", help=meaning, **kind)
    typed = vars(parser.parse_args(argv))
    for one, other in (("resume", "out_dir"), ("steps", "epochs")):
        cli.check(not {one, other} <= typed.keys(), f"give --{one} or --{other}, but not both")

    # What comes later replaces what came before.
    given = {**DEFAULTS}
    if "train_data" not in typed:
        given |= SCENES
    if "init_from" in typed:
        given |= {"model": None, "learning_rate": 5e-5}  # a higher rate would destroy what it knows
        for name in ("model", "image_size", "loss", "vocab"):
            cli.check(name not in typed, f"--init_from sets --{name}. Leave this out.")
    if "out_dir" in typed:
        run.check_is_new(typed["out_dir"])
    last = None
    if "resume" in typed:
        last = run.read_last(typed["resume"])
        # A scheduler may always give --resume, with the command that starts the run.
        is_start = last is None and len(typed) > 1
        cli.check(last or is_start, f"there is no run in {typed['resume']}")
    if last is not None:
        given |= last["header"]["given"]
        run.print_changes(last, typed)
    if "epochs" in typed:
        given["steps"] = None  # those of the run that goes on
    given |= typed
    is_multiple = given["batch_size"] % (WORLD * (given["micro_batch_size"] or 1)) == 0
    cli.check(is_multiple, "--batch_size must be a multiple of processes times --micro_batch_size")
    print("options:", {name: x for name, x in given.items() if x is not None})
    return argparse.Namespace(**given), last


def resolve(given, device, num_pairs):
    """Return the options with values for those that were left open."""
    args = argparse.Namespace(**vars(given))
    args.val_captions = args.val_captions or args.captions
    args.dtype = args.dtype or devices.pick_dtype(device)
    if args.workers is None and device.type == "cpu":
        args.workers = 0  # the model keeps the cores busy
    if args.epochs is None:  # scenes: a batch four times as large makes half as many steps
        args.epochs = 30 if args.train_data else round(1.6 * math.sqrt(args.batch_size / 32), 3)
    args.steps = args.steps or max(1, round(args.epochs * (num_pairs // args.batch_size)))
    if args.warmup_steps is None:  # a short warm-up hurts plain CLIP most (study/results.md)
        args.warmup_steps = min(3000, args.steps // 2)
    args.eval_every = args.eval_every or min(2000, math.ceil(args.steps / 3))
    cli.check(num_pairs >= args.batch_size, f"--batch_size exceeds the {num_pairs:,} pairs")
    cli.check(args.warmup_steps <= args.steps, f"--warmup_steps exceeds the {args.steps} steps")
    return args


# -----------------------------------------------------------------------------
# The model, the optimizer, the learning rate, and a validation


def build_model(given, shards):
    """Return the model of a new run, its tokenizer, and the names of the tensors that --init_from
    lacks, as a checkpoint of plain CLIP lacks the word head."""
    if given.init_from is None:
        tokenizer = tokenizer_for(shards, given.vocab)
        config = vars(SuperCLIPConfig(**PRESETS[given.model], vocab_size=tokenizer.vocab_size))
    else:
        pretrained, tokenizer, _ = run.read_model(given.init_from)
        config = vars(pretrained.config).copy()
        if pretrained.head is None:
            config["cls_weight"] = 1.0  # plain CLIP gets a word head
    for name, value in vars(given).items():
        if name in config and value is not None:  # an option such as --cls_weight
            config[name] = value
    config = SuperCLIPConfig(**config)
    fits = config.image_size % config.patch_size == 0
    cli.check(fits, f"--image_size must be a multiple of the patch_size {config.patch_size}")
    tokenizer.context_length = config.context_length  # to which it cuts captions

    torch.manual_seed(given.seed)  # each process begins with the same weights
    model = SuperCLIP(config)
    if given.init_from is None:
        return model, tokenizer, []
    return model, tokenizer, run.load_pretrained(model, pretrained, given.init_from)


def make_optimizer(model, learning_rate, weight_decay, new_names=(), rate_of_new=5e-4):
    """Return AdamW. Its groups of parameters differ in weight decay and in peak_lr, the highest
    learning rate. The parameters in new_names know nothing yet, so they learn as from nothing."""
    groups = []
    for is_new, peak_lr in ((False, learning_rate), (True, rate_of_new)):
        params = [p for name, p in model.named_parameters() if (name in new_names) == is_new]
        matrices = [p for p in params if p.ndim >= 2]
        others = [p for p in params if p.ndim < 2]  # biases, norms, class token, logit scale
        if params:
            groups.append({"params": matrices, "peak_lr": peak_lr, "weight_decay": weight_decay})
            groups.append({"params": others, "peak_lr": peak_lr, "weight_decay": 0.0})
    # CLIP and SuperCLIP have these betas and eps. fused computes all of Adam in one kernel.
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)


def learning_rate_factor(step, warmup_steps, steps):
    """Return the learning rate of a step as a share of its peak: up a line, down a cosine."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def validate(args, model, tokenizer, samples, zeroshot_images, step):
    """Score retrieval and zero-shot classification in float32. Print the scores, and return them as
    a row of the log. samples: data.Samples, or None; zeroshot_images: a dict {folder: Pictures}."""
    tqdm.write(f"\nvalidation after step {step}")
    row = {"step": step, "zeroshot": {}}
    model.eval()
    # Do not use the compiled towers: shapes and dtypes differ from those of training.
    with torch.compiler.set_stance("force_eager"):
        if samples is not None:
            row |= evaluation.score_pairs(model, tokenizer, samples, args.workers, args.batch_size)
            evaluation.print_pairs(row, model, tokenizer, samples)
        for folder, images in zeroshot_images.items():
            score = evaluation.zeroshot(model, tokenizer, images, workers=args.workers)
            tqdm.write(evaluation.format_score(f"zero-shot {Path(folder).name}", score))
            row["zeroshot"][folder] = score
    model.train()
    return row


# -----------------------------------------------------------------------------
# The run


def train(given, last):
    """Train from the first step, or go on from `last`. The arguments are what `parse` returns."""
    device = devices.prepare_device(given.device)
    on_gpu = device.type == "cuda"

    # The model and the data. One process draws, downloads and indexes what is missing first.
    with one_first():
        train_data = given.train_data or [find_or_make_scenes("scenes")]
        shards, val_shards = shards_of_run(train_data, given.val_data)
        if last is None:
            model, tokenizer, new_names = build_model(given, shards)
        else:
            model, tokenizer = run.restore(f"{given.resume}/last.pt", last)
            new_names = last["header"]["new_names"]
        image_size = model.config.image_size
        samples = data.open_samples(shards, given.captions)
        args = resolve(given, device, len(samples))
        val_samples = data.open_samples(val_shards, args.val_captions) if val_shards else None
        zeroshot_images = {}
        for folder in args.zeroshot_data:
            zeroshot_images[folder] = evaluation.zeroshot_pictures(folder, image_size, tokenizer)
    pairs = data.Pairs(
        samples,
        tokenizer,
        image_size,
        label_sources=args.label_captions,
        seed=args.seed,
        crop_area=args.crop_area,
        num_patches=model.visual.grid**2,
        patch_dropout=args.patch_dropout,
    )

    # How to compute. In float16 small gradients would underflow to 0, so scale the loss.
    model.to(device).train()
    devices.compile_if_wanted(model, args.compile)
    optimizer = make_optimizer(model, args.learning_rate, args.weight_decay, new_names)
    dtype = getattr(torch, args.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # Where the run begins, and the steps after which it validates. 0 is before the first step.
    eval_steps = {*range(0, args.steps, args.eval_every), args.steps}
    start = 0
    best_r1 = 0.0  # the highest score of a validation: the mean of R@1 over both directions
    header = run.make_header(given, args, device, model, pairs, val_samples, new_names)
    if last is not None:
        run.check_data_and_steps(last, header)
        run.load_states(last, optimizer, scaler)
        start = last["step"]
        best_r1 = last["best_r1"]
        if last["is_validated"]:  # the run may have ended before this validation
            eval_steps.add(start)
    out = run.make_folder(args.resume or args.out_dir)
    run.begin_log(out, header, start)  # it also checks that all processes begin alike

    # Each process loads a part of every batch, and DDP averages the gradients.
    B = args.batch_size // WORLD
    rows = slice(RANK * B, (RANK + 1) * B)
    batches = data.load_batches(
        pairs, args.batch_size, rows, start, stop=args.steps, workers=args.workers, pin=on_gpu
    )
    ddp_model = model
    if WORLD > 1:
        ddp_model = DDP(model, gradient_as_bucket_view=True, broadcast_buffers=False)

    saved_at = time.perf_counter()
    sums = Counter()  # over the steps since the last row of the log
    rounds = range(start, args.steps + 1)  # the last one only saves and validates
    no_bar = True if RANK else None  # None: there is a bar if the output is a terminal
    for step in tqdm(rounds, initial=start, total=args.steps, unit="step", disable=no_bar):
        # 1. Process 0 saves every ten minutes, and before a validation, which may fail. Then it
        # validates. The other processes wait in part 3, or at the end.
        is_validated = step in eval_steps
        is_saved = is_validated or time.perf_counter() > saved_at + 600
        facts = {"header": header, "step": step}
        if RANK == 0 and is_saved and (step > start or last is None):
            states = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            states |= {"best_r1": best_r1, "is_validated": is_validated}
            run.write_checkpoint(out / "last.pt", model, tokenizer.vocab, **facts, **states)
            saved_at = time.perf_counter()
        if RANK == 0 and is_validated:
            row = validate(args, model, tokenizer, val_samples, zeroshot_images, step)
            run.log(out, row)
            mean_r1 = row.get("mean_r1", 0.0)  # without validation pairs the newest is best
            if mean_r1 >= best_r1:
                best_r1 = mean_r1
                if step > 0:  # the weights before training only set the score to beat
                    run.write_checkpoint(out / "best.pt", model, tokenizer.vocab, **facts)
        if step == args.steps:
            break

        # 2. The batch, a dict of the arguments of SuperCLIP.forward
        began = time.perf_counter()
        batch, num_replaced = next(batches)  # some pairs may replace bad samples
        waited = time.perf_counter() - began  # the GPU may have been busy meanwhile
        batch = {name: x.to(device, non_blocking=on_gpu) for name, x in batch.items()}

        # 3. The losses and their gradient. The contrastive loss needs all pairs at once, so forward
        # itself splits a batch into micro-batches. The seed is for what a fork draws, for dropout.
        torch.manual_seed((args.seed * 1_000_003 + step) * WORLD + RANK)
        with autocast:
            losses = ddp_model(**batch, micro_batch_size=args.micro_batch_size)
        scaler.scale(losses["loss"]).backward()

        # 4. The update. Clip the gradient to length 1, as nanoGPT does. The authors do not clip.
        # The scaler skips a step whose gradients have overflowed.
        factor = learning_rate_factor(step, args.warmup_steps, args.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.logit_scale.data.clamp_(0, math.log(100))  # open_clip's bounds

        # 5. The log, at few steps only. Read the losses before stopping the clock, because the read
        # waits for the GPU. Before a validation there is always a row.
        done = step + 1
        is_logged = done % args.log_every == 0 or done in eval_steps
        if is_logged:
            means = mean_of_all(losses)  # the loss and its terms
        seconds = time.perf_counter() - began  # without saves and validations
        sums.update(steps=1, seconds=seconds, waited=waited, replaced=num_replaced)
        if is_logged:
            # In float16 a step may overflow, which halves the scale. Otherwise the scale is 1.
            is_well = math.isfinite(means["loss"]) or scaler.get_scale() > 1
            cli.check(is_well, "the loss is not finite. Lower --learning_rate, or change --dtype.")
            row = {
                "step": done,
                **means,
                "logit_scale": model.logit_scale.exp().item(),
                "grad_norm": grad_norm.item(),
                "learning_rate": optimizer.param_groups[0]["lr"],  # not that of a new head
                "images_per_second": round(sums["steps"] * args.batch_size / sums["seconds"], 1),
                "data_wait": round(sums["waited"] / sums["seconds"], 3),  # a share
                "bad_samples": round(sums["replaced"] / (sums["steps"] * B), 4),
                "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),  # 0 on a CPU
            }
            run.log(out, row)
            tqdm.write(run.line_of(row, means))  # above the bar
            sums.clear()
    run.print_commands(out, model, val_samples)


def main(argv):
    with joined_processes():
        train(*parse(argv))


if __name__ == "__main__":
    cli.run_command(main)
