"""The time of Python and torch's dispatch in a micro-batch, on a model so small that its arithmetic is
nothing.

    python -m benchmarks.host_time [--version 7] [--n_layer 12] [--n_embd 64] [--tokens 16] [--rounds 30]

The host must launch kernels faster than a GPU computes them. Here the CPU's kernels stand for the GPU's: each
function of this project is one call on either. The program prints the CPU time of one thread in the fastest
round, and the number of calls of Python's and torch's functions, which other work on the machine does not
change. The last line is JSON.
"""

import cProfile
import pstats
import time

import torch

from src.common.batch import Batch
from src.data.collate import trained_tokens
from src.model.batch_loss import Chunks

from .common import argument_parser, report, settings_without
from .gpu_budget import size
from .step import random_model


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--version", type=int, choices=(6, 7), default=7)
    for name, default in {"n_layer": 12, "n_embd": 64, "tokens": 16, "rank": 8, "rounds": 30}.items():
        parser.add_argument(f"--{name}", type=size, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = random_model(args.version, args.n_layer, args.n_embd, 256, args.rank)
    ids = torch.zeros(1, args.tokens, dtype=torch.int64)
    trained = trained_tokens(ids.numpy(), torch.ones(ids.shape).numpy())
    batch = Batch(ids=ids, reset=torch.zeros(ids.shape, dtype=torch.bool), **trained)

    def seconds() -> tuple[float, float]:
        begun = time.process_time()
        loss = Chunks().loss(model, batch)
        between = time.process_time()
        loss.backward()
        return between - begun, time.process_time() - between

    seconds()  # warms up
    forward, backward = min((seconds() for _ in range(args.rounds)), key=sum)
    with cProfile.Profile() as profile:
        seconds()
    calls = pstats.Stats(profile).total_calls
    print(f"forward {1e3 * forward:.1f} ms, backward {1e3 * backward:.1f} ms, {calls:,} calls")
    report("host_time", settings=settings_without(args), forward=forward, backward=backward, calls=int(calls))


if __name__ == "__main__":
    main()
