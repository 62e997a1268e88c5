"""States that clients keep under an id, and go on from."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ..common.formatting import counted, short
from ..model import State
from .errors import Refused, wrong
from .fields import Fields


@dataclasses.dataclass(frozen=True)
class KeptState:
    """State after the tokens of a conversation. By default that is nothing: the model's own beginning."""

    id: str = ""
    model: str = ""
    fingerprint: str = ""  # identity of the model that read the tokens: only this model can go on
    messages: Sequence[dict[str, Any]] = ()
    tokens: Sequence[int] = ()
    state: State | None = None
    created: int = 0

    def rest(self, whole: list[int]) -> list[int]:
        """Return what follows the state in the tokens of a whole conversation. Raises Refused for another."""
        count = len(self.tokens)
        if whole[:count] != list(self.tokens):
            raise wrong(
                "state_id",
                f"the conversation of {self.id} is written otherwise in this request; send the think mode and"
                " the tools with which the state was made",
            )
        return whole[count:]

    def as_object(self) -> dict[str, Any]:
        parts = [part for layer in self.state or () for part in layer if part is not None]
        return {
            "id": self.id,
            "object": "state",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "tokens": len(self.tokens),
            "bytes": sum(part.numel() * part.element_size() for part in parts),
        }


BEGINNING = KeptState()


class States:
    """States by their ids, `most` at a time. They belong to the event loop; find() is for any thread."""

    def __init__(self, most: int):
        self.most, self.coming = most, 0
        self.by_id: dict[str, KeptState] = {}

    def find(self, fields: Fields, fingerprint: str) -> KeptState:
        """Find the state of a request, by its field state_id. Raises Refused."""
        identity = fields.text("state_id")
        if identity is None:
            return BEGINNING
        kept = self.by_id.get(identity)
        if kept is None:
            raise self._unknown(identity)
        if kept.fingerprint != fingerprint:
            raise wrong(
                "state_id",
                f"{identity} is of {kept.model}, {kept.fingerprint}, and this request is for"
                f" {fingerprint}; a state needs the same adapters at the same scale",
            )
        return kept

    @contextlib.contextmanager
    def room(self) -> Iterator[None]:
        """Hold the room of a state that is being made. Raises Refused if there is none."""
        if len(self.by_id) + self.coming >= self.most:
            raise Refused(
                400,
                f"this server keeps at most {counted(self.most, 'state')} (--limit_states); DELETE"
                " /v1/states/ID first",
                code="too_many_states",
            )
        self.coming += 1
        try:
            yield
        finally:
            self.coming -= 1

    def keep(
        self, model: str, fingerprint: str, messages: Sequence[dict], tokens: Sequence[int], state: State
    ) -> KeptState:
        identity, packed = f"state-{secrets.token_hex(12)}", array.array("q", tokens)
        new = KeptState(identity, model, fingerprint, messages, packed, state, int(time.time()))
        self.by_id[identity] = new
        return new

    def has(self, state: State) -> bool:
        return any(one.state is state for one in self.by_id.values())

    def drop(self, identity: str) -> State:
        """Forget a state and return it; answers that began with it go on."""
        if identity not in self.by_id:
            raise self._unknown(identity)
        return self.by_id.pop(identity).state

    @staticmethod
    def _unknown(identity: str) -> Refused:
        message = f"state_id: there is no state {short(identity)}; GET /v1/states lists those that are kept"
        return Refused(404, f"{message} until the server ends", "state_id", "state_not_found")
