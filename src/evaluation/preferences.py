"""Preferences of a model: how likely it finds each answer of preference data, compared with a reference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from rwkv_miss.progress import Progress

from ..common.formatting import counted
from ..data.answer_batches import collate_answers
from ..data.dataset import load
from ..data.encode import Encoder
from ..data.formats import LABELS, PAIRS, Reading, Report, read_records
from ..data.preferences import Preferences
from ..data.tokenizer import Tokenizer
from ..losses import LOSSES
from ..losses._preference import SUMS, PreferenceLoss
from ..model import RWKV
from ..model.batch_loss import Chunks

TOKENS = 1 << 13  # tokens in one pass, padding included
CHUNK = 1 << 11  # tokens of a longer row at once
GAIN = 1.2  # factor that pays for a second pass
LONGEST = 1 << 30  # tokens of a row: memory does not depend on it
# metrics of means() about rewards, which are measured against a reference
OF_REWARDS = ("reward_chosen", "reward_rejected", "margin", "reward_accuracy", "baseline")

# rows of MeasuredPreferences.lines(): description, name of the figure, name of the reference's
TABLE = (
    ("log p of the chosen answers", "logp_chosen", "reference_logp_chosen"),
    ("log p of the rejected answers", "logp_rejected", "reference_logp_rejected"),
    ("NLL of the chosen answers, per token", "nll"),
    ("raw accuracy", "raw_accuracy", "reference_raw_accuracy"),
    ("raw accuracy, by means per token", "raw_accuracy_per_token"),
    ("reward of the chosen answers", "reward_chosen"),
    ("reward of the rejected answers", "reward_rejected"),
    ("margin", "margin"),
    ("reward accuracy", "reward_accuracy"),
    ("reward accuracy, by means per token", "reward_accuracy_per_token"),
    ("KTO's baseline", "baseline"),
)
WIDTH = max(len(text) for text, *_ in TABLE)


def read_preferences(path: str, encoder: Encoder, reading: Reading) -> Preferences:
    """Read the pairs of a file, or its answers with labels, by its first row; prints the rows left out.

    Raises UserError for a row that is neither.
    """
    labels = dataclasses.replace(reading, rows=LABELS)
    first = next((record for _, record in read_records(path, Report(), labels)), {})
    rows = LABELS if "label" in first else PAIRS
    report = Report()
    data = load(path, encoder, reading=dataclasses.replace(reading, rows=rows), report=report)
    for line in report.lines():
        print(line)
    return data.preferences(LONGEST)


@torch.no_grad()
def log_probs(model: RWKV, data: Preferences, doing: str) -> np.ndarray:
    """Compute ln p of every trained token, in order, by example and answer: (data.targets,) float32."""
    device = model.emb.weight.device
    counts = data.target_counts
    ends = np.cumsum(counts, dtype=np.int64)
    values = np.empty(data.targets, np.float32)
    with Progress(doing, len(data), "pairs" if data.paired else "answers") as bar:
        for places in batches(data.lengths - 1):
            chunk = CHUNK if data.lengths[places[-1]] > TOKENS else 0
            shared = not chunk and prompts_once(data, places)
            batch = collate_answers([[data[i]] for i in places], len(places), chunk, shared)
            of_batch = Chunks(chunk).log_probs(model, batch.to(device)).float().cpu()
            for i, part in zip(places, of_batch.split([int(counts[i]) for i in places]), strict=True):
                values[ends[i] - counts[i] : ends[i]] = part.numpy()
            bar.update(len(places))
    return values


def prompts_once(data: Preferences, places: list[int]) -> bool:
    """Tell whether these pairs, read with each prompt once, are clearly fewer tokens, with padding."""
    if not data.paired:
        return False
    answers = 2 * np.array(places)[:, None] + [0, 1]
    prompts = data.prompt_lengths[answers]
    rest = data.answers.lengths[answers] - prompts
    return GAIN * (prompts.max() + 2 * rest.max()) < data.lengths[places].max()


def batches(lengths: np.ndarray) -> list[list[int]]:
    """Cut places of examples in ascending length into batches of at most TOKENS, padded to their longest.

    A longer example is alone, so that the order of its tokens is that of their chunks.
    """
    found: list[list[int]] = []
    for place in np.argsort(lengths, kind="stable").tolist():
        if not found or (len(found[-1]) + 1) * int(lengths[place]) > TOKENS:
            found.append([])
        found[-1].append(place)
    return found


@dataclasses.dataclass(frozen=True)
class MeasuredPreferences:
    """Measurement of preference data by a model's log-probabilities.

    `figures` are the metrics of a training with these data held out. Names that end in _per_token compare
    means over the tokens of an answer; the others compare sums. Names that begin with reference_ are the
    reference's own. Without a reference there are no figures of rewards.

    The arrays have for each answer, in the order of the data: trained tokens, ln p, ln p by the reference.
    """

    data: Preferences
    figures: dict[str, float]
    tokens: np.ndarray  # (A,) int64
    log_p: np.ndarray  # (A,) float64
    reference: np.ndarray | None  # (A,) float64

    @property
    def counts(self) -> dict[str, int]:
        """Count the pairs, or the answers of each label."""
        if self.data.paired:
            return {"pairs": len(self.data)}
        chosen = int(np.count_nonzero(self.data.chosen))
        return {"chosen": chosen, "rejected": len(self.data) - chosen}

    @property
    def counted(self) -> str:
        """Write the counts for people."""
        if self.data.paired:
            return counted(len(self.data), "pair")
        return ", ".join(f"{counted(count, f'{name} answer')}" for name, count in self.counts.items())

    def lines(self) -> list[str]:
        """Write the figures as a table."""
        lines = [] if self.reference is None else [f"{'':{WIDTH}}{'model':>11}{'reference':>11}"]
        for text, *names in TABLE:
            values = [
                f"{self.figures[name]:.1%}" if "accuracy" in name else f"{self.figures[name]:.4f}"
                for name in names
                if name in self.figures
            ]
            if values:
                lines.append(f"{text:{WIDTH}}" + "".join(f"{value:>11}" for value in values))
        return lines

    def worst(self, count: int, tokenizer: Tokenizer) -> list[str]:
        """Return at most `count` pairs that are furthest on the wrong side, with their distance."""
        if not self.data.paired:
            return []
        values = self.log_p if self.reference is None else self.log_p - self.reference
        margins = values[0::2] - values[1::2]
        wrong = np.argsort(margins, kind="stable")[:count]
        rows = list(self.rows(tokenizer, [int(i) for i in wrong if margins[i] <= 0]))
        return [
            f"{margins[i]:.4f}: {row['prompt'][-80:]!r} -> {row['chosen']!r}, not {row['rejected']!r}"
            for i, row in zip(wrong, rows)
        ]

    def rows(self, tokenizer: Tokenizer, places: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Yield the texts and numbers of the examples at these places."""
        for i in places:
            example = self.data[i]
            row: dict[str, Any] = {"prompt": tokenizer.decode(example.prompt.tolist())}
            for place, (answer, chosen) in enumerate(zip(example.answers, example.chosen, strict=True)):
                name, number = "chosen" if chosen else "rejected", i * self.data.size + place
                row[name] = tokenizer.decode(answer.ids[len(example.prompt) :].tolist())
                row[f"tokens_{name}"] = int(self.tokens[number])
                row[f"logp_{name}"] = float(self.log_p[number])
                if self.reference is not None:
                    row[f"reference_{name}"] = float(self.reference[number])
            yield row


