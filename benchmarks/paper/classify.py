"""Sequence classification by a model of `transformers`: an adapter and the classifier are trained, the rest
is frozen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import rwkv_miss
from rwkv_miss import UserError

from .glue import Example

# share of the steps that warm up; then the rate falls linearly to zero (RoBERTa, arXiv 1907.11692, appendix
# C)
WARMUP = 0.06
Row = tuple[dict[str, list[int]], int]  # the tokenizer's output for an example, and the example's class


@dataclasses.dataclass(frozen=True)
class Training:
    """Settings of a training: `batch` rows a step, `lr` is the highest rate."""

    lr: float
    epochs: int
    batch: int
    seed: int


def load_tokenizer(source: str) -> Any:
    """Load the tokenizer of a folder, or of a name in Hugging Face's cache. Raises UserError if there is
    none; nothing is downloaded.
    """
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, source)


def load_model(source: str, classes: int, seed: int) -> nn.Module:
    """Load the model of a folder or a name in the cache, fp32, with a classifier for `classes` classes, drawn
    by the seed if the file has none.
    """
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model = _load(AutoModelForSequenceClassification, source, num_labels=classes, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _load(cls: Any, source: str, **options: Any) -> Any:
    try:
        with quiet():
            return cls.from_pretrained(source, local_files_only=True, **options)
    except (OSError, ValueError) as error:  # no such folder, or one without a model
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--model {source} can't be loaded: {reason} Give a folder with config.json, model.safetensors"
            " and the tokenizer's files; nothing is downloaded"
        ) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers: its progress bars, and its warning that the classifier is new, which is
    intended."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def tokenised(examples: Sequence[Example], tokenizer: Any, length: int) -> list[Row]:
    """Write each example in the tokenizer's own form for one text or a pair, cut at `length` tokens."""
    columns = [list(texts) for texts in zip(*(example.texts for example in examples))]
    encoded = tokenizer(*columns, truncation=True, max_length=length)
    return [
        ({name: values[i] for name, values in encoded.items()}, example.label)
        for i, example in enumerate(examples)
    ]


def adapt(
    model: nn.Module, method: str, targets: Sequence[str], options: dict[str, Any]
) -> rwkv_miss.inject.Injection:
    """Inject an adapter, and make the parameters outside of the base trainable: the classifier."""
    injection = rwkv_miss.inject(model, method, targets=list(targets), **options)
    for name, p in model.named_parameters():
        if not name.startswith(f"{model.base_model_prefix}."):
            p.requires_grad_(True)
    return injection


def train(model: nn.Module, tokenizer: Any, rows: Sequence[Row], training: Training) -> list[float]:
    """Do AdamW's steps, with the rows in another order in each epoch; return the loss of each."""
    order = random.Random(training.seed)
    steps = training.epochs * -(-len(rows) // training.batch)
    warmup = max(round(WARMUP * steps), 1)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=training.lr, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, (steps - i) / max(steps - warmup, 1))
    )
    losses: list[float] = []
    model.train()
    for _ in range(training.epochs):
        for inputs, labels in _batches(
            order.sample(rows, len(rows)), tokenizer, training.batch, model.device
        ):
            loss = model(**inputs, labels=labels).loss
            penalty = rwkv_miss.penalty(model)
            optimizer.zero_grad(set_to_none=True)
            (loss if penalty is None else loss + penalty).backward()
            losses.append(loss.item())
            rwkv_miss.before_step(model, len(losses), steps)
            optimizer.step()
            schedule.step()
            rwkv_miss.after_step(model, len(losses), steps)
    return losses


@torch.no_grad()
def predict(model: nn.Module, tokenizer: Any, rows: Sequence[Row], batch: int) -> list[int]:
    """Return the likeliest class of each row."""
    model.eval()
    classes = []
    for inputs, _ in _batches(rows, tokenizer, batch, model.device):
        classes += model(**inputs).logits.argmax(-1).tolist()
    return classes


def _batches(
    rows: Sequence[Row], tokenizer: Any, size: int, device: torch.device
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield inputs (rows, longest) padded at the end with their mask, and classes (rows,)."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        inputs = tokenizer.pad([encoded for encoded, _ in part], return_tensors="pt")
        yield (
            {name: tensor.to(device) for name, tensor in inputs.items()},
            torch.tensor([label for _, label in part], device=device),
        )
