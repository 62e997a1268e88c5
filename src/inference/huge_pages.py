"""Huge pages, memory in pages of 2 MB, in which a CPU's decoder reads its weights faster.

Every token reads all weights once, so the CPU walks through as many pages as they have. With 2 MB pages it
looks up 512 times fewer of them. Weights that are mapped from a file stay in pages of 4 KB: huge pages need a
copy, in memory that can't be dropped when another program needs it. Linux gives such pages to a region that
asks for them (`transparent_hugepage` is `madvise` or `always`), if it has any.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..common.available_memory import GIB, free_memory
from ..common.formatting import size_text

PAGE, LINE = 2 << 20, 64
SWITCH = "/sys/kernel/mm/transparent_hugepage/enabled"


class Region:
    """Anonymous memory for tensors, in huge pages if `huge` and the system has them.

    It lives as long as one of its tensors does.
    """

    def __init__(self, size: int, huge: bool = True):
        self.size, self.used, self.huge = size, 0, huge
        # shared memory, Python's default, has huge pages only by a switch of its own
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        whole = mmap.mmap(-1, size + PAGE, flags)
        self.memory = torch.frombuffer(whole, dtype=torch.uint8)
        self.start = -self.memory.data_ptr() % PAGE
        if huge and hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                whole.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel without them
                self.huge = False

    def take(self, size: int) -> Tensor:
        """Take the next `size` bytes, uint8, from a multiple of 64 bytes on."""
        begin = self.start + self.used
        self.used += rounded(size)
        if self.used > self.size:
            raise ValueError(f"the region has {self.size} bytes, {self.used} are asked for")
        return self.memory[begin : begin + size]

    def huge_bytes(self) -> int:
        """Count the bytes that lie in huge pages now."""
        begin = self.memory.data_ptr() + self.start
        return huge_bytes(begin, begin + self.size)

    def describe(self) -> str:
        """Say "258 MiB copied, 256 MiB of it into large memory pages", or why none of it."""
        copied = f"{size_text(self.used)} copied"
        if found := self.huge_bytes():
            return f"{copied}, {size_text(min(found, self.used))} of it into large memory pages"
        why = f", not into large memory pages ({problem() or 'the system had none left'})"
        return copied + why * self.huge


def rounded(size: int) -> int:
    """Round up to whole cache lines."""
    return -(-size // LINE) * LINE


def problem() -> str:
    """Say why this system gives no huge pages; "" if it does."""
    try:
        with open(SWITCH) as file:
            chosen = file.read().partition("[")[2].partition("]")[0]
    except OSError:
        return "this system has none"
    return f"{SWITCH} is never" if chosen == "never" else ""


def huge_bytes(begin: int, end: int, smaps: str = "/proc/self/smaps") -> int:
    """Count the bytes in huge pages of this process's mappings between two addresses, at most end - begin."""
    total, inside = 0, False
    try:
        with open(smaps) as file:
            for line in file:
                first, _, rest = line.partition(" ")
                if not first.endswith(":"):  # a mapping's first line: "7f12-7f34 rw-p ..."
                    low, high = (int(address, 16) for address in first.split("-"))
                    inside = low < end and high > begin
                elif inside and first == "AnonHugePages:":
                    total += int(rest.split()[0]) << 10
    except OSError:
        return 0
    return min(total, end - begin)


def wanted(choice: str, size: int) -> bool:
    """Tell whether to copy `size` bytes. auto takes at most a third of the free memory, and leaves a GiB."""
    if choice != "auto":
        return choice == "yes"
    return not problem() and max(3 * size, size + GIB) <= free_memory("cpu")


def size_of(tensors: Iterable[Tensor]) -> int:
    """Count the bytes that a region needs for these tensors."""
    return sum(rounded(tensor.nbytes) for tensor in tensors)


def move_weights(weights: Mapping[str, nn.Parameter | None], choice: str) -> str:
    """Move the matrices that every token reads into a region: all but the embedding.

    Returns a sentence about the copy; "" for no. `choice` is yes, no or auto.
    """
    matrices = [p for name, p in weights.items() if p is not None and p.dim() > 1 and name != "emb.weight"]
    size = size_of(matrices)
    if choice == "no":
        return ""
    if not wanted(choice, size):
        return f"not in large memory pages ({problem() or f'these need a copy, {size_text(size)}'})"
    return move(matrices).describe()


def move(parameters: list[nn.Parameter]) -> Region:
    """Move the parameters' values into a region. The parameters stay the same objects; old memory is
    freed."""
    region = Region(size_of(parameters))
    for parameter in parameters:
        place = region.take(parameter.nbytes).view(parameter.dtype).view(parameter.shape)
        parameter.data = place.copy_(parameter.detach())
    return region
