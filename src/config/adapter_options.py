"""Adapter of a run, as one object: --peft, --peft_config and --train_parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

import rwkv_miss
from rwkv_miss.adapter import METHODS
from rwkv_miss.errors import UserError

TARGET_NAMES = ("targets", "target_modules")
METHOD_ALIASES = {"bone": "miss", "disha": "miss"}  # MiSS had these names in 2024 and 2025


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    """Arguments of inject()."""

    method: str
    options: Mapping[str, Any]  # options of the method, under the names that the user gave
    targets: list[str] | None  # None: the paper's
    train_parts: str = ""
    layers: str = ""  # "": all
    tokens: tuple[int, ...] = ()  # whose rows of emb and head are trained; (): all

    @classmethod
    def of(
        cls,
        method: str,
        given: Mapping[str, Any],
        train_parts: str = "",
        layers: str = "",
        tokens: tuple[int, ...] = (),
    ) -> AdapterOptions:
        """Parse a setting that holds the targets among the options. Raises UserError."""
        options, targets = dict(given), None
        for name in TARGET_NAMES:
            targets = options.pop(name, targets)
        if targets is not None and not (
            isinstance(targets, list) and all(isinstance(target, str) for target in targets)
        ):
            raise UserError(
                f'--peft_config targets must be a list of names, such as ["key", "value"]; got {targets!r}'
            )
        return cls(method, options, targets, train_parts, layers, tokens)

    @property
    def gives_rank(self) -> bool:
        """Tell whether the rank is among the options, under any of its names."""
        aliases = METHODS[self.method].Options.aliases
        return any(aliases.get(name, name) == "rank" for name in self.options)

    def inject(self, model: nn.Module, earlier: Mapping[str, Any] | None = None) -> None:
        """Put the adapter into the model; `earlier` is the checkpoint that a run resumes from."""
        rwkv_miss.inject(
            model,
            self.method,
            self.targets,
            self.train_parts,
            earlier,
            layers=self.layers or None,
            keep_first=False,
            tokens=self.tokens,
            **self.options,
        )
