"""How many answers a training on rewards draws at once."""

from __future__ import annotations

from rwkv_miss.files.checkpoint import Arch

from ..common.device import PRECISIONS
from ..config import Config, accumulation
from ..model.batch_loss import state_bytes

# More rows make a token's operators larger and no more of them. At the end of a draw few rows are left.
ROWS = {"cpu": 128, "gpu": 512}
STATES = 3  # of a row while a token is made: the old one, the new one, and a copy in between
TOGETHER = 4096  # tokens of prompts that are read as one batch, padding included
# numbers of such a token for each channel, while a layer reads it
READING = 22
# fp32 numbers of a row for each token of the vocabulary: the logits, and what is made of them
LIKELIHOODS = 3
STATE_BYTES = {"cpu": 1 << 30, "gpu": 8 << 30}  # that these may take


def rows_at_once(arch: Arch, itemsize: int, accelerator: str, answers: int) -> int:
    """The rows of the engine for so many answers, of activations of `itemsize` bytes.

    It does not depend on the memory that is free: matrix products of other sizes may round otherwise, and a
    run that goes on draws what it would have drawn.
    """
    room = STATE_BYTES[accelerator] // (STATES * state_bytes(arch, 1, itemsize))
    return max(1, min(answers, ROWS[accelerator], room))


def rows_of_draw(config: Config, arch: Arch, precision: str, accelerator: str) -> int:
    """Answers that a process draws at once."""
    answers = config.micro_bsz * accumulation(config) * config.group_size
    return rows_at_once(arch, PRECISIONS[precision].itemsize, accelerator, answers)


def draw_bytes(config: Config, arch: Arch, precision: str, accelerator: str) -> int:
    """Bytes of the states of answers that are drawn at once, of the likelihoods of their next tokens, and of
    prompts that are read meanwhile.
    """
    itemsize = PRECISIONS[precision].itemsize
    a_row = STATES * state_bytes(arch, 1, itemsize) + LIKELIHOODS * 4 * arch.vocab_size
    prompts = min(TOGETHER, config.micro_bsz * accumulation(config) * config.ctx_len)
    read = READING * itemsize * arch.n_embd * prompts
    return rows_of_draw(config, arch, precision, accelerator) * a_row + read
