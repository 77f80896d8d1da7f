"""Train CLIP with SuperCLIP's word head, on one CPU or GPU, or with torchrun on many.

    python train.py                       built-in scenes, about two minutes on two cores
    python train.py --batch_size 256 --train_data cc3m/ --model ViT-B-16
    torchrun --nproc_per_node 8 train.py --batch_size 2048 --train_data cc3m/ --model ViT-B-16
    python train.py --resume out          goes on with the run in the folder out

The file follows a run from top to bottom: its options, then a few functions, then `train` with the
loop. All that is random in a step follows from the seed and the number of the step. So on a CPU a
run that was killed and resumed ends with the same bits as a run that was not. A GPU may differ.
"""

import argparse
import math
import time
from collections import Counter
from dataclasses import fields
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
# The options. An option with the name of a field of SuperCLIPConfig sets this field.

# What argparse takes for each kind of option
names = {"nargs": "+"}
text = {"type": str}
flag = {"action": argparse.BooleanOptionalAction}
count = {"type": cli.number(int, 1)}
count_or_0 = {"type": cli.number(int, 0)}
amount = {"type": cli.number(float, 0)}
above_0 = {"type": cli.number(float, 1e-6)}
share = {"type": cli.number(float, 0, 0.99)}
DTYPES = ("float32", "bfloat16", "float16")

# name: (default, kind, meaning). If the default is None, the meaning says how the run chooses.
OPTIONS = {
    # Data
    "train_data": (None, names, "tars, folders, globs or {0000..0575}; else built-in scenes"),
    "val_data": (None, names, "shards to validate on, or none; else those named val or test"),
    "zeroshot_data": ([], names, "folders with a folder of pictures per class, for validations"),
    "captions": (["txt"], names, "sources of captions, one or more of txt and json.FIELD"),
    "label_captions": (None, names, "sources of the words to predict; else the caption itself"),
    "val_captions": (None, names, "sources of captions in validations; else --captions"),
    "vocab": (None, text, "file, or clip; else vocab.tiktoken beside the shards, or clip"),
    "crop_area": (0.9, {"type": cli.number(float, 0.01, 1)}, "least share of a picture to keep"),
    "patch_dropout": (0.0, share, "share of the patches to leave out at random"),
    # Model and loss
    "init_from": (None, text, "checkpoint, which sets --model, --image_size, --loss and --vocab"),
    "model": ("ViT-B-16", {"choices": PRESETS}, "size of both towers"),
    "image_size": (None, count, "pixels a side; else 72 for tiny, and 224 for other models"),
    "loss": (None, {"choices": ("softmax", "sigmoid")}, "CLIP's loss, or SigLIP's; else CLIP's"),
    "cls_weight": (None, amount, "weight of the words' loss; else 1, or as in --init_from"),
    # Training. 5e-4 is CLIP's rate for ViT-B in batches of 32,768. It is untuned for 256.
    "steps": (None, count, "length of the run in steps; else --epochs decides"),
    "epochs": (30, above_0, "passes over the data; for scenes 1.6 * sqrt(batch_size / 32)"),
    "batch_size": (256, count, "pairs in each step, over all processes"),
    "micro_batch_size": (None, count, "pairs in the towers at once, to save memory; else all"),
    "learning_rate": (5e-4, amount, "peak; with --init_from 5e-5, but 5e-4 for new parts"),
    "warmup_steps": (None, count_or_0, "steps in which the rate rises; else half, at most 3000"),
    "weight_decay": (0.2, amount, "of AdamW, for matrices"),
    "seed": (0, count_or_0, "of all draws"),
    # Machine
    "workers": (None, count_or_0, "loaders per GPU; else 0 on a CPU, and cores / GPUs on GPUs"),
    "device": (None, text, "cuda, mps or cpu; else cuda if there is such a GPU, or cpu"),
    "dtype": (None, {"choices": DTYPES}, "dtype of steps; else the fastest one here"),
    "compile": (None, flag, "compile towers and head; else on CUDA under Linux, if torch can"),
    # Run
    "out_dir": (None, text, "folder of the run; else a new one"),
    "resume": (None, text, "folder of a run to go on with; typed options replace its own"),
    "log_every": (20, count, "steps between rows of the log"),
    "eval_every": (None, count, "steps between validations; else a third of all, at most 2000"),
}
DEFAULTS = {name: default for name, (default, _, _) in OPTIONS.items()}

# Other defaults without --train_data, chosen together so that a CPU learns in minutes
SCENES = {
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
    "epochs": None,  # 1.6 * sqrt(batch_size / 32), see `resolve`
    "batch_size": 32,
    "compile": False,  # it would take longer than the run
}
# Other defaults with --init_from. A higher learning rate would destroy what the checkpoint knows.
FINE_TUNING = {"model": None, "learning_rate": 5e-5}


