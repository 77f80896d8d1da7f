"""Train CLIP with SuperCLIP's word head, on one CPU or GPU, or with torchrun on many.

    python train.py                       built-in scenes, one to two minutes on two cores
    python train.py --batch_size 256 --train_data cc3m/ --model ViT-B-16
    torchrun --nproc_per_node 8 train.py --batch_size 4096 --train_data cc3m/ --model ViT-B-16

The file begins with the run and its loop. Then come the parts of a step, the parts of the set-up,
and the options with their defaults. Read superclip.py before this file.

A step follows from the options and its number: they decide the batch, its crops, the patches that
are kept, and the learning rate. So last.pt holds only the weights, the token counts, the optimizer,
and for float16 the loss scaler. On a CPU a run that was killed and resumed ends with the same bits
as a run that was not. On a GPU it may not, because some CUDA kernels add numbers in no fixed order.
"""

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
    # Only float16 needs a scaler: without one small gradients would underflow to 0.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    with processes.one_first():  # the first process draws, indexes and downloads for all
        if args.scenes:
            find_or_make_scenes("scenes")
        shards, val_shards = shards_of_run(args.train_data, args.val_data)
        model, tokenizer, new_parameters = build_model(args, shards, device)
        pairs, val_samples, zeroshot_images = open_data(args, shards, val_shards, model, tokenizer)
    optimizer = make_optimizer(model, args.learning_rate, args.weight_decay, new_parameters)
    steps, warmup_steps, eval_every = count_steps(args, len(pairs))
    eval_steps = {*range(0, steps, eval_every)} | {steps}  # after how many steps a run validates

    # Process 0 chooses the folder of the run, and writes last.pt, best.pt and the log there.
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
    if RANK == 0 and args.resume:
        run.cut_log(out, start, eval_due=start in eval_steps)  # drop what is logged again
    run.log_header(out, header, start)  # the conditions under which all rows are measured

    ddp_model = model
    if WORLD > 1:
        # Average the gradients of all processes. A bucket view avoids a copy of all gradients.
        # Buffers need no broadcast, because the counts are sums over all processes.
        ddp_model = DistributedDataParallel(
            model, gradient_as_bucket_view=True, broadcast_buffers=False
        )
    B = args.batch_size // WORLD  # pairs of this process
    place = slice(RANK * B, (RANK + 1) * B)  # their place in the batch of all processes
    batches = data.load_batches(pairs, args.batch_size, place, start, steps, args.workers, on_gpu)

    todo = range(start, steps + 1)  # the last round has no step, and only saves and validates
    if RANK == 0:
        todo = tqdm(todo, total=steps, initial=start, unit="step", disable=None)
    logged, waited, clock = start, 0.0, time.perf_counter()  # since the last row of the log
    saved = clock
    for step in todo:
        # 1. Process 0 saves last.pt every ten minutes, and before a validation, because that may
        # fail. Then it validates, and saves best.pt if no score was higher. Without validation
        # pairs the newest is the best. Meanwhile the others wait for it in part 3, or in main.
        eval_due = step in eval_steps
        if RANK == 0 and (eval_due or time.perf_counter() > saved + 600):
            checkpoint = {
                "model": model.state_dict(),  # no copy, so it must be written before the next step
                "config": vars(model.config),
                "vocab": tokenizer.vocab,
                "header": header,
                "step": step,
                "best_r1": best_r1,
            }
            if step > start:
                states = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
                run.write_checkpoint(out / "last.pt", {**checkpoint, **states})
            if eval_due:
                row = validate(args, model, tokenizer, val_samples, zeroshot_images, step)
                run.log(out, row)
                mean_r1 = row.get("mean_r1", 0.0)
                if mean_r1 >= best_r1:
                    best_r1 = mean_r1
                    checkpoint["best_r1"] = best_r1
                    if step > 0:  # the weights before training only set the score to beat
                        run.write_checkpoint(out / "best.pt", checkpoint)
            # Count images per second from here on, because a save waits for the GPU.
            saved = time.perf_counter()
            logged, waited, clock = step, 0.0, saved
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
            group["lr"] = group["peak_rate"] * factor
        scaler.unscale_(optimizer)
        # Clip to length 1, as nanoGPT does. The authors do not clip. Every gradient in the logs of
        # study/ is longer, so there all get the same length.
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # open_clip's bounds

        # 5. The log, at few steps only, because reading the losses makes the CPU wait for the GPU.
        # They are read before the clock is, so that the time includes the work of the GPU. Process
        # 0 writes the row. All processes check that the loss is finite.
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
            run.log(out, row)
            logged, waited, clock = done, 0.0, time.perf_counter()
    run.print_commands(out, model, val_samples)


