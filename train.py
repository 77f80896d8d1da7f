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
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import data
import eval as evaluation
from common import cli, devices, run
from common.processes import RANK, WORLD, default_workers, joined_processes, mean_of_all, one_first
from common.scenes import find_or_make_scenes
from common.shards import shards_of_run
from common.tokenizer import tokenizer_for
from superclip import PRESETS, SuperCLIP, SuperCLIPConfig

# -----------------------------------------------------------------------------
# The options. One with the name of a field of SuperCLIPConfig sets this field. In this list, each
# replaces what comes before it:
#
#     1. the defaults of OPTIONS
#     2. without --train_data, those of SCENES
#     3. with --init_from, those of INIT_FROM
#     4. what is typed
#
# If an option is still None, the rule in its meaning decides, mostly in `resolve`. last.pt has what
# was decided. So a run that goes on has its own options in place of 2 and 3.

# Kinds of options, as argparse takes them
TEXT = {"type": str}
NAMES = {"nargs": "+"}
COUNT = {"type": cli.number(int, 1)}
COUNT_OR_0 = {"type": cli.number(int, 0)}
AMOUNT = {"type": cli.number(float, 0)}
EPOCHS = {"type": cli.number(float, 0.001)}
CROP = {"type": cli.number(float, 0.01, 1)}
DROPOUT = {"type": cli.number(float, 0, 0.99)}
DTYPES = {"choices": ("float32", "bfloat16", "float16")}
FLAG = {"action": argparse.BooleanOptionalAction}

# name: (default, kind, meaning). None: the run chooses, by the rule in the meaning.
OPTIONS = {
    # Data
    "train_data": (None, NAMES, "tars, folders, globs or {0000..0575}; by default built-in scenes"),
    "val_data": (None, NAMES, "shards to validate on, or none; by default those named val or test"),
    "zeroshot_data": ([], NAMES, "folders with a folder of pictures per class, or none"),
    "captions": (["txt"], NAMES, "sources of captions, one or more of txt and json.FIELD"),
    "label_captions": (None, NAMES, "sources of the words to predict; by default the caption"),
    "val_captions": (None, NAMES, "sources of captions in validations; by default --captions"),
    "vocab": (None, TEXT, "file, or clip; by default vocab.tiktoken beside the shards, else clip"),
    "crop_area": (0.9, CROP, "least share of a picture to keep; 1: the middle square"),
    "patch_dropout": (0.0, DROPOUT, "share of the patches to leave out at random, as FLIP does"),
    # Model and loss
    "init_from": (None, TEXT, "checkpoint, which sets --model, --image_size, --loss and --vocab"),
    "model": ("ViT-B-16", {"choices": PRESETS}, "size of both towers"),
    "image_size": (None, COUNT, "pixels a side; by default 72 for tiny, else 224"),
    "loss": ("softmax", {"choices": ("softmax", "sigmoid")}, "CLIP's loss, or SigLIP's"),
    "cls_weight": (1.0, AMOUNT, "weight of the classification loss; 0: plain CLIP"),
    # Training. 5e-4 is CLIP's rate for ViT-B in batches of 32,768. It is untuned for 256.
    "steps": (None, COUNT, "length of the run; by default --epochs decides"),
    "epochs": (None, EPOCHS, "passes; by default 30, and for scenes 1.6 * sqrt(batch_size / 32)"),
    "batch_size": (256, COUNT, "pairs in each step, over all processes"),
    "micro_batch_size": (None, COUNT, "pairs in the towers at once to save memory; by default all"),
    "learning_rate": (5e-4, AMOUNT, "peak; with --init_from 5e-5, and tenfold for new parts"),
    "warmup_steps": (None, COUNT_OR_0, "steps with a rising rate; by default half, at most 3000"),
    "weight_decay": (0.2, AMOUNT, "of AdamW, for matrices"),
    "seed": (0, {"type": cli.number(int, 0, 2**31)}, "of all draws in training"),
    # Machine and folder
    "workers": (None, COUNT_OR_0, "loaders; by default cores / GPUs up to 16, scenes on a CPU: 0"),
    "device": (None, TEXT, "cuda, mps or cpu; by default cuda if there is such a GPU, else cpu"),
    "dtype": (None, DTYPES, "dtype of steps; by default a fast one of this device"),
    "compile": (None, FLAG, "compile towers and head; by default on CUDA under Linux, if it works"),
    "out_dir": (None, TEXT, "folder of the run; by default a new one"),
    "resume": (None, TEXT, "folder of a run to go on with, which keeps its options"),
    "log_every": (20, COUNT, "steps between rows of the log"),
    "eval_every": (None, COUNT, "steps between validations; by default a third, at most 2000"),
}
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
INIT_FROM = {  # other defaults with --init_from. None: the value of the checkpoint
    "model": None,
    **{name: None for name in OPTIONS if hasattr(SuperCLIPConfig, name)},
    "learning_rate": 5e-5,  # a higher rate would destroy what the model knows
}
# What may be typed beside --resume, because it changes neither the model nor what it has learned
MAY_CHANGE = (
    "train_data",  # the same data in another place
    "val_data",
    "zeroshot_data",
    "steps",
    "learning_rate",
    "micro_batch_size",
    "workers",
    "device",
    "dtype",
    "compile",
    "log_every",
    "eval_every",
)


