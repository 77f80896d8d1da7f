"""One step: the same gradients plain, in micro-batches, on two processes, scaled and compiled."""

import math
from datetime import timedelta
from itertools import product

import pytest
import torch
import torch.distributed as dist
from material import TINY
from one_step import (
    KEEP,
    ForkedSuperCLIP,
    N,
    assert_same_gradients,
    losses_and_gradients,
    make_model_without_zeros,
    micro_batches,
)
from runs import losses_of, short_run

import train
from superclip import PRESETS

# How many pairs a micro-batch has, and whether there are micro-batches
STEPS = {"plain": (N, False), "micro": (2, True)}
both_steps = pytest.mark.parametrize("size, micro", STEPS.values(), ids=STEPS)


# ---- the same gradients in micro-batches and on two processes

CONFIGS = {
    "plain CLIP": {"cls_weight": 0},
    "words": {"cls_weight": 0.7},
    "sigmoid": {"loss": "sigmoid"},
    "a fork's term": {"kind": ForkedSuperCLIP},
}
CASES = [*product(CONFIGS, ("all patches", "some patches"))]
every_case = pytest.mark.parametrize("config, patches", CASES, ids=map(" ".join, CASES))


def first_step(config, patches, micro=False, rank=0, processes=1):
    """A step by one of so many processes. Returns its losses, gradients, and the model's buffers,
    in which the tokens are counted."""
    model = make_model_without_zeros(**CONFIGS[config])
    keep = KEEP if patches == "some patches" else None
    B = N // processes
    batches = micro_batches(2 if micro else B, slice(rank * B, (rank + 1) * B), keep)
    losses, gradients = losses_and_gradients(model, batches, micro)
    return losses, gradients, dict(model.named_buffers())


@every_case
def test_micro_batches_give_the_gradients_of_the_whole_batch(config, patches):
    losses, gradients, buffers = first_step(config, patches)

    micro_losses, micro_gradients, micro_buffers = first_step(config, patches, micro=True)

    assert_same_gradients(micro_gradients, gradients)
    torch.testing.assert_close(micro_losses, losses)
    torch.testing.assert_close(micro_buffers, buffers, rtol=0, atol=0)


def run_process(rank, folder):
    """One of two processes: keeps what it finds in each case, by case and micro."""
    torch.set_num_threads(1)
    options = {"init_method": f"file://{folder}/store", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **options)
    found = {}
    for case in CASES:
        for micro in (False, True):
            found[case, micro] = first_step(*case, micro, rank, processes=2)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(server, tmp_path_factory):
    """What each of two processes has found, on its half of the batch."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.start_processes(run_process, (folder,), 2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@every_case
@pytest.mark.parametrize("micro", [False, True], ids=STEPS)
def test_two_processes_have_the_gradients_of_one(config, patches, micro, two_processes):
    """And the same token counts."""
    _, gradients, buffers = first_step(config, patches)

    for process in two_processes:
        _, their_gradients, their_buffers = process[(config, patches), micro]
        assert_same_gradients(their_gradients, gradients)
        torch.testing.assert_close(their_buffers, buffers, rtol=0, atol=0)


@every_case
@pytest.mark.parametrize("micro", [False, True], ids=STEPS)
def test_the_loss_is_the_mean_over_two_processes(config, patches, micro, two_processes):
    """Their own losses differ, because each scores its own pairs alone."""
    losses, _, _ = first_step(config, patches)

    first, second = (process[(config, patches), micro][0] for process in two_processes)

    for name, loss in losses.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, loss)
        assert abs(first[name] - second[name]) > 0.01


@pytest.mark.parametrize("options", [[], ["--micro_batch_size", 4]], ids=["plain", "micro-batches"])
def test_a_forks_term_is_in_the_loss_and_in_the_log(shards, tmp_path, monkeypatch, options):
    """The tests above have its gradient, in micro-batches and on two processes, too."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr(train, "SuperCLIP", ForkedSuperCLIP)

    train.main(short_run(shards, tmp_path, "--steps", 2, *options))

    row = losses_of(tmp_path)[-1]
    ours = row["contrastive_loss"] + row["classification_loss"]
    assert row["loss"] == pytest.approx(ours + 0.3 * row["agreement_loss"])


def test_micro_batches_are_computed_as_they_arrive_and_two_pairs_at_a_time():
    model = make_model_without_zeros()
    events = []
    model.visual.register_forward_pre_hook(lambda _, args: events.append(len(args[0])))

    def loader():
        for batch in micro_batches(2):
            events.append("loaded")
            yield batch

    losses_and_gradients(model, loader(), micro=True)

    assert events == ["loaded", 2] * 4 + [2] * 4


# ---- the same gradients by other ways to compute them


@both_steps
def test_grad_checkpointing_changes_no_gradient(size, micro):
    """Each block runs once more in each backward pass."""
    found = []
    runs = []  # of the first block
    for checkpointing in (False, True):
        model = make_model_without_zeros()
        model.visual.transformer.grad_checkpointing = checkpointing
        model.text.transformer.grad_checkpointing = checkpointing
        norm = model.visual.transformer.resblocks[0].ln_1
        norm.register_forward_hook(lambda *_, found=found: runs.append(len(found)))
        found.append(losses_and_gradients(model, micro_batches(size), micro))

    torch.testing.assert_close(*found)
    assert runs.count(1) == runs.count(0) + N // size


