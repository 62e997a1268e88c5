"""Flags of a chat."""

from __future__ import annotations

from rwkv_miss.errors import UserError
from rwkv_miss.files.hub_names import is_hub_name
from rwkv_miss.files.model_files import model_metadata
from rwkv_miss.flags import flag, flags_of, given, options

from ..data.templates import choose_template
from ..inference.flags import MAX_TOKENS_HELP, SEEDS, DeviceFlags, FileFlags, TextFlags, with_names
from ..inference.load import refuse_folders
from ..inference.sampling import Sampling
from .commands import check_typed


@options
class ConversationFlags:
    """Several answers, and a saved conversation."""

    compare: bool = flag(
        False, "answer --prompt with the base and with the adapter, side by side; in a chat: /compare TEXT"
    )
    load_state: str | None = flag(None, "go on with a conversation that /save wrote", metavar="FILE")


@options
class PromptFlags:
    """One prompt, tools, and how answers are drawn."""

    prompt: str | None = flag(None, "answer this one prompt on stdout and exit; without it: a chat")
    raw: bool = flag(False, "take the prompt as it is, without the chat template")
    tools: str | None = flag(
        None, "JSON file with the tools that the model may call, as in OpenAI's API", metavar="FILE"
    )
    max_tokens: int = flag(512, MAX_TOKENS_HELP, low=1)
    sampling: Sampling = flags_of(Sampling)
    seed: int = flag(0, "seed of the random numbers; default %(default)s", **SEEDS)


@options
class Flags(DeviceFlags, PromptFlags, TextFlags, ConversationFlags, FileFlags):
    """Flags of a chat."""


def check(args: Flags) -> Flags:
    """Read the names of the adapters. Raise UserError for values and pairs of flags that make no sense."""
    args = with_names(args)
    args.sampling.check()
    if args.prompt == "":
        raise UserError("--prompt is empty")
    if args.raw and not args.prompt:
        raise UserError("--raw needs --prompt")
    for name, _ in given(args, ("scale", "compare")):
        if not args.adapter:
            raise UserError(
                f"--{name} is about an --adapter that is not merged; give --model and --adapter, as a merged"
                " file has the adapter in its weights"
            )
    if args.compare and (args.raw or not args.prompt):
        raise UserError("--compare needs --prompt, without --raw; in a chat type /compare TEXT")
    if args.load_state and args.raw:
        raise UserError("--load_state goes on with a conversation, --raw has none; drop one of the two")
    if args.tools and (args.raw or args.load_state):
        other = "--raw has no conversation" if args.raw else "a saved chat has its own; /tools begins anew"
        raise UserError(f"--tools are described at the beginning of a conversation: {other}")
    for text in (args.prompt, args.system):
        check_typed(text or "")
    return args


def check_local(args: Flags) -> None:
    """Raise UserError for files on this machine that can't be read, before anything is downloaded."""
    choose_template(args.template, args.tool_style, None, None)
    refuse_folders(args.adapters)
    for path in filter(None, (args.model, *args.adapters.values(), args.load_state)):
        if not is_hub_name(path):
            model_metadata(path)