def parse(argv):
    """Return all options of a run as a dict. Also return what the run's last.pt holds, or None if
    the run starts. Then options that are None are still open."""
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
    defaults = {name: default for name, (default, _, _) in OPTIONS.items()}
    if typed.get("zeroshot_data") == ["none"]:
        typed["zeroshot_data"] = []
    if "resume" in typed:
        fixed = sorted(f"--{name}" for name in typed.keys() - {"resume", *MAY_CHANGE})
        advice = "Leave it out, or start a new run."
        cli.check(not fixed, f"--resume cannot change {', '.join(fixed)}. {advice}")
        last = run.read_last(typed["resume"])
        options = {**defaults, **last["header"]["options"], **typed}
    else:
        last = None
        options = defaults
        if "train_data" not in typed:
            options |= SCENES
        if "init_from" in typed:
            options |= INIT_FROM
            for name in ("model", "image_size", "loss", "vocab"):
                cli.check(name not in typed, f"--init_from sets --{name}. Leave this out.")
        if "out_dir" in typed:
            run.check_is_new(typed["out_dir"])
        both = {"steps", "epochs"} <= typed.keys()
        cli.check(not both, "give --steps or --epochs, but not both")
        options |= typed

    B, rest = divmod(options["batch_size"], WORLD)  # B: pairs of one process
    cli.check(rest == 0, f"--batch_size must be a multiple of the {WORLD} processes")
    micro_batch_size = options["micro_batch_size"] or B
    fits = micro_batch_size >= B or B % micro_batch_size == 0
    cli.check(fits, f"--micro_batch_size must divide the {B} pairs of a process")
    return options, last


