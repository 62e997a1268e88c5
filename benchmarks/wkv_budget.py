"""Time of the WKV on a card, by arithmetic: its bytes, the scratch that the L2 cache does not hold, its work.

No GPU has confirmed this arithmetic. It sums these parts, as if none ran during another:

- bytes: each argument and result once (benchmarks/op_counts.py), and the scratch below, at the bandwidth;
- scratch: one kernel writes the factors of a segment of time and the gradients of its states, and the next
  reads them. A share of 1 - L2 / scratch goes to memory and back, and so do inputs that a later kernel of the
  segment reads again;
- work: the longest of instructions, passes over shared memory, and tensor cores;
- START for each launch.

A card whose L2 has two halves (A100, H100) may hold less than is assumed here.
"""

from typing import NamedTuple


class Card(NamedTuple):
    bandwidth: float  # bytes a second of memory
    flops: float  # operations a second of tensor cores, dense, with fp32 sums
    name: str
    multiprocessors: int
    clock: float  # Hz
    l2: float  # bytes


class Work(NamedTuple):
    """Instructions that the warps of a head run for 16 tokens."""

    instructions: int  # number of PTX instructions
    passes: int  # over the 32 banks of shared memory, and exchanges between lanes
    products: int  # mma of 16 x 8 x 16


# (version, on tensor cores, backward) -> instructions executed on sm_80 with 128 heads or more, which
# gpu_emulation/test_ptx_wkv.py counts again
WORK = {
    (6, True, False): Work(3993, 862, 104),
    (6, True, True): Work(12411, 1982, 264),
    (7, True, False): Work(6243, 1147, 216),
    (7, True, True): Work(16041, 3088, 560),
    (6, False, False): Work(19870, 3042, 0),
    (6, False, True): Work(57459, 6420, 0),
    (7, False, False): Work(28102, 5186, 0),
    (7, False, True): Work(77722, 11172, 0),
}
# Machine instructions for one PTX instruction. On tensor cores counted by nvdisasm for sm_90
# (docs/worklog-archive.md: 14,010 of 17,320); for the recurrence by code sizes for sm_75: v6 0.92, v7 0.99.
MACHINE = {True: 0.81, False: 0.96}
# warps' instructions, and passes over shared memory, in a clock of a multiprocessor (CUDA programming guide)
INSTRUCTIONS, PASSES = 4, 1
PRODUCT = 2 * 16 * 8 * 16  # operations of an mma
# assumed seconds from the end of a kernel until the next one works at full speed
START = 3e-6

# constants of cuda/chunked.cuh, and bytes for a chunk of a head: Factors, State, inputs that are read twice
CHUNK, SEGMENT_HEADS, SEGMENT_CHUNKS = 16, 1024, 16
FACTORS, STATE, AGAIN = {6: 4864, 7: 9472}, 8192, {6: 4 * 2048, 7: 6 * 2048}


class Calls(NamedTuple):
    """Number and shape of the WKV's calls in a step."""

    version: int
    tensor_cores: bool
    forwards: int
    backwards: int
    B: int
    T: int
    H: int

    @property
    def chunks(self) -> int:
        return -(-self.T // CHUNK)


def segments(B: int, T: int, H: int, most: int = 0) -> int:
    """Count the segments of time as Sizes in cuda/chunked.cuh does; most: with at most this many chunks."""
    chunks = -(-T // CHUNK)
    count = -(-chunks // (most or max(SEGMENT_CHUNKS, SEGMENT_HEADS // (B * H))))
    return -(-chunks // -(-chunks // count))


def scratch(calls: Calls, most: int = 0) -> tuple[int, int]:
    """Return the bytes that (a forward, a backward) writes in a segment for its next kernel."""
    of_heads = calls.B * calls.H * -(-calls.chunks // segments(calls.B, calls.T, calls.H, most))
    return of_heads * FACTORS[calls.version], of_heads * (FACTORS[calls.version] + STATE)


def beyond(calls: Calls, l2: float, most: int = 0) -> float:
    """Return the bytes that a step moves because an L2 of this size does not hold the scratch."""
    if not calls.tensor_cores:
        return 0
    forward, backward = scratch(calls, most)
    again = AGAIN[calls.version] / (FACTORS[calls.version] + STATE)
    return segments(calls.B, calls.T, calls.H, most) * (
        calls.forwards * max(0, forward - l2) * 2 + calls.backwards * max(0, backward - l2) * (2 + again)
    )


def launches(calls: Calls, most: int = 0) -> int:
    """Return the launches of a step on tensor cores."""
    once, after = 2 * calls.forwards + 3 * calls.backwards, calls.backwards * (calls.version == 6)
    return segments(calls.B, calls.T, calls.H, most) * once + after


def work(calls: Calls, card: Card) -> dict[str, float]:
    """Return the seconds that each part of a multiprocessor is busy in a step."""
    chunks = calls.B * calls.H * calls.chunks
    forward, backward = (WORK[calls.version, calls.tensor_cores, both] for both in (False, True))
    instructions, passes, products = (
        chunks * (calls.forwards * once + calls.backwards * again)
        for once, again in zip(forward, backward, strict=True)
    )
    clocks = card.multiprocessors * card.clock
    return {
        "instructions": instructions * MACHINE[calls.tensor_cores] / (INSTRUCTIONS * clocks),
        "shared memory": passes / (PASSES * clocks),
        "tensor cores": products * PRODUCT / card.flops,
    }


def best(calls: Calls, l2: float, bandwidth: float, gpu: float, host: float, launch: float) -> int:
    """Return the number of chunks in a segment that makes the step shortest with this L2.

    `bandwidth`: reached bytes a second. `gpu`, `host`: seconds of their other work in the step. `launch`:
    seconds of the host for a launch.
    """

    def seconds(most: int) -> float:
        count = launches(calls, most)
        return max(gpu + beyond(calls, l2, most) / bandwidth + count * START, host + count * launch)

    return min(range(1, calls.chunks + 1), key=seconds)
