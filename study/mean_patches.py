"""Features are means of patches: python -m study.mean_patches --cls_weight 0 [options of train.py]

The word head reads that mean. So perhaps CLIP gains as much if its own loss reads it.
"""

import torch.nn.functional as F

import superclip
import train
from cli import run_command


def mean_of_patches(model, image_tokens, normalize=True):
    features = image_tokens[:, 1:].mean(dim=1) @ model.visual.proj
    return F.normalize(features.float(), dim=-1) if normalize else features


def main(argv):
    superclip.SuperCLIP.image_features = mean_of_patches
    return train.main(argv)


if __name__ == "__main__":
    run_command(main)