def resolve(options, device, num_pairs):
    """Return the options of a run that starts as a namespace, in which the rules of OPTIONS have
    decided what was open. num_pairs: those to train on."""
    args = argparse.Namespace(**options)
    args.device = args.device or device.type
    if args.val_captions is None:
        args.val_captions = args.captions
    if args.dtype is None:
        args.dtype = devices.pick_dtype(device)
    if args.compile is None:
        args.compile = devices.can_compile(device)
    if args.workers is None:
        args.workers = default_workers()
        if args.train_data is None and device.type == "cpu":
            args.workers = 0  # scenes are small, and the model keeps the cores busy
    if args.steps is None:
        # A batch of scenes that is four times as large makes half as many steps.
        default = 30 if args.train_data else round(1.6 * math.sqrt(args.batch_size / 32), 3)
        args.steps = max(1, round((args.epochs or default) * (num_pairs // args.batch_size)))
        args.epochs = None  # it has done its work
    if args.warmup_steps is None:  # a short warm-up hurts plain CLIP most (study/results.md)
        args.warmup_steps = min(3000, args.steps // 2)
    if args.eval_every is None:
        args.eval_every = min(2000, math.ceil(args.steps / 3))
    cli.check(num_pairs >= args.batch_size, f"--batch_size exceeds the {num_pairs:,} pairs")
    return args


# -----------------------------------------------------------------------------
# The model, the optimizer, the learning rate, and a validation


def build_model(args, shards):
    """Return the model of a new run, its tokenizer, and the names of the tensors that --init_from
    lacks, as a checkpoint of plain CLIP lacks the word head."""
    if args.init_from is None:
        tokenizer = tokenizer_for(shards, args.vocab)
        fields = {**PRESETS[args.model], "vocab_size": tokenizer.vocab_size}
    else:
        pretrained, tokenizer, _ = run.read_model(args.init_from)
        fields = vars(pretrained.config).copy()
        if pretrained.head is None:
            del fields["cls_weight"]  # plain CLIP gets a word head, with the weight of the default
    for name, value in vars(args).items():
        if hasattr(SuperCLIPConfig, name) and value is not None:  # an option such as --cls_weight
            fields[name] = value
    try:
        config = SuperCLIPConfig(**fields)
    except AssertionError as error:  # such as an --image_size that patches do not fill
        raise cli.InputError(f"these options make no model: {error}") from error
    tokenizer.context_length = config.context_length  # to which it cuts captions

    torch.manual_seed(args.seed)  # each process begins with the same weights
    model = SuperCLIP(config)
    if args.init_from is None:
        return model, tokenizer, []
    return model, tokenizer, run.load_pretrained(model, pretrained, args.init_from)


def make_optimizer(model, weight_decay, new_names=()):
    """Return AdamW. Each step sets the learning rate of a group of parameters, which is multiplied
    by the group's relative_rate. It is 10 for those in new_names, because they know nothing yet."""
    params = {}  # of each group: (weight decay, relative rate) -> a list
    for name, p in model.named_parameters():
        decay = weight_decay if p.ndim >= 2 else 0.0  # none for biases and norms
        relative_rate = 10.0 if name in new_names else 1.0
        params.setdefault((decay, relative_rate), []).append(p)
    groups = []
    for (decay, relative_rate), several in params.items():
        groups.append({"params": several, "weight_decay": decay, "relative_rate": relative_rate})
    # CLIP and SuperCLIP have these betas and eps. fused computes all of Adam in one kernel.
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)


def learning_rate_factor(step, warmup_steps, steps):
    """Return the learning rate of a step as a share of its peak: up a line, down a cosine."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def validate(args, model, tokenizer, samples, zeroshot_images):
    """Score retrieval and zero-shot classification in float32. Print the scores, and return them as
    a row of the log. samples: data.Samples, or None; zeroshot_images: a dict {folder: Pictures}."""
    row = {"zeroshot": {}}
    model.eval()
    # Do not use the compiled towers: shapes and dtypes differ from those of training.
    with torch.compiler.set_stance("force_eager"):
        if samples is not None:
            row |= evaluation.score_pairs(model, tokenizer, samples, args.workers, args.batch_size)
            evaluation.print_pairs(row, model, tokenizer, samples)
        for folder, name in run.names_of(zeroshot_images).items():
            images = zeroshot_images[folder]
            score = evaluation.zeroshot(model, tokenizer, images, workers=args.workers)
            tqdm.write(evaluation.format_score(f"zero-shot {name}", score))
            row["zeroshot"][folder] = score
    model.train()
    return row


# -----------------------------------------------------------------------------
# The run


def train(options, last):
    """Train from the first step, or go on from `last`. The arguments are what `parse` returns."""
    device = devices.prepare_device(options["device"])
    on_gpu = device.type == "cuda"

    # The data and the model. One process draws, downloads and indexes what is missing first.
    with one_first():
        train_data = options["train_data"] or [find_or_make_scenes("scenes")]
        shards, val_shards = shards_of_run(train_data, options["val_data"])
        samples = data.open_samples(shards, options["captions"])
        if last is None:
            args = resolve(options, device, len(samples))
            model, tokenizer, new_names = build_model(args, shards)
            for name, value in vars(model.config).items():
                if name in args:  # an option such as --image_size has the value of the model
                    setattr(args, name, value)
        else:
            args = argparse.Namespace(**options)
            model, tokenizer = run.restore(f"{args.resume}/last.pt", last)
            new_names = last["header"]["new_names"]
        too_long = f"--warmup_steps {args.warmup_steps} exceeds the {args.steps} steps of the run"
        cli.check(args.warmup_steps <= args.steps, too_long)
        print("options:", {name: x for name, x in vars(args).items() if x is not None})
        val_samples = None
        if val_shards:
            val_samples = data.open_samples(val_shards, args.val_captions)
        else:
            print(
                "There are no validation pairs (--val_data), so best.pt will be the newest model."
            )
        image_size = model.config.image_size
        zeroshot_images = {}
        for folder in args.zeroshot_data:
            zeroshot_images[folder] = evaluation.zeroshot_pictures(folder, image_size, tokenizer)
    pairs = data.Pairs(
        samples,
        tokenizer,
        image_size,
        args.batch_size,
        label_sources=args.label_captions,
        seed=args.seed,
        crop_area=args.crop_area,
        num_patches=model.visual.grid**2,
        patch_dropout=args.patch_dropout,
    )

    # How to compute. In float16 small gradients would underflow to 0, so scale the loss.
    model.to(device).train()
    if args.compile:
        devices.compile_parts(model)
    optimizer = make_optimizer(model, args.weight_decay, new_names)
    dtype = getattr(torch, args.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # Where the run begins, and the steps after which it validates. 0 is before the first step.
    eval_steps = {*range(0, args.steps, args.eval_every), args.steps}
    start = 0
    header = run.make_header(args, device, model, pairs, val_samples, new_names)
    if last is not None:
        run.check_goes_on(last, header)
        optimizer.load_state_dict(last["optimizer"])
        if last["scaler"]:  # it is empty without float16
            scaler.load_state_dict(last["scaler"])
        start = last["step"]
        last.clear()  # free the memory of its weights and of Adam's moments
    run.check_processes(header, start)
    out = run.make_folder(args)
    save_last = partial(run.save_last, out, model, tokenizer, optimizer, scaler, header)
    if RANK == 0:
        save_last(start)  # before the log has the header, so whatever has a log can be resumed
    run.begin_log(out, header, start)

    # Each process loads a part of every batch, and DDP averages the gradients.
    batches = data.load_batches(pairs, start, args.steps, args.workers, pin=on_gpu)
    ddp_model = model
    if WORLD > 1:
        ddp_model = DDP(model, gradient_as_bucket_view=True, broadcast_buffers=False)

    # A round first saves and validates what the steps before it have learned, and then makes a
    # step. The last round only saves and validates. Both happen right behind a row of the log, so
    # that the next row has the speed of the training alone. `clock` is when that speed begins.
    rounds = tqdm(
        range(start, args.steps + 1),
        initial=start,
        total=args.steps,
        unit="step",
        disable=True if RANK else None,  # None: show a bar if the output is a terminal
    )
    saved_at = clock = time.perf_counter()
    sums = Counter()  # over the steps since the last row of the log; its `update` adds
    for step in rounds:
        # 1. Process 0 saves every ten minutes, and before a validation, which may fail. Then it
        # validates. The other processes wait in part 3, or at the end.
        is_validated = step in eval_steps
        is_behind_row = not sums
        is_old = time.perf_counter() > saved_at + 600
        if RANK == 0 and is_behind_row and (is_validated or is_old):
            if step > start:
                save_last(step)
            if is_validated:
                tqdm.write(f"\nvalidation after step {step}")
                row = validate(args, model, tokenizer, val_samples, zeroshot_images)
                run.log(out, step, row)
                run.keep_best(out, model, tokenizer, header, step)
            saved_at = clock = time.perf_counter()
        if step == args.steps:
            break

        # 2. The batch, a dict of the arguments of SuperCLIP.forward
        began = time.perf_counter()
        batch, num_replaced = next(batches)  # some pairs may replace bad samples
        waited = time.perf_counter() - began  # the GPU may have been busy meanwhile
        batch = {name: x.to(device, non_blocking=on_gpu) for name, x in batch.items()}

        # 3. The losses and their gradient. The contrastive loss needs all pairs at once, so forward
        # itself splits a batch into micro-batches. The seed is for what a fork draws, for dropout.
        # The prime number keeps the seeds of two runs apart.
        torch.manual_seed((args.seed * 1_000_003 + step) * WORLD + RANK)
        with autocast:
            losses = ddp_model(**batch, micro_batch_size=args.micro_batch_size)
        scaler.scale(losses["loss"]).backward()

        # 4. The update. Clip the gradient to length 1, as nanoGPT does. The authors do not clip.
        # The scaler skips a step whose gradients have overflowed.
        factor = learning_rate_factor(step, args.warmup_steps, args.steps)
        for group in optimizer.param_groups:
            group["lr"] = factor * args.learning_rate * group.get("relative_rate", 1.0)
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.logit_scale.data.clamp_(0, math.log(100))  # open_clip's bounds

        # 5. The log, at few steps only. Before a validation there is always a row.
        done = step + 1
        sums.update(steps=1, waited=waited, replaced=num_replaced)
        if done % args.log_every == 0 or done in eval_steps:
            means = mean_of_all(losses)  # the loss and its terms, of this step; waits for the GPU
            seconds = time.perf_counter() - clock
            num_pairs = sums["steps"] * args.batch_size
            # In float16 a step may overflow, which halves the scale. Otherwise the scale is 1.
            is_well = math.isfinite(means["loss"]) or scaler.get_scale() > 1
            cli.check(is_well, "the loss is not finite. Lower --learning_rate, or change --dtype.")
            row = {
                **means,
                "logit_scale": model.logit_scale.exp().item(),
                "grad_norm": grad_norm.item(),
                "learning_rate": optimizer.param_groups[0]["lr"],  # not that of a new head
                # All steps since the last row
                "images_per_second": round(num_pairs / seconds, 1),
                "data_wait": round(sums["waited"] / seconds, 3),  # a share
                "bad_samples": round(sums["replaced"] * WORLD / num_pairs, 4),
                # The most since the run began, also in validations; 0 on a CPU
                "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            }
            run.log(out, done, row)
            tqdm.write(run.line_of(done, row, means))  # above the bar
            sums.clear()
            clock = time.perf_counter()
    run.print_commands(out, model, val_samples)


def main(argv):
    with joined_processes():
        train(*parse(argv))


if __name__ == "__main__":
    cli.run_command(main)