def make_parser():
    """Return a parser that returns only the options that are typed."""
    parser = cli.make_parser(__doc__)  # its first paragraph describes the command
    parser.usage = "python train.py [options]"  # a list of all of them would hide an error
    parser.argument_default = argparse.SUPPRESS
    for name, (default, kind, meaning) in OPTIONS.items():
        if default is not None:
            meaning += f" (default: {default})"
        if SCENES.get(name) is not None:
            meaning += f" (without --train_data: {SCENES[name]})"
        parser.add_argument(f"--{name}", help=meaning, **kind)
    return parser


def parse(argv):
    """Return the options of a run as they are given, and what the last.pt of --resume holds, or
    None if the run starts."""
    typed = vars(make_parser().parse_args(argv))
    for one, other in (("resume", "out_dir"), ("steps", "epochs")):
        cli.check(not {one, other} <= typed.keys(), f"give --{one} or --{other}, but not both")

    # What comes later replaces what came before.
    given = {**DEFAULTS}
    if "train_data" not in typed:
        given |= SCENES
    if "init_from" in typed:
        given |= FINE_TUNING
        for name in ("model", "image_size", "loss", "vocab"):
            cli.check(name not in typed, f"--init_from sets --{name}. Leave this out.")
    last = None
    if "resume" in typed:
        last = run.read_last(typed["resume"])
    elif "out_dir" in typed:
        run.check_is_new(typed["out_dir"])
    if last is not None:
        given |= last["header"]["given"]
        run.print_changes(last, typed)
    if "steps" in typed or "epochs" in typed:  # one of them replaces the other
        given |= {"steps": None, "epochs": None}
    given |= typed

    is_multiple = given["batch_size"] % (WORLD * (given["micro_batch_size"] or 1)) == 0
    cli.check(is_multiple, "--batch_size must be a multiple of processes times --micro_batch_size")
    print("options:", {name: x for name, x in given.items() if x is not None})
    return argparse.Namespace(**given), last


