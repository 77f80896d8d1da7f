"""Test one step on eight small pairs. Its gradients are the same plain, in micro-batches, on two
processes, scaled, compiled, and on a GPU. Then test the update."""

import math
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from material import TINY, checkpoint_of, rows_of, short_run, small_model, write_checkpoint
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

import train
from common import devices
from common.tokenizer import trim
from superclip import PAD, SuperCLIP, SuperCLIPConfig

N = 8  # pairs of all processes
V = 40  # vocabulary
KEEP = torch.arange(N)[:, None] + torch.arange(0, 9, 2)  # 5 of 16 patches of each pair
FLOAT32 = nullcontext()
NOT_SCALED = torch.amp.GradScaler("cpu", enabled=False)


def make_model_without_zeros(**changes):
    """Return a model in training mode, without zeros that could hide a wrong gradient."""
    torch.manual_seed(0)
    model = SuperCLIP(SuperCLIPConfig(**{**TINY, "vocab_size": V, **changes})).train()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    return model


def make_captions(T, generator):
    """Return captions (N, T), each one token shorter than the one before it."""
    captions = torch.randint(1, V - 2, (N, T), generator=generator)
    captions[:, 0] = V - 2
    for i in range(N):
        captions[i, T - 1 - i] = V - 1
        captions[i, T - i :] = PAD
    captions[0, 2] = PAD  # CLIP's "!" has the same id, so only the end token tells where padding is
    return captions


