"""Sizes of what ZeRO sends and holds. The plan needs them without DeepSpeed, whose import takes seconds."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ZeroSizes:
    """Sizes in elements, by DeepSpeed's names for them.

    bucket (reduce_bucket_size): gradients that are reduced at once. DeepSpeed allocates it in fp32.
    ahead (stage3_prefetch_bucket_size): parameters fetched for coming modules.
    live (stage3_max_live_parameters, stage3_max_reuse_distance): parameters that are whole at a time at most.
    kept_whole (stage3_param_persistence_threshold): a tensor of at most this size stays whole once gathered.
    """

    bucket: int
    ahead: int
    live: int
    kept_whole: int


# gloo sends nothing while something is computed, so fetching ahead only takes memory. NCCL sends on a stream
# of its own. `ahead` and `kept_whole` are DeepSpeed's defaults (runtime/zero/config.py). Its default for
# `live`, 1e9, would have a base of 1.5B parameters whole before the first backward; 1e8 in bf16 are 200 MB.
# Its bucket of 5e8 would take 2 GB; 1e7 are 40 MB, and DDP's buckets have 25.
SIZES = {
    "cpu": ZeroSizes(bucket=10_000_000, ahead=10_000_000, live=10_000_000, kept_whole=10_000),
    "gpu": ZeroSizes(bucket=10_000_000, ahead=50_000_000, live=100_000_000, kept_whole=100_000),
}
