"""How much ZeRO sends and holds at once. The plan needs it without DeepSpeed, whose import takes seconds."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ZeroSizes:
    """Numbers of elements.

    bucket: of gradients that are reduced at once. DeepSpeed allocates it in fp32.
    ahead: stage 3 fetches so many for the modules to come.
    live: stage 3 has no more than so many whole, and keeps what is needed again within as many.
    kept_whole: stage 3 never shares out tensors of up to so many, once they were gathered.
    """

    bucket: int
    ahead: int
    live: int
    kept_whole: int


# gloo: nothing is sent while something is computed, so that fetching ahead only takes memory.
# NCCL sends on a stream of its own. `ahead` and `kept_whole` are DeepSpeed's defaults
# (runtime/zero/config.py). Its default for `live`, 1e9, would have a base of 1.5B parameters whole before
# the first backward; 1e8 in bf16 are 200 MB. Its bucket of 5e8 would take 2 GB; 1e7 are 40 MB, and DDP's
# buckets have 25.
SIZES = {
    "cpu": ZeroSizes(bucket=10_000_000, ahead=10_000_000, live=10_000_000, kept_whole=10_000),
    "gpu": ZeroSizes(bucket=10_000_000, ahead=50_000_000, live=100_000_000, kept_whole=100_000),
}