def make_batch(local=slice(None), keep=None, T=12):
    """Return the pairs of `local` as a batch, trimmed to its longest captions, as if loaded. T:
    tokens of the longest caption of all pairs."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (N, 3, 16, 16), dtype=torch.uint8, generator=generator)
    tokens = trim(make_captions(T, generator)[local])
    label_tokens = trim(make_captions(20, generator)[local])
    batch = {"images": images[local], "tokens": tokens, "label_tokens": label_tokens}
    if keep is not None:
        batch["keep"] = keep[local]
    return batch


def losses_and_gradients(model, batch, size=None, autocast=FLOAT32, scaler=NOT_SCALED):
    """Make a step as train.py does, on the device of the model. size: pairs in a micro-batch.
    Return a dict of the loss and its terms, and a dict of all gradients, both on the CPU."""
    model.zero_grad()
    ddp_model = model
    if dist.is_initialized():
        ddp_model = DistributedDataParallel(model, broadcast_buffers=False)
    batch = {name: x.to(model.logit_scale.device) for name, x in batch.items()}
    with autocast:
        losses = ddp_model(**batch, micro_batch_size=size)
    scaler.scale(losses["loss"]).backward()
    losses = {name: x.detach().cpu() for name, x in losses.items()}
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters()}
    return losses, gradients


# How much a device may differ from float32 on the CPU. bfloat16 has 8 bits, and float16 has 11.
# Gradients differ more than losses, because the features of an untrained model are nearly equal, so
# that much of a gradient cancels. None of 200 other seeds exceeds the tolerances of a CPU: their
# gradients differ by up to 0.15 in bfloat16, 0.01 in float16 and 5e-6 in float32. Those of a GPU,
# whose kernels add numbers in another order, are guesses.
LOSS_TOLERANCES = {
    "cpu": {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.005},
    "cuda": {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01},
}
GRADIENT_TOLERANCES = {
    "cpu": {"float32": 1e-5, "bfloat16": 0.2, "float16": 0.025},
    "cuda": {"float32": 1e-4, "bfloat16": 0.4, "float16": 0.05},
}
DTYPES = ("bfloat16", "float16")


def assert_same_gradients(gradients, expected, tolerance):
    """Assert that no element differs by more than `tolerance` times the largest element. That says
    little about small gradients in 16 bits, so the directions of the gradients are compared, too. A
    gradient that is zero has no direction, and fails."""
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        cosine = F.cosine_similarity(gradients[name].flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.95, name
        assert (gradients[name] - gradient).abs().max() < tolerance * largest, name


# ---- the same gradients in micro-batches, on two processes, and on a GPU

# Case -> arguments of make_model_without_zeros. If you add a term to the loss, add a line here. If
# the weight of the term is a field of the configuration, its arguments are {"my_weight": 0.3}.
CONFIGS = {
    "plain CLIP": {"cls_weight": 0},
    "words": {"cls_weight": 0.7},
    "sigmoid": {"loss": "sigmoid"},
}
WAYS = ("all patches", "some patches", *DTYPES)
# These are tested in the first way only: the other ways do to them what they do to "words".
ONCE = ("plain CLIP", "sigmoid")
CASES = [(x, way) for x, way in product(CONFIGS, WAYS) if x not in ONCE or way == WAYS[0]]
every_case = pytest.mark.parametrize("config, way", CASES, ids=map(" ".join, CASES))
# What each of two processes computes: config, way, and pairs in a micro-batch
STEPS_OF_TWO = [(*case, size) for case, size in product(CASES, (None, 2))]
WAYS_OF_TWO = [way for _, way, _ in STEPS_OF_TWO] + 3 * ["compiled"]
# DistributedDataParallel first sends a megabyte of gradients. It splits the graph of a tower that
# has more, so that it can send some gradients while others are computed.
WIDE = {"vision_width": 192, "text_width": 192}


def first_step(config, way, device="cpu", size=None, rank=0, processes=1):
    """Make the step of one process. rank: its number; processes: how many there are. Return its
    losses, its gradients, and the buffers of the model, in which the tokens are counted."""
    model = make_model_without_zeros(**CONFIGS[config]).to(device)
    B = N // processes
    keep = KEEP if way == "some patches" else None
    batch = make_batch(slice(rank * B, (rank + 1) * B), keep)
    autocast = FLOAT32
    if way in DTYPES:
        autocast = torch.autocast(device, getattr(torch, way))
    scaler = torch.amp.GradScaler(device, 1024, enabled=way == "float16")
    losses, gradients = losses_and_gradients(model, batch, size, autocast, scaler)
    gradients = {name: x / scaler.get_scale() for name, x in gradients.items()}
    return losses, gradients, {name: x.cpu() for name, x in model.named_buffers()}


def assert_same_step(step, expected, way, device):
    """Assert that losses, gradients and counts of two steps are equal, up to rounding."""
    dtype = way if way in DTYPES else "float32"
    tolerance = LOSS_TOLERANCES[device][dtype]
    losses, gradients, buffers = step
    expected_losses, expected_gradients, expected_buffers = expected
    torch.testing.assert_close(losses, expected_losses, rtol=tolerance, atol=tolerance)
    assert_same_gradients(gradients, expected_gradients, GRADIENT_TOLERANCES[device][dtype])
    torch.testing.assert_close(buffers, expected_buffers, rtol=0, atol=0)


def exact_step(config, way):
    """Return what first_step returns for the whole batch, in float32 and on the CPU."""
    return first_step(config, way if way == "some patches" else "all patches")


@every_case
def test_micro_batches_give_the_gradients_of_the_whole_batch(config, way, device):
    micro = first_step(config, way, device, size=2)

    assert_same_step(micro, exact_step(config, way), way, device)


@pytest.mark.parametrize("config", CONFIGS)
def test_each_term_is_a_part_of_the_loss(config):
    """The weights of the terms are 1 and the numbers of the configuration, such as cls_weight. A
    term that was not added to the loss would train nothing."""
    losses = make_model_without_zeros(**CONFIGS[config])(**make_batch())
    loss = losses.pop("loss")

    weights = torch.autograd.grad(loss, [*losses.values()])

    numbers = {x for x in CONFIGS[config].values() if isinstance(x, float)}
    assert {round(weight.item(), 6) for weight in weights} == {1.0, *numbers}


def wide_steps(compiled, device="cpu", rank=0, processes=1, autocast=FLOAT32):
    """Make steps with captions of three lengths, in micro-batches. Return what first_step returns
    for each. When captions get another length, torch compiles for all lengths."""
    model = make_model_without_zeros(**WIDE).to(device)
    if compiled:
        devices.compile_parts(model)
    B = N // processes
    steps = []
    for T in (12, 16, 10):
        batch = make_batch(slice(rank * B, (rank + 1) * B), KEEP, T)
        steps.append((*losses_and_gradients(model, batch, size=2, autocast=autocast), {}))
    return steps


def evaluated_loss():
    return make_model_without_zeros().eval()(**make_batch())["loss"].detach()


def run_process(rank, folder, device):
    """Run one of two processes. Save what the functions above return in it."""
    torch.set_num_threads(1)
    options = {"init_method": f"file://{folder}/store", "timeout": timedelta(seconds=60)}
    backend = "gloo"
    if device == "cuda":
        devices.prepare_device(f"cuda:{rank}")
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, rank=rank, world_size=2, **options)
    steps = [first_step(*step[:2], device, step[2], rank, processes=2) for step in STEPS_OF_TWO]
    graphs = CompileCounter()  # runs the graphs as they are, to save time
    torch.compile = partial(torch.compile, backend=graphs)
    steps += wide_steps(True, device, rank, processes=2)
    # Process 0 may compute the loss of a validation alone.
    evaluated = evaluated_loss() if rank == 0 else None
    torch.save((steps, graphs.frame_count, evaluated), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(server, tmp_path, device_of_two):
    """So are the token counts. The loss of one process is the mean of the losses of two. This is
    one test, because it takes seconds to start the processes."""
    arguments = run_process, (tmp_path, device_of_two), 2
    expected = [exact_step(config, way) for config, way, _ in STEPS_OF_TWO] + wide_steps(False)

    torch.multiprocessing.start_processes(*arguments, start_method="forkserver")

    first, num_graphs, evaluated = torch.load(tmp_path / "0.pt")
    second, *_ = torch.load(tmp_path / "1.pt")
    for way, one, other, exact in zip(WAYS_OF_TWO, first, second, expected):
        print(way)  # pytest shows it if this step fails
        mean_losses = {name: (loss + other[0][name]) / 2 for name, loss in one[0].items()}
        assert_same_step((mean_losses, *one[1:]), exact, way, device_of_two)
        assert_same_step((mean_losses, *other[1:]), exact, way, device_of_two)
    assert num_graphs > 4  # 4 would be a head, a tower, and the other one for two lengths
    assert evaluated == evaluated_loss()


def test_micro_batches_go_through_the_towers_one_after_the_other():
    """Two pairs at a time go forward, and later backward. Otherwise no memory would be saved."""
    model = make_model_without_zeros()
    events = []

    def note(_, args, patches):
        events.append(len(patches))
        patches.register_hook(lambda _: events.append("gradient"))

    model.visual.ln_pre.register_forward_hook(note)

    losses_and_gradients(model, make_batch(), size=2)

    assert events == [2] * 4 + [2, "gradient"] * 4


def test_two_forwards_may_come_before_one_backward():
    """The backward pass computes micro-batches again. It weights the words of each batch as the
    forward pass did, though the counts of the model have moved on since."""
    gradients = []
    for size in (None, 2):
        model = make_model_without_zeros()
        losses = [model(**make_batch(T=T), micro_batch_size=size)["loss"] for T in (12, 16)]

        sum(losses).backward()

        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_same_gradients(gradients[1], gradients[0], GRADIENT_TOLERANCES["cpu"]["float32"])


def test_the_option_of_train_py_sets_their_size(shards, tmp_path, monkeypatch):
    sizes = set()
    encode_pairs = SuperCLIP.encode_pairs

    def note(model, images, **pairs):
        sizes.add(len(images))
        return encode_pairs(model, images, **pairs)

    monkeypatch.setattr(SuperCLIP, "encode_pairs", note)

    train.main(short_run(shards, tmp_path, "--steps", 1, "--micro_batch_size", 4))

    assert sizes == {4}


# ---- the same gradients by other ways to compute them


@pytest.mark.parametrize("way", ["all patches", "bfloat16"])
def test_compiled_equals_eager(monkeypatch, device, way):
    """On a CPU torch's compiler does all but the code for the machine, which would take minutes."""
    autocast = torch.autocast(device, torch.bfloat16, enabled=way == "bfloat16")
    backend = "aot_eager" if device == "cpu" else "inductor"
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))

    compiled = wide_steps(True, device, autocast=autocast)

    for step, expected in zip(compiled, wide_steps(False)):
        assert_same_step(step, expected, way, device)


