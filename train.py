"""Train CLIP with SuperCLIP's word head, on one CPU or GPU, or with torchrun on many.

    python train.py                       built-in scenes, one to two minutes on two cores
    python train.py --batch_size 256 --train_data cc3m/ --model ViT-B-16
    torchrun --nproc_per_node 8 train.py --batch_size 4096 --train_data cc3m/ --model ViT-B-16

The file begins with the run and its loop. Then come the parts of a step, the parts of the set-up,
and the options with their defaults. Read superclip.py before this file. You need not open common/.

last.pt holds weights, token counts, the optimizer, and for float16 the loss scaler. Everything else
that a step needs follows from the options and the number of the step: the batch, its crops, the
patches that are kept, the learning rate. So no state of a random generator is saved, and on a CPU a
run that was killed and resumed ends with the same bits as a run that was not. On a GPU it may not,
because some CUDA kernels add numbers in no fixed order.
"""

import os

# Let a waiting thread sleep after a thousand rounds. GNU's OpenMP would let it spin for so long
# that beside another busy program a run would hardly advance. torch reads this at its import.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import eval as evaluation
from common import cli, devices, processes, run
from common.processes import RANK, WORLD
from common.scenes import find_or_make_scenes
from common.shards import shards_of_run
from common.tokenizer import tokenizer_for
from superclip import PRESETS, SuperCLIP, SuperCLIPConfig

# -----------------------------------------------------------------------------
# The run


