"""Conversation file, from which a chat goes on as if it had not stopped.

It holds the turns, the state after them, and the random numbers to come. The file is a checkpoint. Its
tensors are the parts of the state (model.LayerState), blocks.i.att_x, blocks.i.wkv and blocks.i.ffn_x, and
`generator`. All else is metadata.

A state belongs to the weights that computed it: to a base with certain adapters at a certain scale. With
other adapters the turns are read again. With another base the file is refused.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import check_finite, read_checkpoint, read_metadata, write_checkpoint
from rwkv_miss.files.untrusted import check_sums

from ..data import templates
from ..data.bos import recorded_bos
from ..data.chat_template import Template
from ..data.tokenizer import Tokenizer
from ..data.tool_styles import read_function
from ..inference.adapters import Adapters
from ..inference.conversation import Conversation, Turn
from ..model import LayerState, State

CHAT_FORMAT = "rwkv-miss chat"
# fields of the metadata in addition to format, format_version and bos; older files lack some
KINDS = {
    "base": str,
    "base_fingerprint": str,
    "weights": dict,
    "tokenizer": str,
    "template": str,
    "bos": list,
    "system": str,
    "turns": list,
    "read": int,
    "tools": list,
}


def save_chat(conversation: Conversation, adapters: Adapters, path) -> None:
    """Write the conversation, whole or not at all.

    Raises UserError where the file can't be written, or is there already and is no saved chat.
    """
    if os.path.exists(path) and (not os.path.isfile(path) or _format(path) != CHAT_FORMAT):
        raise UserError(f"{path} is there already and is no saved chat; choose another name")
    model = adapters.model
    tensors = {"generator": conversation.generator.get_state()}
    for layer, parts in enumerate(conversation.state or ()):
        for name, part in parts._asdict().items():
            tensors[f"blocks.{layer}.{name}"] = part
    metadata = {
        "format": CHAT_FORMAT,
        "format_version": 1,
        "base": model.base_name,
        "base_fingerprint": model.base_fingerprint,
        "weights": adapters.identity(),
        "tokenizer": os.path.basename(conversation.tokenizer.name),
        "template": conversation.template.record,
        "bos": list(conversation.bos),
        "system": conversation.system,
        "turns": [turn._asdict() for turn in conversation.turns],
        "read": conversation.read,
        "tools": conversation.tools,
    }
    write_checkpoint(path, tensors.items(), metadata)


def load_chat(conversation: Conversation, adapters: Adapters, path) -> bool:
    """Replace this conversation by a saved one; returns whether its state is used. Else its turns are read.

    Raises UserError for a file that is damaged, no saved chat, or of another base, tokenizer or size. Then
    the conversation stays as it was.
    """
    metadata = _read_metadata(path)
    model, tokenizer = adapters.model, conversation.tokenizer
    if model.base_fingerprint != metadata["base_fingerprint"]:
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
    read = metadata["read"]
    begins = not turns or turns[0].whole
    if not (0 <= read <= len(turns) and bool(tensors) == bool(read) and begins):
        raise _damaged(path, f"{len(tensors)} tensors of a state after {read} of {len(turns)} turns")
    template = _template(path, metadata["template"], tokenizer)
    bos = recorded_bos(path, metadata, tokenizer)

    conversation.system = metadata["system"]
    conversation.template, conversation.bos = template, bos
    conversation.generator = generator
    conversation.tools = metadata["tools"]
    conversation.reset()
    conversation.turns = turns
    if state is None or metadata["weights"] != adapters.identity():
        return False
    conversation.state, conversation.read = state, read
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
    try:
        [read_function(tool) for tool in metadata["tools"]]
    except UserError as error:
        raise _damaged(path, str(error)) from None
    check_sums(path)
    return metadata


def _turn(path, turn: Any) -> Turn:
    if not _is_turn(turn):
        raise _damaged(path, f"a turn is {str(turn)[:60]!r}")
    return Turn(**turn)


def _is_turn(turn: Any) -> bool:
    if not isinstance(turn, dict) or turn.keys() != {*Turn._fields}:
        return False
    messages, pieces, whole = turn["messages"], turn["pieces"], turn["whole"]
    if type(whole) is not bool or not isinstance(pieces, list) or not isinstance(messages, list):
        return False
    return all(isinstance(piece, str) for piece in pieces) and all(map(_is_message, messages))


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or message.keys() - {"tool_calls"} != {"role", "content"}:
        return False
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        return False
    return isinstance(message["role"], str) and isinstance(message["content"], str)


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or function.keys() != {"name", "arguments"}:
        return False
    return all(isinstance(text, str) for text in function.values())


def _generator(path, state: Tensor | None) -> torch.Generator:
    generator = torch.Generator()
    try:
        return generator.set_state(state.clone())
    except (AttributeError, TypeError, RuntimeError):
        raise _damaged(path, "the state of its random numbers is none") from None


def _state(path, tensors: dict[str, Tensor], adapters: Adapters) -> State:
    """Build the state from a file's tensors, on the model's device."""
    arch, device = adapters.model.arch, adapters.model.emb.weight.device
    layer = LayerState((1, arch.n_embd), (1, arch.n_head, arch.head_size, arch.head_size), (1, arch.n_embd))
    layers = range(arch.n_layer)
    expected = {f"blocks.{i}.{name}": shape for i in layers for name, shape in layer._asdict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected or not all(tensor.is_floating_point() for tensor in tensors.values()):
        different = (name for name in {**expected, **shapes} if shapes.get(name) != expected.get(name))
        wrong = next(different, "a tensor that is no number")
        raise _damaged(
            path, f"{wrong} is {shapes.get(wrong)}, expected {expected.get(wrong)} for {arch.describe()}"
        )
    check_finite(tensors)
    copies = {name: tensor.clone().to(device) for name, tensor in tensors.items()}
    return [LayerState(*(copies[f"blocks.{i}.{name}"] for name in LayerState._fields)) for i in layers]


def _template(path, record: str, tokenizer: Tokenizer) -> Template:
    try:
        return templates.from_record(record, tokenizer.decode(tokenizer.eod))
    except UserError as error:
        raise _damaged(path, f"its template is {record[:60]!r} ({error})") from None