@both_steps
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_contrastive_loss_is_float32_under_bfloat16(loss, size, micro):
    """It is that of the same features without autocast. Near 100, bfloat16 would be 0.5 off."""
    model = make_model_without_zeros(loss=loss)
    model.logit_scale.data.fill_(math.log(100))
    autocast = torch.autocast("cpu", torch.bfloat16)

    losses, _ = losses_and_gradients(model, micro_batches(size), micro, autocast)

    with autocast:
        parts = [model.features_and_terms(**batch)[:2] for batch in micro_batches(size)]
    images, texts = map(torch.cat, zip(*parts))
    expected = model.terms_between_pairs(images, texts)["contrastive_loss"]
    torch.testing.assert_close(losses["contrastive_loss"], expected.detach())


@both_steps
def test_the_loss_scale_of_float16_changes_no_update(size, micro):
    """Gradients are scaled, and lose the scale before they are clipped."""
    _, gradients = losses_and_gradients(make_model_without_zeros(), micro_batches(size), micro)
    model = make_model_without_zeros()
    scaler = torch.amp.GradScaler("cpu", 1024)

    _, scaled = losses_and_gradients(model, micro_batches(size), micro, scaler=scaler)
    norm = train.update(model, train.make_optimizer(model, 1e-3, 1e-3, 0.2), scaler, 1.0)

    assert_same_gradients({name: g / 1024 for name, g in scaled.items()}, gradients)
    expected = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_infinite_gradient_of_float16_updates_nothing_and_halves_the_scale():
    model = make_model_without_zeros()
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", 1024)
    losses_and_gradients(model, micro_batches(), scaler=scaler)
    model.logit_scale.grad.fill_(math.inf)

    train.update(model, train.make_optimizer(model, 1e-3, 1e-3, 0.2), scaler, 1.0)

    torch.testing.assert_close([p.detach() for p in model.parameters()], before)
    assert scaler.get_scale() == 512


def compile_parts(model, backend):
    """Compiles what train.py compiles. backend(part): torch.compile's backend for a part."""
    for name in ("visual", "text"):
        getattr(model, name).compile(backend=backend(name), fullgraph=True)
    for name in ("terms_of_each_pair", "terms_between_pairs"):
        part = torch.compile(getattr(model, name), backend=backend(name), fullgraph=True)
        setattr(model, name, part)


def test_compiled_equals_eager():
    """By torch's compiler up to the code for the machine, which would need a C++ compiler."""
    torch.compiler.reset()
    compiled = make_model_without_zeros()
    compile_parts(compiled, lambda part: "aot_eager")

    step = losses_and_gradients(compiled, micro_batches(T=16, T_label=32, keep=KEEP))

    eager = make_model_without_zeros()
    expected = losses_and_gradients(eager, micro_batches(T=16, T_label=32, keep=KEEP))
    torch.testing.assert_close(step, expected)


# Of the longest caption, and label, of a batch: a first pair, a few others, and more
LENGTHS = (16, 32), (32, 32), (16, 48), (48, 16), (32, 64), (16, 16), (48, 80)


def steps_of_all_lengths(model, size, micro):
    """Yields the losses and gradients of a step with captions of each length."""
    for T, T_label in LENGTHS:
        model.zero_grad()
        yield losses_and_gradients(
            model, micro_batches(size, keep=KEEP, T=T, T_label=T_label), micro
        )


@pytest.fixture(scope="module")
def compiled_steps():
    """By micro or not: what each step has found, and the parts that were compiled for it. By the
    first half of torch's compiler alone, because that is the one which meets several lengths."""
    found = {}
    for size, micro in STEPS.values():
        torch.compiler.reset()
        model = make_model_without_zeros()
        compilations = []

        def backend(part, compilations=compilations):
            def compile_graph(graph, inputs):
                compilations.append(part)
                return graph.forward

            return compile_graph

        compile_parts(model, backend)
        found[micro] = []
        for step in steps_of_all_lengths(model, size, micro):
            found[micro].append((step, {*compilations}))
            compilations.clear()
    return found


@both_steps
def test_compiled_equals_eager_for_captions_of_any_length(compiled_steps, size, micro):
    eager = make_model_without_zeros()

    expected = steps_of_all_lengths(eager, size, micro)

    for (step, _), step_of_eager in zip(compiled_steps[micro], expected, strict=True):
        torch.testing.assert_close(step, step_of_eager)


@both_steps
def test_captions_of_other_lengths_hardly_recompile(compiled_steps, size, micro):
    """The image tower and the contrastive loss never. The text tower and the word loss not once a
    few lengths have shown that these vary."""
    first, *others = (compilations for _, compilations in compiled_steps[micro])

    assert len(first) == 4
    assert set().union(*others[:3]) <= {"text", "terms_of_each_pair"}
    assert set().union(*others[3:]) == set()