@dataclasses.dataclass(frozen=True)
class Compared:
    """Preference data with ln p by a reference, or without. `others` are KTO's prompts with other answers."""

    data: Preferences
    others: Preferences | None = None

    @classmethod
    def with_reference(cls, data: Preferences, model: RWKV) -> Compared:
        """Add ln p by `model`, the reference."""

        def referenced(examples: Preferences) -> Preferences:
            return examples.with_reference(log_probs(model, examples, "reference"))

        return cls(referenced(data), None if data.paired else referenced(data.mismatched()))

    def measure(self, model: RWKV, beta: float) -> MeasuredPreferences:
        """Measure the model; rewards are `beta` times the ratio."""
        log_p = log_probs(model, self.data, "log p")
        baseline = 0.0
        if self.others:
            ratio = log_probs(model, self.others, "KTO's baseline").astype(np.float64) - self.others.reference
            baseline = max(0.0, float(ratio.sum()) / len(self.others))
        return measured(self.data, log_p, beta, baseline)


def measured(data: Preferences, log_p: np.ndarray, beta: float, baseline: float = 0.0) -> MeasuredPreferences:
    """Measure by ln p of every trained token, (data.targets,) float32. `baseline` is KTO's."""
    sums = np.zeros(len(SUMS))
    answers, end = [], 0  # (trained tokens, ln p, ln p by the reference)
    # without a reference all rewards are 0, and are not shown
    compared = data.with_reference(np.zeros_like(log_p)) if data.reference is None else data
    loss = loss_for(data, beta)
    for example in compared:
        start, end = end, end + example.targets
        batch = collate_answers([[example]], 1.0).having(baseline=baseline)
        sums += loss.from_log_probs(torch.from_numpy(log_p[start:end]), batch)[1].numpy()
        for answer, reference in zip(example.answers, example.reference, strict=True):
            part = slice(start, start := start + answer.targets)
            totals = [values.sum(dtype=np.float64) for values in (log_p[part], reference)]
            answers.append((answer.targets, *totals))
    figures = {name: value for name, value in loss.means(sums.tolist()).items() if math.isfinite(value)}
    if data.reference is None:
        figures = {name: value for name, value in figures.items() if name not in OF_REWARDS}
    tokens, totals, references = map(np.array, zip(*answers, strict=True))
    result = MeasuredPreferences(
        data, figures, tokens, totals, None if data.reference is None else references
    )
    figures |= _reference_figures(result) | _figures_per_token(result)
    return result


