"""The image tower learns at twice the rate: python -m study.fast_tower --cls_weight 0 [options]

At first the word loss sends the image tower a longer gradient than the contrastive loss does. So
perhaps a faster image tower is all that CLIP needs.
"""

import train
from cli import run_command

usual_optimizer = train.make_optimizer


def fast_tower(model, *options):
    optimizer = usual_optimizer(model, *options)
    tower = {*model.visual.parameters()}
    for group in [*optimizer.param_groups]:
        params = [p for p in group["params"] if p in tower]
        group["params"] = [p for p in group["params"] if p not in tower]
        optimizer.add_param_group({**group, "params": params, "peak": 2 * group["peak"]})
    return optimizer


def main(argv):
    train.make_optimizer = fast_tower
    return train.main(argv)


if __name__ == "__main__":
    run_command(main)