def train(args):
    """Train from the first step, or from the last.pt of --resume."""
    device = devices.prepare_device(args.device)
    on_gpu = device.type == "cuda"
    dtype = args.dtype or devices.pick_dtype(device)
    autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
    # In float16 alone, small gradients would underflow to 0 without a scaler.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    with processes.one_first():  # the first process draws, indexes and downloads for all
        if args.scenes:
            find_or_make_scenes("scenes")
        shards, val_shards = shards_of_run(args.train_data, args.val_data)
        model, tokenizer, new_parameters = build_model(args, shards, device)
        pairs, val_samples, zeroshot_images = open_data(args, shards, val_shards, model, tokenizer)
    optimizer = make_optimizer(model, args.learning_rate, args.weight_decay, new_parameters)
    steps, warmup_steps, eval_every = count_steps(args, len(pairs))
    eval_steps = {*range(0, steps, eval_every), steps}  # when the run validates

    # The folder of the run, which holds last.pt, best.pt and the log. The first row of the log is
    # the header, the conditions of the run. Only process 0 writes.
    if RANK == 0:
        args.out_dir = run.claim_folder(args.out_dir, args.resume)
    args.out_dir = processes.from_all(args.out_dir)[0]
    out = Path(args.out_dir)
    header = run.header_of(args, steps, eval_every, model, pairs, val_samples, dtype, device)
    start = 0
    best_r1 = 0.0  # the highest score of a validation: the mean of R@1 over both directions
    if args.resume and (out / "last.pt").exists():
        start, best_r1 = load_last(out, header, tokenizer.vocab, model, optimizer, scaler)
    everywhere = processes.from_all((header["data_fingerprint"], start))
    cli.check(len({*everywhere}) == 1, "the processes see different data, or a different last.pt")
    run.start_log(out / "log.jsonl", header, start, eval_due=start in eval_steps)

    ddp_model = model
    if WORLD > 1:
        # Average the gradients of all processes. A bucket view avoids a copy of all gradients.
        # Buffers need no broadcast, because all processes count the same tokens.
        ddp_model = DistributedDataParallel(
            model, gradient_as_bucket_view=True, broadcast_buffers=False
        )
    B = args.batch_size // WORLD  # pairs of this process
    local = slice(RANK * B, (RANK + 1) * B)  # their place in the batch of all processes
    batches = data.load_batches(pairs, args.batch_size, local, start, steps, args.workers, on_gpu)

    todo = range(start, steps + 1)  # after the last step the run only validates
    if RANK == 0:
        todo = tqdm(todo, total=steps, initial=start, unit="step", disable=None)
    logged, waited, clock = start, 0.0, time.perf_counter()  # since the last row of the log
    saved_time = time.monotonic()
    for step in todo:
        # 1. Save last.pt every ten minutes, and before a validation, because that may fail. Then
        # validate, and save best.pt if no score was higher. Without pairs the newest is the best.
        # The other processes wait in part 3. A run that was killed here validates again.
        eval_due = step in eval_steps
        save_due = step > start and (eval_due or time.monotonic() > saved_time + 600)
        if RANK == 0 and (save_due or eval_due):
            checkpoint = {
                "model": model.state_dict(),
                "config": vars(model.config),
                "vocab": tokenizer.vocab,
                "header": header,
                "step": step,
                "best_r1": best_r1,
            }
            if save_due:
                states = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
                run.write_checkpoint(out / "last.pt", {**checkpoint, **states})
                saved_time = time.monotonic()
            if eval_due:
                row = validate(args, model, tokenizer, val_samples, zeroshot_images, step)
                run.log(out / "log.jsonl", row)
                mean_r1 = row.get("mean_r1", 0.0)
                if mean_r1 >= best_r1:
                    best_r1 = mean_r1
                    if step > 0:  # the weights before training only set the score to beat
                        run.write_checkpoint(out / "best.pt", {**checkpoint, "best_r1": best_r1})
                clock = time.perf_counter()
        if step == steps:
            break

        # 2. The batch, a dict of the arguments of SuperCLIP.forward
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        batch = {name: x.to(device, non_blocking=on_gpu) for name, x in batch.items()}

        # 3. The losses and their gradient. Gradients are not accumulated here: the contrastive loss
        # needs all pairs at once, so forward itself splits a batch into micro-batches.
        with autocast:
            losses = ddp_model(**batch, micro_batch_size=args.micro_batch_size)
        scaler.scale(losses["loss"]).backward()

        # 4. The update
        factor = learning_rate_factor(step, warmup_steps, steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        scaler.unscale_(optimizer)
        # Clip to length 1, as nanoGPT does. In our runs every gradient was longer, so all get the
        # same length. The authors do not clip.
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # CLIP's bounds; training is unstable beyond

        # 5. The log, at few steps only, because reading the losses makes the CPU wait for the GPU.
        # They are read before the clock is, so that the time includes the work of the GPU.
        done = step + 1
        if done % args.log_every == 0 or done in eval_steps:
            means = mean_losses(losses)
            seconds = time.perf_counter() - clock
            row = {
                "step": done,
                **means,
                "logit_scale": model.logit_scale.exp().item(),
                # None if float16's gradients have overflowed. Then the optimizer skips the step.
                "grad_norm": grad_norm.item() if grad_norm.isfinite() else None,
                "learning_rate": args.learning_rate * factor,
                "images_per_second": round((done - logged) * args.batch_size / seconds, 1),
                # The share of the time in which the CPU waits for a batch. A GPU may be busy then.
                "data_wait": round(waited / seconds, 3),
                "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),  # 0 on a CPU
            }
            run.log(out / "log.jsonl", row)
            logged, waited, clock = done, 0.0, time.perf_counter()
    print_commands(out, has_head=model.head is not None, has_val_pairs=val_samples is not None)


# -----------------------------------------------------------------------------
# The parts of a step, and what is printed at the end


def learning_rate_factor(step, warmup_steps, steps):
    """Return the learning rate of a step as a share of its peak. The share rises linearly to 1,
    and then falls to 0 along a cosine. It depends on the step alone, so there is no scheduler."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def mean_losses(losses):
    """Return the loss and its terms as a dict of floats, averaged over all processes. losses: what
    SuperCLIP.forward returns. Reading them makes the CPU wait for the GPU."""
    values = torch.stack([x.detach() for x in losses.values()])
    if WORLD > 1:
        dist.all_reduce(values)
        values /= WORLD
    return dict(zip(losses, values.tolist()))


def validate(args, model, tokenizer, samples, zeroshot_images, step):
    """Score retrieval among the validation samples, if there are any, and zero-shot classification,
    in float32. Print the scores, and return them as a row of the log. samples: data.Samples or
    None; zeroshot_images: a dict {folder of --zeroshot_data: its images}."""
    tqdm.write(f"\nvalidation after step {step}")
    row = {"step": step, "zeroshot": {}}
    model.eval()
    # Do not use the compiled towers: shapes and dtypes differ from those of training.
    with torch.compiler.set_stance("force_eager"):
        if samples is not None:
            # If val_contrastive_loss rises while contrastive_loss falls, the model overfits.
            group = args.batch_size
            row |= evaluation.score_pairs(model, tokenizer, samples, args.workers, group)
            evaluation.print_words(model, tokenizer, samples)
        for folder, images in zeroshot_images.items():
            score = evaluation.zeroshot(model, tokenizer, images, workers=args.workers)
            tqdm.write(evaluation.format_score(f"zero-shot {Path(folder).name}", score))
            row["zeroshot"][folder] = score
    model.train()
    return row


def print_commands(out, has_head, has_val_pairs):
    """Print the commands that show what the model of a run has learned. out: the folder."""
    path = out / "best.pt"
    if not path.exists():
        path = out / "last.pt"
        print("There is no best.pt: no validation was as good as the first. Lower --learning_rate.")
    options = f"--checkpoint {path.as_posix()}"
    if not has_val_pairs:
        options += " --images PICTURES"
    print("\nWhat the model has learned:")
    print(f'  python -m scripts.search {options} "TEXT"')
    if has_head:
        print(f"  python -m scripts.words {options} --out words.png")
    print(f"  python -m scripts.curves {(out / 'log.jsonl').as_posix()} --out curves.png")


# -----------------------------------------------------------------------------
# The parts of the set-up


def build_model(args, shards, device):
    """Return the model on its device, its tokenizer, and the names of the parameters that keep
    their random weights, because --init_from lacks them."""
    weights = None
    if args.init_from is None:
        tokenizer = tokenizer_for(shards, args.vocab)
        config = {**PRESETS[args.model], "vocab_size": tokenizer.vocab_size}
    else:
        pretrained, tokenizer = run.read_model(args.init_from)
        config = dict(vars(pretrained.config))
        weights = pretrained.state_dict()
        if pretrained.head is None and args.cls_weight is None:
            print(f"{args.init_from} has no word head. A new one is trained with --cls_weight 1.")
            config["cls_weight"] = 1.0
    # These options have the names of fields. If you add a field and an option, name it here, too.
    for name in ("image_size", "loss", "cls_weight"):
        value = getattr(args, name)
        if value is not None:
            config[name] = value
    config = SuperCLIPConfig(**config)
    is_multiple = config.image_size % config.patch_size == 0
    cli.check(is_multiple, f"--image_size must be a multiple of the patch_size {config.patch_size}")
    tokenizer.context_length = config.context_length
    torch.manual_seed(args.seed)  # each process begins with the same weights
    model = SuperCLIP(config)
    new_parameters = []
    if weights is not None:
        # Not strict, because the head may be new, or --cls_weight 0 may leave it out.
        new_parameters = model.load_state_dict(weights, strict=False).missing_keys

    model.to(device).train()
    if args.compile or (args.compile is None and devices.can_compile(device)):
        print("The first steps compile the model, which can take minutes.")
        # Compile part by part. Otherwise longer captions would recompile the image tower, too.
        for part in model.children():
            part.compile()
    return model, tokenizer, new_parameters


def open_data(args, shards, val_shards, model, tokenizer):
    """Return the training pairs (data.Pairs), the validation samples (data.Samples), or None if
    there are none, and a dict {folder of --zeroshot_data: its images}."""
    val_samples = None
    if val_shards:
        val_samples = data.Samples(val_shards, args.val_captions or args.captions)
    size = model.config.image_size
    zeroshot_images = {x: evaluation.ClassFolders(x, size) for x in args.zeroshot_data}
    pairs = data.Pairs(
        data.Samples(shards, args.captions),
        tokenizer,
        size,
        label_sources=args.label_captions,
        seed=args.seed,
        crop_area=args.crop_area,
        num_patches=model.visual.grid**2,
        patch_dropout=args.patch_dropout,
    )
    is_enough = args.batch_size <= len(pairs)
    too_few = f"--batch_size is {args.batch_size}, but there are only {len(pairs):,} pairs"
    cli.check(is_enough, too_few)
    return pairs, val_samples, zeroshot_images


def make_optimizer(model, learning_rate, weight_decay, new_parameters=()):
    """Return AdamW. Each group of parameters keeps its peak rate. new_parameters: names of those
    that --init_from lacks, whose peak is RATE_OF_NEW_PARAMETERS at any learning rate."""

    def two_groups(named, peak):
        # Only matrices decay: no biases, norms, class token or logit scale.
        matrices = [p for _, p in named if p.ndim >= 2]
        vectors = [p for _, p in named if p.ndim < 2]
        return [
            {"params": matrices, "peak": peak, "weight_decay": weight_decay},
            {"params": vectors, "peak": peak, "weight_decay": 0.0},
        ]

    named = list(model.named_parameters())
    groups = two_groups([x for x in named if x[0] not in new_parameters], learning_rate)
    if new_parameters:
        new = [x for x in named if x[0] in new_parameters]
        groups += two_groups(new, RATE_OF_NEW_PARAMETERS)
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


def load_last(out, header, vocab, model, optimizer, scaler):
    """Load the last.pt in the folder `out` into model, optimizer and scaler. Return its step, and
    the best score so far. header, vocab: those of this run, which must continue the same training.
    """
    saved = run.read_last(out / "last.pt", header, vocab)
    model.load_state_dict(saved["model"])
    # Keep the groups of this optimizer, so that a new --learning_rate counts. The file numbers the
    # moments in the order of the parameters in these groups.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({**saved["optimizer"], "param_groups": groups})
    if saved["scaler"]:  # its state is empty without float16
        scaler.load_state_dict(saved["scaler"])
    best_r1 = saved["best_r1"]
    if (out / "best.pt").exists():  # written after last.pt, so it may know a better score
        best_r1 = run.read_checkpoint(out / "best.pt")["best_r1"]
    return saved["step"], best_r1


# -----------------------------------------------------------------------------
# Options, and their defaults. `python train.py --help` explains them.

DEFAULTS = {
    "zeroshot_data": [],
    "captions": ["txt"],
    "crop_area": 0.9,
    "patch_dropout": 0.0,
    "model": "ViT-B-16",
    "batch_size": 256,
    # That of CLIP's ViT-B, which has batches of 32,768. We did not search another one for 256.
    "learning_rate": 5e-4,
    "weight_decay": 0.2,
    "seed": 0,
    "log_every": 20,
}
# Without --train_data a run trains on built-in scenes. These options were chosen together.
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
# With --init_from larger steps would destroy what the weights know. Parameters that the checkpoint
# lacks, such as those of a new word head, know nothing yet.
FINE_TUNING_OPTIONS = {"learning_rate": 5e-5, "model": None}
RATE_OF_NEW_PARAMETERS = 5e-4


def default_epochs(batch_size, on_scenes):
    """Return the length of a run in passes over the data. on_scenes: whether it is for scenes."""
    if not on_scenes:
        return 30.0
    # 1,000 steps of 32 pairs. A batch four times as large makes half as many steps. By trial this
    # was a good compromise between as many samples and as many steps.
    return round(1.6 * math.sqrt(batch_size / 32), 3)


def make_parser():
    """Return the parser of all options. `parse` fills in the defaults."""
    parser = cli.make_parser(__doc__, "device")  # an option that other commands have, too
    parser.usage = "python train.py [options]   (--help explains them)"  # a list would be long
    parser.epilog = """The built-in scenes have other defaults (SCENE_OPTIONS). A run prints its
        options when it starts."""
    count = cli.number(int, 1)
    not_negative = cli.number(float, 0)

    def add(name, text, to=parser, **options):
        if name in DEFAULTS:
            default = DEFAULTS[name]
            if isinstance(default, list):
                default = " ".join(default) or "none"
            text += f" (default {default})"
        to.add_argument(f"--{name}", help=text, **options)

    length = parser.add_mutually_exclusive_group()
    shards = dict(nargs="+", metavar="SHARDS")
    sources = dict(nargs="+", metavar="SOURCE")
    # fmt: off
    add("train_data", "tar files, folders, globs or {0000..0575} (default: built-in scenes)",
        **shards)
    add("val_data", "shards to validate on, or none (default: those of --train_data named val or "
        "test)", **shards)
    add("zeroshot_data", "folders to classify at each validation; each holds a folder of images "
        "per class", nargs="+", metavar="DIR")
    add("captions", "where captions are: txt or json.FIELD, one or more", **sources)
    add("label_captions", "where the words to predict come from (default: --captions)", **sources)
    add("val_captions", "where the captions of the validation pairs are (default: --captions)",
        **sources)
    add("vocab", "file, or clip for CLIP's (default: vocab.tiktoken beside the shards, else clip)",
        metavar="FILE")
    add("crop_area", "smallest share of a picture in a crop; 1: the square in the middle",
        type=cli.number(float, 0.01, 1), metavar="SHARE")
    add("patch_dropout", "share of the patches that is left out in each step, at random",
        type=cli.number(float, 0, 0.99), metavar="SHARE")
    add("workers", "loading processes per GPU (default: the cores, divided among the GPUs, at most "
        "16)", type=cli.number(int, 0, 999))
    # the model
    add("model", "size of both towers; --init_from brings its own", choices=PRESETS)
    add("image_size", "side of the square images (default: that of --model, 224 for all but tiny)",
        type=count, metavar="PIXELS")
    add("init_from", "checkpoint whose weights and vocabulary to begin with", metavar="FILE")
    add("cls_weight", "weight of the classification loss; 0 trains plain CLIP (default 1, or the "
        "weight in --init_from if that has a word head)", type=not_negative)
    add("loss", "contrastive loss: CLIP's softmax or SigLIP's sigmoid (default softmax)",
        choices=("softmax", "sigmoid"))
    # the training
    add("steps", "length of the run in steps (default: by --epochs)", to=length, type=count)
    add("epochs", "length of the run in passes over the data (default 30)", to=length,
        type=cli.number(float, 1e-6))
    add("batch_size", "pairs in each step, counted over all processes", type=count)
    add("micro_batch_size", "pairs in the towers at once: less memory, same gradients (default: "
        "all of a process)", type=count)
    add("learning_rate", "peak learning rate; 5e-5 with --init_from", type=not_negative)
    add("weight_decay", "weight decay of AdamW, which only matrices have", type=not_negative)
    add("seed", "seed for weights, order, captions, crops and patch dropout",
        type=cli.number(int, 0, 2**31))
    # the machine
    add("dtype", "dtype of the steps (default: bfloat16 where there are units for it, else float16 "
        "on a GPU and float32 on a CPU)", choices=("float32", "bfloat16", "float16"))
    add("compile", "compile towers and word head (default: on CUDA under Linux, if torch can)",
        action=argparse.BooleanOptionalAction)
    # the run
    add("out_dir", "folder of the run (default: a new one)", metavar="DIR")
    add("resume", "go on with the run in --out_dir, if it holds one: repeat its command, and add "
        "this", action="store_true")
    add("log_every", "steps between log rows", type=count)
    add("eval_every", "steps between validations (default: steps / 3, at most 2000)", type=count)
    # fmt: on
    return parser


def parse(argv):
    """Return the options. Those that are not given get their defaults."""
    args = make_parser().parse_args(argv)
    on_scenes = args.train_data is None
    defaults = dict(DEFAULTS)
    if on_scenes:
        defaults |= SCENE_OPTIONS
    if args.init_from is not None:
        defaults |= FINE_TUNING_OPTIONS
        for name in ("model", "image_size", "vocab", "loss"):
            is_free = getattr(args, name) is None
            cli.check(is_free, f"--init_from sets --{name}. Leave this option out.")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.steps is None and args.epochs is None:
        args.epochs = default_epochs(args.batch_size, on_scenes)
    is_multiple = args.batch_size % (WORLD * (args.micro_batch_size or 1)) == 0
    cli.check(is_multiple, "--batch_size must be a multiple of processes times --micro_batch_size")
    named = args.out_dir is not None or not args.resume
    cli.check(named, "--resume needs --out_dir, the folder of the run")
    print("options:", {name: x for name, x in vars(args).items() if x is not None})
    args.scenes = on_scenes  # train() draws them; no option, so it is not printed
    return args


def main(argv):
    with processes.joined_processes():
        train(parse(argv))


if __name__ == "__main__":
    cli.run_command(main)
