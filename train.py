"""Train CLIP with SuperCLIP's word head, on one CPU or GPU, or with torchrun on many.

    python train.py                       built-in scenes, about two minutes on two cores
    python train.py --batch_size 256 --train_data cc3m/ --model ViT-B-16
    torchrun --nproc_per_node 8 train.py --batch_size 2048 --train_data cc3m/ --model ViT-B-16

All that is random in a step follows from the seed and the number of the step. So on a CPU a run
that was killed and resumed ends with the same bits as a run that was not. A GPU may differ.
"""

import argparse
import math
import time
from pathlib import Path

# Before torch, which reads the environment variable that common/__init__.py sets.
from common import cli, devices, processes, run  # isort: skip

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import data
import eval as evaluation
from common.processes import RANK, WORLD
from common.scenes import find_or_make_scenes
from common.shards import shards_of_run
from common.tokenizer import tokenizer_for
from superclip import PRESETS, SuperCLIP, SuperCLIPConfig

# -----------------------------------------------------------------------------
# The options. One that has the name of a field of SuperCLIPConfig sets this field.


def make_parser():
    parser = cli.make_parser(__doc__)
    parser.usage = "python train.py [options]   (--help explains them)"  # a list would be long
    parser.epilog = "Shards: tar files, folders, globs or {0000..0575}. A run prints its options."
    add = parser.add_argument
    add_one_of = parser.add_mutually_exclusive_group().add_argument
    count = cli.number(int, 1)
    amount = cli.number(float, 0)
    share = cli.number(float, 0.01, 1)
    # fmt: off
    # The data
    add("--train_data", nargs="+", help="shards (default: built-in scenes, with other defaults)")
    add("--val_data", nargs="+", help="shards, or none (default: those named val or test)")
    add("--zeroshot_data", nargs="+", default=[], help="folders to score, with a folder per class")
    add("--captions", nargs="+", default=["txt"], help="sources, txt or json.FIELD (default: txt)")
    add("--label_captions", nargs="+", help="sources of words to predict (default: the caption)")
    add("--val_captions", nargs="+", help="sources for validation (default: --captions)")
    add("--vocab", help="file, or clip (default: vocab.tiktoken beside the shards, else clip)")
    add("--crop_area", type=share, default=0.9, help="share of the smallest crop; 1: middle square")
    add("--patch_dropout", type=cli.number(float, 0, 0.99), default=0.0, help="share to leave out")
    # The model and its loss
    add("--init_from", help="checkpoint to begin with; sets --model, --image_size, --loss, --vocab")
    add("--model", choices=PRESETS, default="ViT-B-16", help="size of both towers")
    add("--image_size", type=count, help="pixels a side (default: 224, or 72 for tiny)")
    add("--loss", choices=("softmax", "sigmoid"), help="CLIP's loss or SigLIP's (default: softmax)")
    add("--cls_weight", type=amount,
        help="weight of the classification loss; 0: plain CLIP (default: 1, or as in --init_from)")
    # The training. 5e-4 is CLIP's rate for ViT-B in batches of 32,768. We tried none at 256.
    add_one_of("--steps", type=count, help="length of the run in steps (default: by --epochs)")
    add_one_of("--epochs", type=cli.number(float, 1e-6), help="passes over the data (default: 30)")
    add("--batch_size", type=count, default=256, help="pairs in each step, over all processes")
    add("--micro_batch_size", type=count,
        help="pairs in the towers at once: less memory, same gradients (default: all)")
    add("--learning_rate", type=amount, default=5e-4,
        help="peak (default: 5e-4, or 5e-5 with --init_from); a new head learns ten times as fast")
    add("--warmup_steps", type=cli.number(int, 0),
        help="steps in which the learning rate rises (default: half of all, at most 3000)")
    add("--weight_decay", type=amount, default=0.2, help="decay of matrices, in AdamW")
    add("--seed", type=cli.number(int, 0, 2**31), default=0, help="seed of all that is random")
    # The machine
    add("--workers", type=cli.number(int, 0),
        help="loading processes per GPU (default: cores / GPUs, at most 16)")
    add("--device", help="cuda, mps or cpu (default: cuda if there is such a GPU, else cpu)")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="dtype of steps (default: bfloat16 if it is fast, else float16 on GPUs, or float32)")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="compile towers and head (default: on CUDA under Linux, if torch can)")
    # The run
    add("--out_dir", help="folder of the run (default: a new one)")
    add("--resume", action="store_true", help="go on with the run in --out_dir; repeat its command")
    add("--log_every", type=count, default=20, help="steps between two rows of the log")
    add("--eval_every", type=count, help="steps between validations (default: a third, max. 2000)")
    # fmt: on
    return parser


