"""Choice of the source of a run's examples."""

from __future__ import annotations

from ..config import Config
from ..losses import LOSSES
from .base import Source
from .documents import DocumentSource
from .drawn.rewarded import RewardSource
from .drawn.taught import TaughtDrawnSource
from .pairs.source import PairSource
from .taught_documents import TaughtDocumentSource

# (source of the loss, whether it needs a teacher) -> class that reads or draws its examples
KINDS = {
    ("documents", False): DocumentSource,
    ("documents", True): TaughtDocumentSource,
    ("pairs", False): PairSource,
    ("labels", False): PairSource,
    ("questions", False): RewardSource,
    ("questions", True): TaughtDrawnSource,
}


def source_of(config: Config) -> Source:
    """Return the source of --loss."""
    loss = LOSSES[config.loss]
    return KINDS[loss.source, loss.needs_teacher](config)