# -----------------------------------------------------------------------------
# The parts of a step


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
    in float32. Print the scores, and return them as a row of the log, where mean_r1 is the mean of
    R@1 over both directions. samples: data.Samples or None; zeroshot_images: a dict {folder of
    --zeroshot_data: its images}."""
    tqdm.write(f"\nvalidation after step {step}")
    row = {"step": step, "zeroshot": {}}
    model.eval()
    # Do not use the compiled towers: shapes and dtypes differ from those of training.
    with torch.compiler.set_stance("force_eager"):
        if samples is not None:
            # The loss of groups as large as a batch can be compared with that of the training. If
            # val_contrastive_loss rises while contrastive_loss falls, the model overfits.
            group = args.batch_size
            row |= evaluation.score_pairs(model, tokenizer, samples, args.workers, group)
            evaluation.print_words(model, tokenizer, samples)
        for folder, images in zeroshot_images.items():
            score = evaluation.zeroshot(model, tokenizer, images, workers=args.workers)
            tqdm.write(evaluation.format_score(f"zero-shot {Path(folder).name}", score))
            row["zeroshot"][folder] = score
    model.train()
    return row


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
    zeroshot_images = {x: data.class_pictures(x, size) for x in args.zeroshot_data}
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
    """Return AdamW. Each group of parameters has its peak learning rate in "peak_rate".
    new_parameters: names of those that --init_from lacks, whose peak is RATE_OF_NEW_PARAMETERS at
    any learning rate."""

    def two_groups(named, peak):
        # Only matrices decay: no biases, norms, class token or logit scale.
        matrices = [p for _, p in named if p.ndim >= 2]
        vectors = [p for _, p in named if p.ndim < 2]
        return [
            {"params": matrices, "peak_rate": peak, "weight_decay": weight_decay},
            {"params": vectors, "peak_rate": peak, "weight_decay": 0.0},
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
    the best score so far. Raise InputError if it is from another training than this one. header,
    vocab: those of this run."""
    path = out / "last.pt"
    saved = run.read_checkpoint(path)
    cli.check("optimizer" in saved, f"{path} is not the last.pt of a run")
    run.check_same_run(saved, header, vocab)
    model.load_state_dict(saved["model"])
    # Keep the groups of this optimizer, so that a new --learning_rate counts. The file numbers the
    # moments in the order of the parameters in these groups.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({**saved["optimizer"], "param_groups": groups})
    if saved["scaler"]:  # its state is empty without float16
        scaler.load_state_dict(saved["scaler"])
    best_r1 = saved["best_r1"]
    if (out / "best.pt").exists():  # last.pt may lack its score, because last.pt is written first
        best_r1 = run.read_checkpoint(out / "best.pt")["best_r1"]
    return saved["step"], best_r1


# -----------------------------------------------------------------------------
# Options. `python train.py --help` explains them. General defaults stand in the parser.

# The defaults without --train_data, for a run on the built-in scenes. They were chosen together, so
# that a CPU learns in minutes.
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
    "workers": 0,  # the scenes are small, and the model keeps the cores busy
    "compile": False,  # it would take longer than the run
}
# The defaults with --init_from. A larger learning rate would destroy what the weights know.
FINE_TUNING = {"learning_rate": 5e-5, "model": None}
# Parameters that the checkpoint lacks, such as those of a new word head, know nothing yet.
RATE_OF_NEW_PARAMETERS = 5e-4


def epochs_on_scenes(batch_size):
    """Return the default of --epochs for the scenes: 1,000 steps of 32 pairs. A batch four times as
    large makes half as many steps. By trial this was a good compromise between as many samples and
    as many steps."""
    return round(1.6 * math.sqrt(batch_size / 32), 3)