def loss_for(data: Preferences, beta: float) -> PreferenceLoss:
    """Choose the loss with the metrics: DPO, or without pairs KTO, whose rewards are the same."""
    loss = LOSSES["dpo" if data.paired else "kto"]
    return loss(loss.Options(beta=beta, sft_weight=0.0))


def _reference_figures(found: MeasuredPreferences) -> dict[str, float]:
    """Return figures of the reference's own log p of the answers."""
    if found.reference is None:
        return {}
    chosen = found.data.chosen
    values = {"chosen": found.reference[chosen], "rejected": found.reference[~chosen]}
    figures = {f"reference_logp_{name}": float(log_p.mean()) for name, log_p in values.items() if len(log_p)}
    if found.data.paired:
        figures["reference_raw_accuracy"] = _share_above(found.reference)
    return figures


def _figures_per_token(found: MeasuredPreferences) -> dict[str, float]:
    """Return the accuracies of pairs by the means over the tokens of an answer."""
    if not found.data.paired:
        return {}
    figures = {"raw_accuracy_per_token": _share_above(found.log_p / found.tokens)}
    if found.reference is not None:
        ratios = (found.log_p - found.reference) / found.tokens
        figures["reward_accuracy_per_token"] = _share_above(ratios)
    return figures


def _share_above(values: np.ndarray) -> float:
    """Return the share of pairs whose chosen answer has the larger value (A,); a tie counts as half."""
    chosen, rejected = values[0::2], values[1::2]
    return float((chosen > rejected).mean() + (chosen == rejected).mean() / 2)
