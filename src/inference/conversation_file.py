"""A conversation as a file: what was said, the state after it, and the random numbers to come, so that it
goes on as if it had not stopped.

The file is a checkpoint of the tensors blocks.i.att_x, blocks.i.wkv and blocks.i.ffn_x, the parts of the
state (model.LayerState), and `generator`, with everything else as metadata. A state belongs to the weights
that computed it: it is used by a model of the same base with the same adapters at the same scale; with other
adapters the turns are read again, and with another base the file is refused.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import check_finite, read_checkpoint, read_metadata, write_checkpoint
from rwkv_miss.files.untrusted import check_sums

from ..data.rwkv_template import MODES
from ..data.templates import load_template
from ..model import LayerState, State
from .adapters import Adapters
from .conversation import Conversation, Turn
from .cpu_decoder import Decoder

CHAT_FORMAT = "rwkv-miss chat"
# of the metadata, beside format and format_version
KINDS = {
    "base": str,
    "base_fingerprint": str,
    "weights": dict,
    "tokenizer": str,
    "template": str,
    "system": str,
    "turns": list,
    "read": int,
}


def save_chat(conversation: Conversation, adapters: Adapters, path) -> None:
    """Write the conversation, atomically. UserError where the file can't be written, or is there and no saved
    chat.
    """
    if os.path.exists(path) and (not os.path.isfile(path) or _format(path) != CHAT_FORMAT):
        raise UserError(f"{path} is there already and is no saved chat; choose another name")
    model = adapters.model
    tensors = {"generator": conversation.generator.get_state()}
    for layer, parts in enumerate(conversation.state or ()):
        tensors |= {
            f"blocks.{layer}.{name}": part for name, part in zip(LayerState._fields, parts, strict=True)
        }
    write_checkpoint(
        path,
        tensors.items(),
        {
            "format": CHAT_FORMAT,
            "format_version": 1,
            "base": model.base_name,
            "base_fingerprint": model.base_fingerprint,
            "weights": adapters.identity(),
            "tokenizer": os.path.basename(conversation.tokenizer.name),
            "template": conversation.template.record,
            "system": conversation.system,
            "turns": [turn._asdict() for turn in conversation.turns],
            "read": conversation.read,
        },
    )


def load_chat(conversation: Conversation, adapters: Adapters, path) -> bool:
    """Put a saved conversation in the place of this one; returns whether its state is used, else its turns
    are read again.

    UserError for a file that is damaged, no saved chat, or of another base, tokenizer or size; the
    conversation is then as it was.
    """
    metadata = _read_metadata(path)
    model, tokenizer = adapters.model, conversation.tokenizer
    if not (model.base_identity and model.base_identity.is_recorded(metadata["base_fingerprint"], path)):
        raise UserError(
            f"{path} was saved with another base ({metadata['base']}), not with {model.base_name}; go on with"
            " that one"
        )
    if metadata["tokenizer"] != os.path.basename(tokenizer.name):
        raise UserError(
            f"{path} was saved with --tokenizer {metadata['tokenizer']}, this chat has {tokenizer.name}; go"
            " on with that one"
        )
    turns = [_turn(path, turn) for turn in metadata["turns"]]
    tensors = read_checkpoint(path)
    generator = _generator(path, tensors.pop("generator", None))
    state = _state(path, tensors, adapters) if metadata["read"] else None
    if (
        not 0 <= metadata["read"] <= len(turns)
        or bool(tensors) != bool(metadata["read"])
        or turns
        and not turns[0].whole
    ):
        raise _damaged(
            path, f"{len(tensors)} tensors of a state after {metadata['read']} of {len(turns)} turns"
        )
    template = load_template(_record(path, metadata["template"]), tokenizer.decode(tokenizer.eod))

    conversation.system, conversation.template, conversation.generator = (
        metadata["system"],
        template,
        generator,
    )
    conversation.reset()
    conversation.turns = turns
    if state is None or not adapters.is_recorded(metadata["weights"]):
        return False
    like = torch.float32 if isinstance(conversation.model, Decoder) else model.dtype
    conversation.state = [
        LayerState(layer.att_x.to(like), layer.wkv, layer.ffn_x.to(like)) for layer in state
    ]
    conversation.read = metadata["read"]
    return True


def _format(path) -> str | None:
    try:
        return (read_metadata(path) or {}).get("format")
    except UserError:
        return None


def _damaged(path, why: str) -> UserError:
    return UserError(f"{path} is damaged: {why}; save the chat again")


def _read_metadata(path) -> dict[str, Any]:
    metadata = read_metadata(path)
    if metadata is None or metadata.get("format") != CHAT_FORMAT:
        raise UserError(f"{path} is no saved chat: it was not written by /save")
    if metadata.get("format_version") != 1:
        raise UserError(
            f"{path} has version {metadata.get('format_version')} of the format, expected 1; it is of a newer"
            " release"
        )
    for name, kind in KINDS.items():
        if not isinstance(metadata.get(name), kind) or isinstance(metadata[name], bool):
            raise _damaged(path, f"{name} is {str(metadata.get(name))[:60]!r}")
    check_sums(path)
    return metadata


def _turn(path, turn: Any) -> Turn:
    if not (
        isinstance(turn, dict)
        and turn.keys() == {*Turn._fields}
        and type(turn["whole"]) is bool
        and isinstance(turn["pieces"], list)
        and all(isinstance(piece, str) for piece in turn["pieces"])
        and isinstance(turn["messages"], list)
        and all(_is_message(message) for message in turn["messages"])
    ):
        raise _damaged(path, f"a turn is {str(turn)[:60]!r}")
    return Turn(**turn)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and all(isinstance(text, str) for text in message.values())
    )


def _generator(path, state: Tensor | None) -> torch.Generator:
    generator = torch.Generator()
    try:
        return generator.set_state(state.clone())
    except (AttributeError, TypeError, RuntimeError):
        raise _damaged(path, "the state of its random numbers is none") from None


def _state(path, tensors: dict[str, Tensor], adapters: Adapters) -> State:
    """The state of a file's tensors, on the model's device."""
    arch, device = adapters.model.arch, adapters.model.emb.weight.device
    shapes = LayerState((1, arch.n_embd), (1, arch.n_head, arch.head_size, arch.head_size), (1, arch.n_embd))
    wanted = {
        f"blocks.{i}.{name}": shape
        for i in range(arch.n_layer)
        for name, shape in zip(LayerState._fields, shapes, strict=True)
    }
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted or not all(tensor.is_floating_point() for tensor in tensors.values()):
        wrong = next(
            (name for name in {**wanted, **found} if found.get(name) != wanted.get(name)),
            "a tensor that is no number",
        )
        raise _damaged(
            path, f"{wrong} is {found.get(wrong)}, expected {wanted.get(wrong)} for {arch.describe()}"
        )
    check_finite(tensors)
    return [
        LayerState(*(tensors[f"blocks.{i}.{name}"].clone().to(device) for name in LayerState._fields))
        for i in range(arch.n_layer)
    ]


def _record(path, record: str) -> str:
    """A template as checkpoints record it; any other text would be taken for the name of a file."""
    if record not in MODES and "{" not in record:
        raise _damaged(path, f"its template is {record[:60]!r}")
    return record