def make_parser():
    parser = cli.make_parser(__doc__, "captions", "device")  # other commands have them, too
    parser.usage = "python train.py [options]   (--help explains them)"  # a list would be long
    parser.epilog = "The built-in scenes have other defaults. A run prints its options."
    add = parser.add_argument
    length = parser.add_mutually_exclusive_group()
    count = cli.number(int, 1)
    not_negative = cli.number(float, 0)
    # fmt: off
    # the data
    add("--train_data", nargs="+", metavar="SHARDS",
        help="tar files, folders, globs or {0000..0575} (default: built-in scenes)")
    add("--val_data", nargs="+", metavar="SHARDS",
        help="shards to validate on, or none (default: those of --train_data named val or test)")
    add("--zeroshot_data", nargs="+", default=[], metavar="DIR",
        help="folders to classify at each validation; each holds a folder of images per class")
    add("--label_captions", nargs="+", metavar="SOURCE",
        help="where the words to predict come from (default: the caption of the step)")
    add("--val_captions", nargs="+", metavar="SOURCE",
        help="where the captions of the validation pairs are (default: --captions)")
    add("--vocab", metavar="FILE",
        help="file, or clip for CLIP's (default: vocab.tiktoken beside the shards, else clip)")
    add("--crop_area", type=cli.number(float, 0.01, 1), default=0.9, metavar="SHARE",
        help="smallest share of a picture in a crop; 1: its middle square (default %(default)s)")
    add("--patch_dropout", type=cli.number(float, 0, 0.99), default=0.0, metavar="SHARE",
        help="share of the patches that each step leaves out, at random (default %(default)s)")
    add("--workers", type=cli.number(int, 0, 999),
        help="loading processes per GPU (default: the cores, divided among the GPUs, at most 16)")
    # the model
    add("--model", choices=PRESETS, default="ViT-B-16",
        help="size of both towers (default ViT-B-16, or that of --init_from)")
    add("--image_size", type=count, metavar="PIXELS",
        help="side of the square images (default: that of --model, 224 for all but tiny)")
    add("--init_from", metavar="FILE", help="checkpoint whose weights and vocabulary to begin with")
    add("--cls_weight", type=not_negative,
        help="weight of the classification loss; 0 trains plain CLIP (default 1, or the weight in "
        "--init_from if that has a word head)")
    add("--loss", choices=("softmax", "sigmoid"),
        help="contrastive loss: CLIP's softmax or SigLIP's sigmoid (default softmax)")
    # the training
    length.add_argument("--steps", type=count, help="length of the run in steps")
    length.add_argument("--epochs", type=cli.number(float, 1e-6),
        help="length of the run in passes over the data (default 30)")
    add("--batch_size", type=count, default=256,
        help="pairs in each step, counted over all processes (default %(default)s)")
    add("--micro_batch_size", type=count,
        help="pairs in the towers at once: less memory, same gradients (default: all of a process)")
    # That of CLIP's ViT-B, which has batches of 32,768. We did not search another one for 256.
    add("--learning_rate", type=not_negative, default=5e-4,
        help="peak learning rate (default 5e-4, or 5e-5 with --init_from)")
    add("--weight_decay", type=not_negative, default=0.2,
        help="weight decay of AdamW, which only matrices have (default %(default)s)")
    add("--seed", type=cli.number(int, 0, 2**31), default=0,
        help="seed for weights, order, captions, crops and patch dropout (default %(default)s)")
    # the machine
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="dtype of the steps (default: bfloat16 where there are units for it, else float16 on "
        "a GPU and float32 on a CPU)")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="compile towers and word head (default: on CUDA under Linux, if torch can)")
    # the run
    add("--out_dir", metavar="DIR", help="folder of the run (default: a new one)")
    add("--resume", action="store_true",
        help="go on with the run in --out_dir, if it holds one: repeat its command, and add this")
    add("--log_every", type=count, default=20, help="steps between log rows (default %(default)s)")
    add("--eval_every", type=count,
        help="steps between validations (default: steps / 3, at most 2000)")
    # fmt: on
    return parser


def parse(argv):
    """Return the options, with the defaults of a run on scenes or from a checkpoint where the user
    gives none."""
    parser = make_parser()
    given = parser.parse_args(argv)
    on_scenes = given.train_data is None
    if on_scenes:
        parser.set_defaults(**SCENES)
    if given.init_from is not None:
        parser.set_defaults(**FINE_TUNING)
    args = parser.parse_args(argv)
    if args.init_from is not None:
        for name in ("model", "image_size", "vocab", "loss"):
            is_free = getattr(args, name) is None
            cli.check(is_free, f"--init_from sets --{name}. Leave this option out.")
    if args.steps is None and args.epochs is None:
        args.epochs = epochs_on_scenes(args.batch_size) if on_scenes else 30.0
    is_multiple = args.batch_size % (WORLD * (args.micro_batch_size or 1)) == 0
    cli.check(is_multiple, "--batch_size must be a multiple of processes times --micro_batch_size")
    has_folder = args.out_dir is not None or not args.resume
    cli.check(has_folder, "--resume needs --out_dir, the folder of the run")
    print("options:", {name: x for name, x in vars(args).items() if x is not None})
    args.scenes = on_scenes  # train() draws them; no option, so it is not printed
    return args


def main(argv):
    with processes.joined_processes():
        train(parse(argv))


if __name__ == "__main__":
    cli.run_command(main)
