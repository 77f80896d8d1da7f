"""One step: the same gradients plain, in micro-batches, on two processes, scaled and compiled."""

import math
from contextlib import nullcontext
from datetime import timedelta
from itertools import product

import pytest
import torch
import torch.distributed as dist
from material import TINY, make_model
from runs import losses_of, short_run
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

import train
from superclip import PAD, PRESETS, SuperCLIP, SuperCLIPConfig

N, P, V = 8, 16, 40  # pairs of all processes, patches, vocabulary
KEEP = torch.rand(N, P, generator=torch.Generator().manual_seed(2)).argsort(dim=1)[:, :5]
FLOAT32, NOT_SCALED = nullcontext(), torch.amp.GradScaler("cpu", enabled=False)
STEPS = [(N, False), (2, True)]  # micro_batch_size, grad_cache_step or the plain step?


class ForkedSuperCLIP(SuperCLIP):
    """What a fork may do: a third term, which asks the patches of an image to agree less."""

    def terms_of_each_pair(self, image_tokens, label_tokens):
        terms = super().terms_of_each_pair(image_tokens, label_tokens)
        mean_patch = image_tokens[:, 1:].float().mean(dim=1)
        return {**terms, "agreement_loss": mean_patch.square().sum(dim=1).mean()}

    def total_loss(self, terms):
        ours = {name: x for name, x in terms.items() if name != "agreement_loss"}
        return super().total_loss(ours) + 0.3 * terms.get("agreement_loss", 0.0)


def small_model(kind=SuperCLIP, **changes):
    torch.manual_seed(0)
    model = kind(SuperCLIPConfig(**{**TINY, "vocab_size": V, **changes})).train()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)  # no zeros are left that could hide a wrong gradient
    return model


def micro_batches(size=N, local=slice(None), keep=None, T=12, T_label=20):
    """An iterator over the pairs of `local`, `size` at a time. Each caption is one token shorter
    than the one before it, and a micro-batch is trimmed to its longest, as the loader does it."""
    generator, texts = torch.Generator().manual_seed(1), {}
    images = torch.randint(0, 256, (N, 3, 16, 16), dtype=torch.uint8, generator=generator)
    for name, longest in (("tokens", T), ("label_tokens", T_label)):
        texts[name] = torch.randint(1, V - 2, (N, longest), generator=generator)
        for i, row in enumerate(texts[name]):
            row[0], row[longest - 1 - i], row[longest - i :] = V - 2, V - 1, PAD
    for pairs in torch.arange(N)[local].split(size):
        trimmed = {k: x[pairs, : (x[pairs] != PAD).sum(dim=1).max()] for k, x in texts.items()}
        yield {"images": images[pairs], **trimmed, "keep": None if keep is None else keep[pairs]}


def step_of(model, batches, micro=False, autocast=FLOAT32, scaler=NOT_SCALED):
    """A step as train.py makes it -> dict of losses, dict of gradients."""
    if micro:
        losses = train.grad_cache_step(model, batches, autocast, scaler)
    else:
        options = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
        wrapped = DistributedDataParallel(model, **options) if dist.is_initialized() else model
        losses = train.plain_step(wrapped, next(batches), autocast, scaler)
    losses = {k: x.detach() for k, x in losses.items() if k.endswith("_loss")}
    return losses, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(gradients, expected, tolerance=1e-5):
    """No element differs by more than this share of the largest one, and no gradient is zero."""
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (gradients[name] - gradient).abs().max() < tolerance * largest, name


CONFIGS = {"CLIP": {"cls_weight": 0}, "words": {"cls_weight": 0.7}, "sigmoid": {"loss": "sigmoid"}}
CONFIGS["a fork's term"] = {"kind": ForkedSuperCLIP}
CASES = list(product(CONFIGS, (False, True), (False, True)))  # ..., dropped patches, micro-batches


def run_cases(rank, processes):
    """case -> losses, gradients and token counts of a step by one of so many processes."""
    results, B = {}, N // processes
    for name, dropped, micro in CASES:
        model, local = small_model(**CONFIGS[name]), slice(rank * B, (rank + 1) * B)
        batches = micro_batches(2 if micro else B, local, KEEP if dropped else None)
        step = step_of(model, batches, micro)
        results[name, dropped, micro] = *step, [x for x in model.buffers() if x.dtype == torch.long]
    return results