def resolve(given, device, num_pairs):
    """Return the options with a value for most of those that are None. num_pairs: the number of
    pairs to train on."""
    args = argparse.Namespace(**vars(given))
    if args.val_captions is None:
        args.val_captions = args.captions
    if args.workers is None and device.type == "cpu":
        args.workers = 0  # the model keeps the cores busy
    if args.dtype is None:
        args.dtype = devices.pick_dtype(device)
    if args.steps is None:
        # Scenes have 1,000 steps in batches of 32, and half as many in batches of 128.
        epochs = args.epochs or round(1.6 * math.sqrt(args.batch_size / 32), 3)
        args.steps = max(1, round(epochs * (num_pairs // args.batch_size)))
    if args.warmup_steps is None:  # a short warm-up hurts plain CLIP most (study/results.md)
        args.warmup_steps = min(3000, args.steps // 2)
    if args.eval_every is None:
        args.eval_every = min(2000, math.ceil(args.steps / 3))
    cli.check(num_pairs >= args.batch_size, f"--batch_size exceeds the {num_pairs:,} pairs")
    is_short = args.warmup_steps <= args.steps
    cli.check(is_short, f"--warmup_steps exceeds the {args.steps} steps of the run")
    return args


# -----------------------------------------------------------------------------
# The model, the optimizer, the learning rate, and a validation


def build_model(given, shards):
    """Return the model of a new run, its tokenizer, and a list of names: the tensors that are new,
    because the checkpoint of --init_from lacks them, as plain CLIP lacks the word head. Without
    --init_from the list is empty."""
    if given.init_from is None:
        pretrained = None
        tokenizer = tokenizer_for(shards, given.vocab)
        config = {**PRESETS[given.model], "vocab_size": tokenizer.vocab_size}
    else:
        pretrained, tokenizer, _ = run.read_model(given.init_from)
        config = {**vars(pretrained.config)}
        if pretrained.head is None:
            config["cls_weight"] = 1.0  # plain CLIP gets a word head
    for field in fields(SuperCLIPConfig):
        value = vars(given).get(field.name)
        if value is not None:  # an option such as --cls_weight
            config[field.name] = value
    config = SuperCLIPConfig(**config)
    fits = config.image_size % config.patch_size == 0
    cli.check(fits, f"--image_size must be a multiple of the patch_size {config.patch_size}")
    tokenizer.context_length = config.context_length  # to which it cuts captions

    torch.manual_seed(given.seed)  # each process begins with the same weights
    model = SuperCLIP(config)
    new_names = []
    if pretrained is not None:
        new_names = run.load_pretrained(model, pretrained, given.init_from)
    return model, tokenizer, new_names


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
    """Return the learning rate of a step as a share of its peak. The share rises linearly to 1,
    and then falls to 0 along a cosine. It depends on the step alone, so there is no scheduler."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def validate(args, model, tokenizer, samples, zeroshot_images, step):
    """Score retrieval and zero-shot classification, without autocast, so in float32. Print the
    scores, and return them as a row of the log. samples: data.Samples, or None if there are no
    validation pairs; zeroshot_images: a dict {folder: data.Pictures}."""
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

    # The model and the data. One process draws, downloads and indexes what is missing, while the
    # others wait.
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
        val_samples = None
        if val_shards:
            val_samples = data.open_samples(val_shards, args.val_captions)
        zeroshot_images = {
            folder: evaluation.zeroshot_pictures(folder, image_size, tokenizer)
            for folder in args.zeroshot_data
        }
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
    if val_samples is None:
        print("no validation pairs, so best.pt will be the newest model (see --val_data)")

    # How to compute. float16 needs a scaler, because small gradients would underflow to 0. With
    # another dtype the scaler does nothing.
    model.to(device).train()
    devices.compile_if_wanted(model, args.compile)
    optimizer = make_optimizer(model, args.learning_rate, args.weight_decay, new_names)
    dtype = getattr(torch, args.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=args.dtype != "float32")
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")

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

    # Each process loads a part of every batch. DDP averages the gradients, without a copy of them.
    # Buffers are equal in all processes anyway.
    B = args.batch_size // WORLD
    rows = slice(RANK * B, (RANK + 1) * B)
    batches = data.load_batches(
        pairs, args.batch_size, rows, start, stop=args.steps, workers=args.workers, pin=on_gpu
    )
    ddp_model = model
    if WORLD > 1:
        ddp_model = DDP(model, gradient_as_bucket_view=True, broadcast_buffers=False)

    saved_at = time.perf_counter()
    since_row = Counter()  # sums over the steps since the last row of the log
    rounds = range(start, args.steps + 1)  # the last one only saves and validates
    no_bar = True if RANK else None  # None: there is a bar if the output is a terminal
    for step in tqdm(rounds, initial=start, total=args.steps, unit="step", disable=no_bar):
        # 1. Process 0 saves every ten minutes, and before a validation, which may fail. Then it
        # validates. The other processes wait in part 3, or at the end.
        is_validated = step in eval_steps
        is_saved = is_validated or time.perf_counter() > saved_at + 600
        facts = {"header": header, "step": step}
        if RANK == 0 and is_saved and step > start:
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

        # 3. The losses and their gradient. Gradients are not accumulated here: the contrastive loss
        # needs all pairs at once, so forward itself splits a batch into micro-batches. Seed what a
        # model may draw, such as dropout, so that a resumed run draws the same.
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
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # open_clip's bounds

        # 5. The log, at few steps only. Read the losses before stopping the clock, because the read
        # waits for the GPU. Before a validation there is always a row.
        done = step + 1
        is_logged = done % args.log_every == 0 or done in eval_steps
        if is_logged:
            means = mean_of_all(losses)  # the loss and its terms
        seconds = time.perf_counter() - began  # without saves and validations
        since_row.update(steps=1, seconds=seconds, waited=waited, replaced=num_replaced)
        if is_logged:
            # The scaler of float16 skips such a step and halves its scale, from 2**16 on. Without
            # float16 the scale is always 1.
            is_well = math.isfinite(means["loss"]) or scaler.get_scale() > 1
            advice = "lower --learning_rate, or use another --dtype"
            cli.check(is_well, f"the loss is not finite: {advice}")
            speed = since_row["steps"] * args.batch_size / since_row["seconds"]
            row = {
                "step": done,
                **means,
                "logit_scale": model.logit_scale.exp().item(),
                "grad_norm": grad_norm.item(),
                "learning_rate": optimizer.param_groups[0]["lr"],  # not that of a new head
                "images_per_second": round(speed, 1),
                # Shares of the time, and of the pairs of this process
                "data_wait": round(since_row["waited"] / since_row["seconds"], 3),
                "bad_samples": round(since_row["replaced"] / (since_row["steps"] * B), 4),
                "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),  # 0 on a CPU
            }
            run.log(out, row)
            tqdm.write(run.line_of(row, means))  # above the bar
            since_row.clear()
    run.print_commands(out, model, val_samples)


def main(argv):
    with joined_processes():
        train(*parse(argv))


if __name__ == "__main__":
    cli.run_command(main)
