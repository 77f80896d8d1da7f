"""Train with a warm-up of another length:

    python -m study.warmup --share 0.7 [options of train.py]
    python -m study.warmup --share 0.7 --shuffled [options of train.py]

In the warm-up the learning rate rises to its peak. train.py gives it half of the steps, up to
3,000. Here it gets any share of them. With --shuffled this trains the control, as study.shuffled.
"""

import train
from common.cli import make_parser, number, run_command
from study import shuffled

own_count = train.count_steps


def main(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--share", type=number(float, 0, 1), required=True, help="warm-up as a share of the steps")
    add("--shuffled", action="store_true", help="the head must predict the words of another pair")
    args, options = parser.parse_known_args(argv)

    def count_steps(args_of_run, num_pairs):
        steps, _, eval_every = own_count(args_of_run, num_pairs)
        return steps, int(args.share * steps), eval_every

    train.count_steps = count_steps
    program = shuffled if args.shuffled else train
    return program.main(options)


if __name__ == "__main__":
    run_command(main)