def run_process(rank, folder):
    torch.set_num_threads(1)
    options = {"init_method": f"file://{folder}/store", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **options)
    torch.save(run_cases(rank, 2), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_plain_micro_batches_one_process_and_two_give_the_same_gradients(server, tmp_path):
    """And the same token counts. Each of two processes scores its own pairs alone, so that their
    losses differ, and the mean of both is the loss of the batch."""
    torch.multiprocessing.start_processes(run_process, (tmp_path,), 2, start_method="forkserver")
    one, two = run_cases(0, 1), [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for case in CASES:
        losses, gradients, counts = one[(*case[:2], False)]
        for results in (one, *two):
            assert_same_gradients(results[case][1], gradients)
            torch.testing.assert_close(results[case][2], counts, rtol=0, atol=0)
        torch.testing.assert_close(one[case][0], losses)
        for name, value in losses.items():
            first, second = (results[case][0][name] for results in two)
            torch.testing.assert_close((first + second) / 2, value)
            assert abs(first - second) > 0.01 or value == 0  # plain CLIP's word loss


@pytest.mark.parametrize("options", [[], ["--micro_batch_size", 4]], ids=["plain", "micro-batches"])
def test_a_forks_term_is_in_the_loss_and_in_the_log(shards, tmp_path, monkeypatch, options):
    """The test above has its gradient, in micro-batches and on two processes, too."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr(train, "SuperCLIP", ForkedSuperCLIP)

    train.main(short_run(shards, tmp_path, "--steps", 2, *options))

    row = losses_of(tmp_path)[-1]
    ours = row["contrastive_loss"] + row["classification_loss"]
    assert row["loss"] == pytest.approx(ours + 0.3 * row["agreement_loss"])


def test_micro_batches_are_computed_as_they_arrive_and_two_pairs_at_a_time():
    model, events = small_model(), []
    model.visual.register_forward_pre_hook(lambda _, args: events.append(len(args[0])))
    loader = (events.append("loaded") or batch for batch in micro_batches(2))
    step_of(model, loader, micro=True)
    assert events == ["loaded", 2] * 4 + [2] * 4


@pytest.mark.parametrize("size, micro", STEPS)
def test_grad_checkpointing_changes_no_gradient(size, micro):
    (model, runs), (other, more) = ((small_model(), []) for _ in range(2))
    other.visual.transformer.grad_checkpointing = other.text.transformer.grad_checkpointing = True
    for m, seen in ((model, runs), (other, more)):
        m.visual.transformer.resblocks[0].ln_1.register_forward_hook(lambda *_, s=seen: s.append(1))
    results = (step_of(m, micro_batches(size), micro) for m in (other, model))
    torch.testing.assert_close(*results)
    assert len(more) == len(runs) + N // size  # once more in each backward pass


@pytest.mark.parametrize("size, micro", STEPS)
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_contrastive_loss_is_float32_under_bfloat16(loss, size, micro):
    """It is that of the same features without autocast. Near 100, bfloat16 would be 0.5 off."""
    model, autocast = small_model(loss=loss), torch.autocast("cpu", torch.bfloat16)
    model.logit_scale.data.fill_(math.log(100))
    with autocast:
        parts = [model.features_and_terms(**batch)[:2] for batch in micro_batches(size)]
    expected = model.terms_between_pairs(*map(torch.cat, zip(*parts)))["contrastive_loss"]
    losses, _ = step_of(model, micro_batches(size), micro, autocast)
    torch.testing.assert_close(losses["contrastive_loss"], expected.detach())


@pytest.mark.parametrize("size, micro", STEPS)
def test_the_loss_scale_of_float16_changes_no_update(size, micro):
    """Gradients lose the scale before they are clipped. An infinite update is skipped."""
    model, scaler = small_model(), torch.amp.GradScaler("cpu", 1024)
    optimizer = train.make_optimizer(model, 1e-3, 1e-3, 0.2)
    _, gradients = step_of(small_model(), micro_batches(size), micro)
    _, scaled = step_of(model, micro_batches(size), micro, scaler=scaler)
    assert_same_gradients({name: g / 1024 for name, g in scaled.items()}, gradients)
    norm = train.update(model, optimizer, scaler, 1.0)
    expected = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
    before = [p.detach().clone() for p in model.parameters()]
    step_of(model, micro_batches(size), micro, scaler=scaler)
    model.logit_scale.grad.fill_(math.inf)
    train.update(model, optimizer, scaler, 1.0)
    torch.testing.assert_close([p.detach() for p in model.parameters()], before)
    assert scaler.get_scale() == 512


@pytest.mark.parametrize("size, micro", STEPS)
def test_compiled_equals_eager_and_lengths_of_captions_recompile_little(size, micro):
    """The image tower and the contrastive loss are compiled once, the text tower and the word loss
    once more, for all other lengths. Micro-batches run with gradients and, before, without."""
    torch._dynamo.reset()
    compiled, eager = small_model(), small_model()
    names = "visual", "text", "terms_of_each_pair", "terms_between_pairs"
    count = {name: CompileCounterWithBackend("aot_eager") for name in names}  # needs no C++
    for name in names[:2]:
        getattr(compiled, name).compile(backend=count[name], fullgraph=True)
    for name in names[2:]:
        part = torch.compile(getattr(compiled, name), backend=count[name], fullgraph=True)
        setattr(compiled, name, part)
    for T, T_label in ((16, 32), (32, 32), (16, 48), (48, 16), (32, 64), (16, 16)):
        shape = {"T": T, "T_label": T_label, "keep": KEEP}
        both = (step_of(m, micro_batches(size, **shape), micro) for m in (compiled, eager))
        torch.testing.assert_close(*both)
    runs = 1 + micro  # with gradients, and without them
    assert count["visual"].frame_count == runs and count["terms_between_pairs"].frame_count == 1
    assert max(count[name].frame_count for name in ("text", "terms_of_each_pair")) <= 2 * runs
    torch._dynamo.reset()


def test_weight_decay_is_for_matrices_alone():
    model = small_model(loss="sigmoid")
    groups = train.make_optimizer(model, 1.0, 1.0, 0.3).param_groups
    assert all((*group["betas"], group["eps"]) == (0.9, 0.98, 1e-6) for group in groups)  # CLIP's
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    vectors = "bias", "class_embedding", "logit_scale"
    for name, p in model.named_parameters():
        assert decay[p] == (0.0 if name.endswith(vectors) or "ln" in name else 0.3), name


def test_an_update_clips_and_bounds_the_scale_and_the_head_has_a_rate_of_its_own():
    model = small_model()
    optimizer = train.make_optimizer(model, 1e-4, 1e-2, 0.0)
    model.logit_scale.data.fill_(5.0)
    step_of(model, micro_batches())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert train.update(model, optimizer, NOT_SCALED, 1.0) > 1
    # Adam's first moment is a tenth of the gradient, which was cut to length 1.
    moments = torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()])
    assert moments.norm().item() == pytest.approx(0.1, rel=1e-4)
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    del before["logit_scale"]  # Adam's first step is as long as the rate
    for name, p in before.items():
        step = (model.get_parameter(name) - p).abs().max().item()
        assert step == pytest.approx(1e-2 if name.startswith("head.") else 1e-4, rel=0.05), name


def test_an_update_does_not_take_the_logit_scale_below_0():
    """exp(0) = 1: a lower scale would make all candidates alike. A step of Adam is as long as the
    learning rate."""
    model = make_model().train()
    optimizer = train.make_optimizer(model, 0.01, 0.01, 0.2)
    model.logit_scale.data.fill_(0.005)
    model.logit_scale.grad = torch.tensor(1.0)

    train.update(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), 1.0)

    assert model.logit_scale.item() == 0


def test_dropped_patches_are_a_function_of_seed_and_step():
    seeds_and_steps = (3, 5), (3, 5), (3, 6), (4, 5)
    kept = (train.patches_to_keep(0.75, 4, N, *both, "cpu") for both in seeds_and_steps)
    first, same, *others = kept
    assert torch.equal(first, same) and not any(torch.equal(first, other) for other in others)
    assert first.shape == (N, P // 4) and all(len({*row}) == P // 4 for row in first.tolist())
    assert len({*map(tuple, first.tolist())}) > 1  # each image keeps others
    assert train.patches_to_keep(0.0, 4, N, 3, 5, "cpu") is None
