"""Small trained models, each with a batch to learn: the demo's base, and two that others trained, from a
folder outside the project.
"""

from __future__ import annotations

import dataclasses
import pathlib
import random
import string

import torch
from torch import Tensor

from demo.task import TASKS
from rwkv_miss import UserError
from src import ops
from src.model import RWKV

ROOT = pathlib.Path(__file__).parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Task:
    """A model in fp32 and rows of ids (B, T + 1) with the tokens that carry loss, (B, T) bool."""

    model: RWKV
    ids: Tensor
    wanted: Tensor

    def loss(self, model: RWKV) -> Tensor:
        """Compute the mean loss of another model, such as an adapted copy of this one, on the rows."""
        (wanted,) = self.wanted.flatten().nonzero(as_tuple=True)
        x, _ = model.features(self.ids[:, :-1], wanted=wanted)
        return model.loss(x, self.ids[:, 1:].flatten()[wanted]) / len(wanted)


def _model(path: pathlib.Path) -> RWKV:
    if not path.is_file():
        raise UserError(
            f"{path} is absent; give the folder that has real/ and tinyshakespeare.txt as --data, or leave"
            " out this model"
        )
    model = RWKV.load(path, torch.float32)
    kernel, _ = ops.choose("auto", "cpu", model.arch.head_size)
    return RWKV.load(path, torch.float32, kernel=kernel)


def shakespeare(data: pathlib.Path) -> Task:
    """Load rwkv6-3m-utf16, 12 layers of 128, with 8 rows of 256 characters of Shakespeare, two bytes each."""
    model = _model(data / "real/rwkv6-3m-utf16.pth")
    text = (data / "tinyshakespeare.txt").read_text()
    starts = random.Random(0).sample(range(len(text) - 257), 8)
    ids = torch.stack(
        [
            torch.frombuffer(bytearray(text[i : i + 257].encode("utf-16-le"))[:513], dtype=torch.uint8)
            for i in starts
        ]
    ).long()
    return Task(model, ids, torch.ones(8, 512, dtype=torch.bool))


def digits(data: pathlib.Path) -> Task:
    """Load rwkv7-reverse, 4 layers of 32, which reverses digits, with rows of a changed task: 123, becomes
    432# (1 is added to each).
    """
    model, draw = _model(data / "real/rwkv7-reverse.pth"), random.Random(0)
    rows = [draw.choices(range(10), k=12) for _ in range(64)]
    ids = torch.tensor([[*row, 10, *((digit + 1) % 10 for digit in reversed(row)), 11] for row in rows])
    return Task(model, ids, (torch.arange(25) >= 12).expand(64, -1).contiguous())


def letters(data: pathlib.Path) -> Task:
    """Load the demo's base, 3 layers of 96, which reverses letters, with questions to sort them."""
    model, draw = _model(ROOT / "demo/rwkv7-reverse.pth"), random.Random(0)
    drawn = ["".join(draw.choices(string.ascii_lowercase, k=6)) for _ in range(64)]
    texts = [(f"User: sort {text}\n\nAssistant:", f" {TASKS['sort'](text)}\n\n") for text in drawn]
    ids = torch.tensor([list((question + answer).encode()) for question, answer in texts])
    return Task(
        model, ids, (torch.arange(ids.shape[1] - 1) >= len(texts[0][0]) - 1).expand(len(ids), -1).contiguous()
    )


MAKE = {"rwkv6-3m": shakespeare, "rwkv7-reverse": digits, "demo": letters}


def make(name: str, data: str) -> Task:
    """Make a task by its model's name; `data`: the folder with the others' files. Raises UserError if there
    is no such model.
    """
    if name not in MAKE:
        raise UserError(f"model {name!r} is unknown; there are: {', '.join(MAKE)}")
    return MAKE[name](pathlib.Path(data))
