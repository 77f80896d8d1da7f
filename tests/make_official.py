"""Make official_tiny.pt: what the code of the paper's authors computes, for test_authors.py.

    git clone https://github.com/hustvl/SuperCLIP && git -C SuperCLIP checkout fb59c6d
    pip install -r SuperCLIP/requirements.txt
    python tests/make_official.py SuperCLIP official_tiny.pt

No test runs this. When it was written the clone was not at hand, and their SuperCLIP and
SuperClipLoss were rebuilt for a trial: parameters drawn in the same order, the same formulas. The
trial drew the weights, images and captions of official_tiny.pt to the bit, and differed from its
outputs by 1.4e-6 at most, and from its norms by a millionth of each. With the clone itself it has
not run.
"""

import sys

import torch
import torch.nn.functional as F

V = 300  # tokens; the last two are start and end, and 0 is padding
CONTEXT = 16
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 128,
        "head_width": 64,
        "patch_size": 8,
        "output_tokens": True,  # their word head needs the patches
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": V,
        "width": 64,
        "heads": 1,
        "layers": 2,
    },
    "clstext_cfg": {"context_length": CONTEXT, "vocab_size": V, "layers": 0, "mlp_ratio": 4},
}
B = 6  # pairs of a step


@torch.no_grad()
def make_model(superclip_class):
    """The authors' model. Its vectors are moved away from their initial values, because at zeros
    and ones a bias or a norm in the wrong place would change nothing."""
    torch.manual_seed(0)
    model = superclip_class(**CONFIG).train()
    for p in model.parameters():
        if p.ndim == 1:
            p += 0.05 * torch.randn_like(p)
    return model


def draw_words(n):
    return torch.randint(1, 40, (n,))  # few, so that captions share some


def make_captions(is_long):
    """Returns tokens (B, CONTEXT). is_long: the first caption fills the context."""
    tokens = torch.zeros(B, CONTEXT, dtype=torch.long)
    for i, row in enumerate(tokens):
        words = draw_words(torch.randint(1, 12, ()))
        if is_long and i == 0:
            words = draw_words(CONTEXT - 2)
        row[: len(words) + 2] = torch.tensor([V - 2, *words, V - 1])
    return tokens


def masked_class_loss(logits, captions, counts, num_captions):
    """The authors' word loss without padding, start and end, by their formula: w = log((N + 1) /
    (n + 1)). counts (V,): captions so far, these included, that contain each token."""
    labels = torch.zeros_like(logits).scatter(1, captions, 1.0)
    weights = ((num_captions + 1) / (counts + 1)).log().float()
    weights[[0, V - 2, V - 1]] = 0.0
    labels = F.normalize(labels * weights, p=1, dim=1)
    return -(labels * logits.log_softmax(dim=1)).sum(dim=1).mean()


def make_steps(model, loss, n=3):
    """n training steps in a row: a list of dicts. The weights stay as they are, and the authors'
    counters go on. In the second step, one caption has no padding."""
    torch.manual_seed(1)
    counts = torch.zeros(V, dtype=torch.double)
    steps = []
    for i in range(n):
        images = torch.randn(B, 3, 32, 32)
        captions = make_captions(is_long=i == 1)
        model.zero_grad()

        out = model(images, captions)
        losses = loss(**out, output_dict=True)
        sum(losses.values()).backward()

        counts += torch.zeros(B, V).scatter(1, captions, 1.0).sum(dim=0)
        logits = out["logits"].detach()
        norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
        step = {
            "image": images,
            "text": captions,
            "image_features": out["image_features"],
            "text_features": out["text_features"],
            "class_logits": logits,
            "class_loss": losses["class_loss"],
            "contrastive_loss": losses["contrastive_loss"],
            "class_loss_masked": masked_class_loss(logits, captions, counts, B * (i + 1)),
            "grad_norms": norms,
        }
        steps.append({name: x.detach() if torch.is_tensor(x) else x for name, x in step.items()})
    return steps


def main(clone, output):
    # Their open_clip is a fork, and must come before an installed one.
    sys.path.insert(0, f"{clone}/superclip")
    from open_clip.loss import SuperClipLoss
    from open_clip.superclip_model import SuperCLIP

    model = make_model(SuperCLIP)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps = make_steps(model, SuperClipLoss())
    torch.save({"config": CONFIG, "state_dict": state, "steps": steps}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