# Other defaults without --train_data. They were chosen together, so that a CPU learns in minutes.
SCENES = {
    "zeroshot_data": [f"scenes/zeroshot/{x}" for x in "colour shape colour_shape held_out".split()],
    "captions": ["json.short", "json.long"],
    "val_captions": ["json.long"],
    "crop_area": 1.0,  # captions name the border, which a crop cuts off
    "model": "tiny",
    "batch_size": 32,
    "workers": 0,  # the scenes are small, and the model keeps the cores busy
    "compile": False,  # it would take longer than the run
}
# Other defaults with --init_from. A larger learning rate would destroy what the weights know.
FINE_TUNING = {"model": None, "learning_rate": 5e-5}  # the checkpoint sets the model

# Only these options may differ on --resume. Files may move, so their content is compared.
MAY_CHANGE = """train_data val_data zeroshot_data vocab init_from steps epochs warmup_steps
micro_batch_size learning_rate workers device dtype compile out_dir log_every eval_every""".split()


def parse(argv):
    """Return the options of a run."""
    parser = make_parser()
    given = parser.parse_args(argv)  # tells which defaults hold
    if given.train_data is None:
        parser.set_defaults(**SCENES)
    if given.init_from is not None:
        parser.set_defaults(**FINE_TUNING)
    args = parser.parse_args(argv)
    if args.init_from is not None:
        for name in ("model", "image_size", "vocab", "loss"):
            cli.check(getattr(args, name) is None, f"--init_from sets --{name}. Leave this out.")
    if args.steps is None and args.epochs is None:
        args.epochs = 30.0
        if args.train_data is None:
            # 1,000 steps of 32 scenes. A batch four times as large makes half as many steps.
            args.epochs = round(1.6 * math.sqrt(args.batch_size / 32), 3)
    is_multiple = args.batch_size % (WORLD * (args.micro_batch_size or 1)) == 0
    cli.check(is_multiple, "--batch_size must be a multiple of processes times --micro_batch_size")
    cli.check(args.out_dir or not args.resume, "--resume needs --out_dir, the folder of the run")
    print("options:", {name: x for name, x in vars(args).items() if x is not None})
    return args


# -----------------------------------------------------------------------------
# The run


