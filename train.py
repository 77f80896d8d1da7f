"""Train CLIP with SuperCLIP's word head, on one CPU or GPU, or with torchrun on many.

    python train.py                       built-in scenes, about two minutes on two cores
    python train.py --batch_size 256 --train_data cc3m/ --model ViT-B-16
    torchrun --nproc_per_node 8 train.py --batch_size 2048 --train_data cc3m/ --model ViT-B-16
    python train.py --resume out          goes on with the run in the folder out

The file follows a run from top to bottom: its options, then five functions, then `train` with the
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
# The options. One that has the name of a field of SuperCLIPConfig sets this field.

SCENES_FOLDER = "scenes"  # where the built-in data is drawn
# The defaults without --train_data. They were chosen together, so that a CPU learns in minutes.
SCENES = {
    "zeroshot_data": [
        f"{SCENES_FOLDER}/zeroshot/{name}"
        for name in ("colour", "shape", "colour_shape", "held_out")
    ],
    "captions": ["json.short", "json.long"],
    "val_captions": ["json.long"],
    "crop_area": 1.0,  # captions name the border, which a crop cuts off
    "model": "tiny",
    "batch_size": 32,
    "compile": False,  # it would take longer than the run
}


def make_parser():
    parser = cli.make_parser(__doc__)  # its first paragraph describes the command
    parser.usage = "python train.py [options]"  # a list of all of them would hide an error
    add = parser.add_argument
    count = cli.number(int, 1)  # from 1 on
    amount = cli.number(float, 0)  # from 0 on
    # fmt: off
    # Data. In the lists of defaults, "scenes:" stands before those without --train_data.
    add("--train_data", nargs="+", metavar="SHARDS",
        help="tar files, folders, globs or {0000..0575} (default: built-in scenes)")
    add("--val_data", nargs="+", metavar="SHARDS",
        help="pairs to validate on, or none (default: the shards that are named val or test)")
    add("--zeroshot_data", nargs="+", default=[], metavar="DIR",
        help="folders that hold a folder of pictures for each class, to classify in validations")
    add("--captions", nargs="+", default=["txt"], metavar="SOURCE",
        help="one or more of txt and json.FIELD (default: txt; scenes: json.short json.long)")
    add("--label_captions", nargs="+", metavar="SOURCE",
        help="sources of the words to predict (default: the caption itself)")
    add("--val_captions", nargs="+", metavar="SOURCE",
        help="sources of the captions in validations (default: --captions; scenes: json.long)")
    add("--vocab", help="file, or clip (default: vocab.tiktoken beside the shards, else clip)")
    add("--crop_area", type=cli.number(float, 0.01, 1), default=0.9,
        help="least share of a picture to keep; 1: the middle square (default: 0.9; scenes: 1)")
    add("--patch_dropout", type=cli.number(float, 0, 0.99), default=0.0,
        help="share of the patches to leave out at random (default: 0)")
    # Model and loss
    add("--init_from", help="checkpoint, which sets --model, --image_size, --loss and --vocab")
    add("--model", choices=PRESETS, default="ViT-B-16",
        help="size of both towers (default: ViT-B-16; scenes: tiny)")
    add("--image_size", type=count, help="pixels a side (default: 224, or 72 for tiny)")
    add("--loss", choices=("softmax", "sigmoid"), help="CLIP's loss or SigLIP's (default: softmax)")
    add("--cls_weight", type=amount,
        help="weight of the classification loss; 0: plain CLIP (default: 1, or as in --init_from)")
    # Training. 5e-4 is CLIP's rate for ViT-B in batches of 32,768. For ViT-B at 256 we tried none.
    add("--steps", type=count, help="length of the run in steps (default: by --epochs)")
    add("--epochs", type=cli.number(float, 1e-6),
        help="passes over the data (default: 30; scenes: 1.6 * sqrt(batch_size / 32))")
    add("--batch_size", type=count, default=256,
        help="pairs in each step, over all processes (default: 256; scenes: 32)")
    add("--micro_batch_size", type=count,
        help="pairs in the towers at once: less memory, same gradients (default: all)")
    add("--learning_rate", type=amount, default=5e-4,
        help="peak (default: 5e-4, or 5e-5 with --init_from, whose new parts have 5e-4)")
    add("--warmup_steps", type=cli.number(int, 0),
        help="steps in which the learning rate rises (default: half of all, at most 3000)")
    add("--weight_decay", type=amount, default=0.2, help="AdamW, for matrices (default: 0.2)")
    add("--seed", type=cli.number(int, 0, 2**31), default=0, help="of all draws (default: 0)")
    # Machine
    add("--workers", type=cli.number(int, 0),
        help="loading processes per GPU (default: cores / GPUs, at most 16; without a GPU: 0)")
    add("--device", help="cuda, mps or cpu (default: cuda if there is such a GPU, else cpu)")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="dtype of steps (default: bfloat16 if it is fast, else float16 on GPUs, or float32)")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="compile towers and head (default: on CUDA under Linux, if torch can; scenes: no)")
    # Run
    add("--out_dir", metavar="DIR", help="folder of the run (default: a new one)")
    add("--resume", metavar="DIR",
        help="go on with the run in this folder, or start it; typed options replace its own")
    add("--log_every", type=count, default=20, help="steps between rows of the log (default: 20)")
    add("--eval_every", type=count,
        help="steps between two validations (default: a third of all, at most 2000)")
    # fmt: on
    return parser


def parse(argv):
    """Return the options of a run, and what the last.pt of --resume holds, or None if the run
    starts. `train` chooses the value of those options that are None."""
    parser = make_parser()
    options = vars(parser.parse_args([]))  # the defaults
    no_value = object()  # argparse leaves it to the options that are not typed
    found = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(options, no_value)))
    typed = {name: x for name, x in vars(found).items() if x is not no_value}
    for one, other in (("resume", "out_dir"), ("steps", "epochs")):
        cli.check(not {one, other} <= typed.keys(), f"give --{one} or --{other}, but not both")
    last = None
    if "resume" in typed:
        last = run.read_last(typed["resume"])
    elif "out_dir" in typed:
        run.check_is_new(typed["out_dir"])

    # What comes later replaces what came before.
    if "train_data" not in typed:
        options.update(SCENES)
    if "init_from" in typed:
        # The checkpoint sets the model. A higher learning rate would destroy what it knows.
        options.update(model=None, learning_rate=5e-5)
        for name in ("model", "image_size", "loss", "vocab"):
            cli.check(name not in typed, f"--init_from sets --{name}. Leave this out.")
    if last is not None:
        options.update(last["header"]["options"])
        run.print_changes(last, options, typed)
    if "steps" in typed or "epochs" in typed:  # one of them replaces the other
        options.update(steps=None, epochs=None)
    options.update(typed)

    args = argparse.Namespace(**options)
    is_multiple = args.batch_size % (WORLD * (args.micro_batch_size or 1)) == 0
    cli.check(is_multiple, "--batch_size must be a multiple of processes times --micro_batch_size")
    print("options:", {name: x for name, x in options.items() if x is not None})
    return args, last


# -----------------------------------------------------------------------------
# The model, the optimizer, the learning rate, and a validation


def build_model(args, shards):
    """Return the model of a new run, its tokenizer, and a list of names: the tensors that are new,
    because the checkpoint of --init_from lacks them, as plain CLIP lacks the word head. Without
    --init_from the list is empty."""
    if args.init_from is None:
        pretrained = None
        tokenizer = tokenizer_for(shards, args.vocab)
        config = {**PRESETS[args.model], "vocab_size": tokenizer.vocab_size}
    else:
        pretrained, tokenizer, _ = run.read_model(args.init_from)
        config = {**vars(pretrained.config)}
        if pretrained.head is None:
            config["cls_weight"] = 1.0  # plain CLIP gets a word head
    for field in fields(SuperCLIPConfig):
        value = getattr(args, field.name, None)
        if value is not None:  # an option such as --cls_weight
            config[field.name] = value
    try:
        config = SuperCLIPConfig(**config)
    except ValueError as error:  # sizes that do not fit together
        raise cli.InputError(str(error)) from error
    tokenizer.context_length = config.context_length  # to which it cuts captions

    torch.manual_seed(args.seed)  # each process begins with the same weights
    model = SuperCLIP(config)
    new_names = []
    if pretrained is not None:
        new_names = run.load_pretrained(model, pretrained, args.init_from)
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


def count_steps(args, num_pairs):
    """Return three numbers of steps: the length of a run on num_pairs pairs, the length of its
    warm-up, and the distance between two validations. Options have them, or these rules."""
    usual = 30
    if args.train_data is None:
        # 1,000 steps of 32 scenes. A batch four times as large makes half as many steps.
        usual = round(1.6 * math.sqrt(args.batch_size / 32), 3)
    epochs = args.epochs or usual
    steps = args.steps or max(1, round(epochs * (num_pairs // args.batch_size)))
    warmup_steps = args.warmup_steps
    if warmup_steps is None:  # a short one hurts plain CLIP most (study/results.md)
        warmup_steps = min(3000, steps // 2)
    cli.check(warmup_steps <= steps, f"--warmup_steps exceeds the {steps} steps of the run")
    eval_every = args.eval_every or min(2000, math.ceil(steps / 3))
    return steps, warmup_steps, eval_every


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


def train(args, last):
    """Train from the first step, or go on from `last`. The arguments are what `parse` returns."""
    options = {**vars(args)}  # as they are given. Below, args gets the values of the others.

    # How to compute. float16 needs a scaler, because small gradients would underflow to 0. With
    # another dtype the scaler does nothing.
    device = devices.prepare_device(args.device)
    on_gpu = device.type == "cuda"
    if args.workers is None and device.type == "cpu":
        args.workers = 0  # the model keeps the cores busy
    if args.dtype is None:
        args.dtype = devices.pick_dtype(device)
    dtype = getattr(torch, args.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=args.dtype != "float32")
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")

    # The model and the data. One process draws, downloads and indexes what is missing, while the
    # others wait.
    with one_first():
        train_data = args.train_data or [find_or_make_scenes(SCENES_FOLDER)]
        shards, val_shards = shards_of_run(train_data, args.val_data)
        if last is None:
            model, tokenizer, new_names = build_model(args, shards)
        else:
            parts = last["model"], last["config"], last["vocab"]
            model, tokenizer = run.restore(f"{args.resume}/last.pt", *parts)
            new_names = last["header"]["new_names"]
        image_size = model.config.image_size
        samples = data.open_samples(shards, args.captions)
        val_samples = None
        if val_shards:
            val_samples = data.open_samples(val_shards, args.val_captions or args.captions)
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
    cli.check(len(pairs) >= args.batch_size, f"--batch_size exceeds the {len(pairs):,} pairs")
    if val_samples is None:
        print("no validation pairs, so best.pt will be the newest model (see --val_data)")
    model.to(device).train()
    devices.compile_if_wanted(model, args.compile)
    optimizer = make_optimizer(model, args.learning_rate, args.weight_decay, new_names)

    # Its steps, and those after which it validates. 0 is before the first one.
    args.steps, args.warmup_steps, args.eval_every = count_steps(args, len(pairs))
    eval_steps = {*range(0, args.steps, args.eval_every), args.steps}
    start = 0
    best_r1 = 0.0  # the highest score of a validation: the mean of R@1 over both directions
    header = run.make_header(args, options, device, model, pairs, val_samples, new_names)
    if last is not None:
        run.check_data_and_steps(last, header)
        run.load_states(last, optimizer, scaler)
        start = last["step"]
        best_r1 = last["best_r1"]
        # last.pt is saved before a validation, which may be missing then. So make it again.
        if run.validation_was_due(last):
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
    no_bar = RANK > 0 or None  # None: there is a bar if the output is a terminal
    for step in tqdm(rounds, initial=start, total=args.steps, unit="step", disable=no_bar):
        # 1. Process 0 saves every ten minutes, and before a validation, which may fail. Then it
        # validates. The other processes wait in part 3, or at the end.
        is_due = step in eval_steps or time.perf_counter() > saved_at + 600
        if RANK == 0 and is_due and step > start:
            facts = {"header": header, "step": step, "best_r1": best_r1}
            states = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            run.write_checkpoint(out / "last.pt", model, tokenizer.vocab, **facts, **states)
            saved_at = time.perf_counter()
        if RANK == 0 and step in eval_steps:
            row = validate(args, model, tokenizer, val_samples, zeroshot_images, step)
            run.log(out, row)
            mean_r1 = row.get("mean_r1", 0.0)  # without validation pairs the newest is best
            if mean_r1 >= best_r1:
                best_r1 = mean_r1
                if step > 0:  # the weights before training only set the score to beat
                    facts = {"header": header, "step": step, "best_r1": best_r1}
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

        # 5. The log, at few steps only, because reading the losses makes the CPU wait for the GPU.
        # So read them before the clock. Before a validation there is always a row.
        done = step + 1
        is_logged = done % args.log_every == 0 or done in eval_steps
        if is_logged:
            means = mean_of_all(losses)  # the loss and its terms
        seconds = time.perf_counter() - began  # without saves and validations
        since_row.update(steps=1, seconds=seconds, waited=waited, replaced=num_replaced)
        if is_logged:
            advice = "lower --learning_rate, or use another --dtype"
            cli.check(math.isfinite(means["loss"]), f"the loss is not finite: {advice}")
            speed = since_row["steps"] * args.batch_size / since_row["seconds"]
            row = {
                "step": done,
                **means,
                "logit_scale": model.logit_scale.exp().item(),
                # None if float16's gradients have overflowed
                "grad_norm": grad_norm.item() if grad_norm.isfinite() else None,
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