def test_a_run_compiles_both_towers_and_the_head_for_training_alone(shards, tmp_path, monkeypatch):
    """Validations have other shapes, and would compile the towers again."""
    torch.compiler.reset()
    graphs = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))

    train.main(short_run(shards, tmp_path, "--steps", 2, "--eval_every", 1, "--compile"))

    assert graphs.frame_count == 3


def test_a_machine_that_cannot_compile_says_why(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", None)

    assert not devices.can_compile(torch.device("cuda"))
    assert "'NoneType' object is not callable" in capsys.readouterr().out


def test_a_seed_decides_the_weights_and_the_order(shards, tmp_path):
    """The counts tell which captions were in the first batch. A learning rate of 0 keeps the
    weights. test_data.py tests what else a seed decides: captions, crops and dropped patches."""
    for seed in "01":
        options = "--steps", 1, "--learning_rate", 0, "--seed", seed
        train.main(short_run(shards, tmp_path / seed, *options))

    first, other = (checkpoint_of(tmp_path / seed)["model"] for seed in "01")
    assert not torch.equal(first["visual.proj"], other["visual.proj"])
    assert not torch.equal(first["token_counts"], other["token_counts"])


# ---- the update


def test_weight_decay_is_for_matrices_alone():
    model = make_model_without_zeros(loss="sigmoid")

    groups = train.make_optimizer(model, 0.3).param_groups

    assert {(*group["betas"], group["eps"]) for group in groups} == {(0.9, 0.98, 1e-6)}  # CLIP's
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {p: 0.3 if p.ndim >= 2 else 0.0 for p in model.parameters()}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_update_clips_the_gradient_to_length_1(shards, tmp_path, monkeypatch, dtype):
    """float16's loss scale is removed first. Adam's first moment is a tenth of the gradient."""
    small_scale = partial(torch.amp.GradScaler, init_scale=1024)  # so that nothing overflows
    monkeypatch.setattr(torch.amp, "GradScaler", small_scale)
    train.main(short_run(shards, tmp_path, "--steps", 1, "--dtype", dtype))

    saved = checkpoint_of(tmp_path)
    moments = [state["exp_avg"] for state in saved["optimizer"]["state"].values()]
    assert bool(saved["scaler"]) == (dtype == "float16")
    assert 1 < rows_of(tmp_path, "loss")[-1]["grad_norm"] < 100
    assert get_total_norm(moments).item() == pytest.approx(0.1, rel=1e-4)


def test_each_parameter_has_the_learning_rate_of_the_step_and_the_decay_of_the_option(whole_run):
    groups = checkpoint_of(whole_run)["optimizer"]["param_groups"]

    rate = 1e-3 * train.learning_rate_factor(11, 6, 12)
    found = {(group["lr"], group["weight_decay"]) for group in groups if group["params"]}
    assert found == {(rate, 0.1), (rate, 0.0)}
    assert rows_of(whole_run, "loss")[-1]["learning_rate"] == rate


@pytest.mark.parametrize("start, end", [(5.0, math.log(100)), (-1.0, 0.0)])
def test_an_update_keeps_the_logit_scale_between_1_and_100(shards, tmp_path, start, end):
    model = small_model()
    model.logit_scale.data.fill_(start)
    write_checkpoint(tmp_path / "start.pt", model)

    options = "--init_from", tmp_path / "start.pt", "--steps", 1, "--learning_rate", 0
    train.main(short_run(shards, tmp_path / "out", *options))

    assert checkpoint_of(tmp_path / "out")["model"]["logit_scale"].item() == pytest.approx(end)