def train(args):
    """Train from the first step, or from the last.pt of --resume. args: what `parse` returns."""
    device = devices.prepare_device(args.device)
    on_gpu = device.type == "cuda"
    dtype = args.dtype or devices.pick_dtype(device)
    autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")  # against underflow to 0

    with processes.one_first():  # the first process draws, indexes and downloads for all
        train_data = args.train_data or [find_or_make_scenes("scenes")]
        shards, val_shards = shards_of_run(train_data, args.val_data)
        model, tokenizer, new_names = build_model(args, shards, device)
        pairs, val_samples, zeroshot_images = open_data(args, shards, val_shards, model, tokenizer)

    optimizer = make_optimizer(model, args.weight_decay, new_names)
    steps, warmup_steps, eval_every = count_steps(args, len(pairs))
    eval_steps = {*range(0, steps, eval_every), steps}  # after how many steps the run validates

    # The folder of the run, and the header of its log, which --resume compares
    args.out_dir = run.claim_folder(args.out_dir, args.resume)
    out = Path(args.out_dir)
    header = run.make_header(args, steps, dtype, device, model, pairs, val_samples)
    start = 0
    best_r1 = 0.0  # the highest score of a validation: the mean of R@1 over both directions
    if args.resume and (out / "last.pt").exists():
        last = run.read_last(
            out / "last.pt", header, tokenizer.vocab, optimizer, MAY_CHANGE, make_parser()
        )
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        if last["scaler"]:  # its state is empty without float16
            scaler.load_state_dict(last["scaler"])
        start = last["step"]
        best_r1 = last["best_r1"]
        if (out / "best.pt").exists():  # it may be from the validation after this last.pt
            best_r1 = max(best_r1, run.read_checkpoint(out / "best.pt")["best_r1"])
    run.begin_log(out, header, start)  # it also checks that all processes begin alike

    ddp_model = model
    if WORLD > 1:  # Average gradients, without a copy of them. Buffers are equal in all processes.
        ddp_model = DDP(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    B = args.batch_size // WORLD
    rows = slice(RANK * B, (RANK + 1) * B)  # the part of each batch that this process loads
    batches = data.load_batches(pairs, args.batch_size, rows, start, steps, args.workers, on_gpu)

    todo = range(start, steps + 1)  # in the last round the run only saves and validates
    if RANK == 0:
        todo = tqdm(todo, total=steps, initial=start, unit="step", disable=None)
    saved = time.perf_counter()
    # The next row of the log measures from the time t0 and the step step0 on, without saves and
    # validations. waited: seconds in which the CPU waits for batches. A GPU may be busy then.
    t0, step0, waited = saved, start, 0.0
    for step in todo:
        # 1. Process 0 saves last.pt every ten minutes, and before a validation, which may fail.
        # Then it saves best.pt, if no score was higher. The others wait in part 3, or at the end.
        # A run that goes on at a step of eval_steps makes this validation again.
        if RANK == 0 and (step in eval_steps or time.perf_counter() > saved + 600):
            checkpoint = {
                "model": model.state_dict(),  # no copy, so it must be written before the next step
                "config": vars(model.config),
                "vocab": tokenizer.vocab,
                "header": header,
                "step": step,
                "best_r1": best_r1,
            }
            if step > start:
                last = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
                last |= checkpoint
                run.write_checkpoint(out / "last.pt", last)
            if step in eval_steps:
                row = validate(args, model, tokenizer, val_samples, zeroshot_images, step)
                run.log(out, row)
                mean_r1 = row.get("mean_r1", 0.0)  # without validation pairs the newest is best
                if mean_r1 >= best_r1:
                    best_r1 = mean_r1
                    if step > 0:  # the weights before training only set the score to beat
                        run.write_checkpoint(out / "best.pt", {**checkpoint, "best_r1": best_r1})
            saved = time.perf_counter()
            t0, step0, waited = saved, step, 0.0
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
            group["lr"] = args.learning_rate * group["lr_scale"] * factor
        scaler.unscale_(optimizer)
        # Clip to length 1, as nanoGPT does. The authors do not clip.
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # open_clip's bounds

        # 5. The log, at few steps only, because reading the losses makes the CPU wait for the GPU.
        # So read them before the clock. The first row includes the compilation, if there is one.
        done = step + 1
        if done % args.log_every == 0 or done in eval_steps:
            means = processes.mean_of_all(losses)  # the loss and its terms
            cli.check(math.isfinite(means["loss"]), "the loss is not finite: lower --learning_rate")
            seconds = time.perf_counter() - t0
            row = {
                "step": done,
                **means,
                "logit_scale": model.logit_scale.exp().item(),
                # None if float16's gradients have overflowed. Then the optimizer skips the step.
                "grad_norm": grad_norm.item() if grad_norm.isfinite() else None,
                "learning_rate": args.learning_rate * factor,
                "images_per_second": round((done - step0) * args.batch_size / seconds, 1),
                "data_wait": round(waited / seconds, 3),  # a share of the time
                "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),  # 0 on a CPU
            }
            run.log(out, row)
            text = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
            speed = f"{row['images_per_second']:.0f} images/s, {row['data_wait']:.0%} waiting"
            tqdm.write(f"step {done:6d}: {text}, {speed}")
            t0, step0, waited = time.perf_counter(), done, 0.0
    run.print_commands(out, model, val_samples)


def build_model(args, shards, device):
    """Return the model on its device, its tokenizer, and the names of the tensors that are new,
    because the checkpoint of --init_from lacks them. (Plain CLIP has no word head.)"""
    pretrained = None
    if args.init_from is None:
        tokenizer = tokenizer_for(shards, args.vocab)
        config = {**PRESETS[args.model], "vocab_size": tokenizer.vocab_size}
    else:
        pretrained, tokenizer = run.read_model(args.init_from)
        config = {**vars(pretrained.config)}
        if pretrained.head is None:
            config["cls_weight"] = 1.0  # plain CLIP gets a word head
    config |= {k: x for k, x in vars(args).items() if hasattr(SuperCLIPConfig, k) and x is not None}
    config = SuperCLIPConfig(**config)
    is_multiple = config.image_size % config.patch_size == 0
    cli.check(is_multiple, f"--image_size must be a multiple of the patch_size {config.patch_size}")
    tokenizer.context_length = config.context_length
    torch.manual_seed(args.seed)  # each process begins with the same weights
    model = SuperCLIP(config)
    new_names = []
    if pretrained is not None:
        loaded = model.load_state_dict(pretrained.state_dict(), strict=False)
        new_names = loaded.missing_keys
        if new_names:
            print(f"new, because {args.init_from} lacks them: {', '.join(new_names)}")
        # --cls_weight 0 leaves out the head and its counts. All else must find its place.
        head = ("head.", "token_counts", "num_captions")
        unused = [name for name in loaded.unexpected_keys if not name.startswith(head)]
        cli.check(not unused, f"the model has no place for {unused} of {args.init_from}")
        if model.head is not None:
            # Count the words anew. One that was rare there may be in every caption here.
            model.token_counts.zero_()
            model.num_captions.zero_()
    model.to(device).train()
    devices.compile_if_wanted(model, args.compile)
    return model, tokenizer, new_names


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
    cli.check(len(pairs) >= args.batch_size, f"--batch_size exceeds the {len(pairs):,} pairs")
    return pairs, val_samples, zeroshot_images


def make_optimizer(model, weight_decay, new_names=()):
    """Return AdamW. Its groups of parameters differ in weight decay, and in lr_scale, by which the
    loop multiplies the learning rate: those in new_names learn ten times as fast as pretrained
    ones."""
    groups = {}  # (weight decay, lr_scale) -> group
    for name, p in model.named_parameters():
        decay = weight_decay if p.ndim >= 2 else 0.0  # no biases, norms, class token, logit scale
        lr_scale = 10.0 if name in new_names else 1.0
        key = (decay, lr_scale)
        if key not in groups:
            groups[key] = {"params": [], "weight_decay": decay, "lr_scale": lr_scale}
        groups[key]["params"].append(p)
    # CLIP and SuperCLIP have these betas and eps. fused computes all of Adam in one kernel.
    return torch.optim.AdamW(list(groups.values()), betas=(0.9, 0.98), eps=1e-6, fused=True)


def count_steps(args, num_pairs):
    """Return the steps of a run on num_pairs pairs, of its warm-up, and between two validations.
    A short warm-up hurts plain CLIP most (study/results.md)."""
    steps = args.steps or max(1, round(args.epochs * (num_pairs // args.batch_size)))
    warmup_steps = min(3000, steps // 2) if args.warmup_steps is None else args.warmup_steps
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
    scores, and return them as a row of the log. The samples and images are those of open_data."""
    tqdm.write(f"\nvalidation after step {step}")
    row = {"step": step, "zeroshot": {}}
    model.eval()
    # Do not use the compiled towers: shapes and dtypes differ from those of training.
    with torch.compiler.set_stance("force_eager"):
        if samples is not None:
            group = args.batch_size  # so that the loss can be compared with that of the training
            row |= evaluation.score_pairs(model, tokenizer, samples, args.workers, group)
            evaluation.print_words(model, tokenizer, samples)
        for folder, images in zeroshot_images.items():
            score = evaluation.zeroshot(model, tokenizer, images, workers=args.workers)
            tqdm.write(evaluation.format_score(f"zero-shot {Path(folder).name}", score))
            row["zeroshot"][folder] = score
    model.train()
    return row


def main(argv):
    with processes.joined_processes():
        train(parse(argv))


if __name__ == "__main__":
    cli.run_command(main)
