"""Input of a chat: words for the model, and commands, which begin with a slash."""

from __future__ import annotations

import dataclasses
import difflib
import math
import shutil
import sys
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from rwkv_miss.errors import UserError
from rwkv_miss.files.mapped import ChangedFile

from ..common.formatting import counted
from ..data.chat_template import Template
from ..data.released import modes_note, released
from ..data.rwkv_template import MODES, RwkvTemplate
from ..data.tool_styles import read_function, read_tools
from ..evaluation.guessing import ENOUGH, doubt_of_text
from ..inference.adapters import Adapters
from ..inference.conversation import Conversation
from ..inference.flags import NO_ADAPTER
from ..inference.sampling import recommended
from .columns import side_by_side
from .conversation_file import load_chat, save_chat

LEAVING = ("exit", "quit")  # also without a slash, as in many other programs
MODE_NAMES = {
    "off": "rwkv",
    "think": "think",
    "normal": "think-normal",
    "short": "think-short",
    "long": "think-long",
    "chinese": "think-chinese",
    "fake": "fake-think",
    "compact": "fake-think-compact",
    "flower": "flower",
}


class Command(NamedTuple):
    run: Callable[[Chat, str], None]
    arguments: str
    help: str


COMMANDS: dict[str, Command] = {}


def command(name: str, arguments: str = ""):
    """Return a decorator that makes a method of Chat a command; its docstring is the help."""

    def add(method):
        COMMANDS[name] = Command(method, arguments, " ".join(method.__doc__.split()))
        return method

    return add


class Chat:
    """Conversation, the adapters that it may use, and the commands. Answers go to stdout, the rest to stderr.

    `template_of(paths)` is the template with these adapter files in use, `bos_of(paths)` the ids that a
    conversation then begins with. `chosen`, if not None, is a template that was chosen in the chat, and
    stays.
    """

    def __init__(
        self,
        conversation: Conversation,
        adapters: Adapters,
        template_of: Callable[[list], Template],
        max_tokens: int,
        seed: int,
        bos_of: Callable[[list], tuple[int, ...]],
    ):
        self.conversation, self.adapters, self.template_of = conversation, adapters, template_of
        self.chosen: Template | None = None
        self.max_tokens, self.seed, self.bos_of = max_tokens, seed, bos_of
        self.scale = adapters.scale  # the next adapter gets it, too
        self.over = False
        self.results: list[dict] = []  # results for the last answer's calls, so far
        self.tokenizer_judged = False  # a text was long enough to tell whether the tokenizer is the model's

    def converse(self) -> None:
        """Take lines from stdin until it ends, /exit, or Ctrl-C at the prompt. Ctrl-C in an answer ends
        that.
        """
        while not self.over:
            try:
                line = input("User: " if sys.stdin.isatty() else "")
            except (EOFError, KeyboardInterrupt):
                print()
                return
            turns = len(self.conversation.turns)
            try:
                self.take(line)
            except ChangedFile:
                raise
            except UserError as error:
                note(f"error: {error}")
            except KeyboardInterrupt:
                print()
                stays = len(self.conversation.turns) > turns
                note("stopped" + ("; what was said stays in the conversation, until /undo" if stays else ""))

    def take(self, line: str) -> None:
        """Take one line: nothing, a command, or the user's words. // or a space before a slash makes words
        of a command."""
        check_typed(line)
        if line.startswith("/") and not line.startswith("//"):
            name, _, argument = line[1:].partition(" ")
            return find(name).run(self, argument.strip())
        if line.rstrip() in LEAVING:
            return self.leave("")
        text = line.strip()
        text = text[1:] if line.startswith("//") else text
        if text:
            self.answer([*self.results, {"role": "user", "content": text}])

    def answer(self, new: list[dict]) -> None:
        """Print the model's answer to these messages as it is made, and the tools that it calls."""
        print(f"Assistant:{self.conversation.template.opening}", end="", flush=True)
        before = len(self.conversation.turns)
        try:
            show(self.conversation.answer(new, self.max_tokens))
        finally:  # an answer that Ctrl-C stopped may stay, with its question
            if len(self.conversation.turns) > before:
                self.results = []
        note_calls(self.conversation.calls)
        if not self.tokenizer_judged:
            self.judge_tokenizer(new[-1]["content"])

    def judge_tokenizer(self, text: str) -> None:
        """Warn if the model predicts the user's words worse than a guess."""
        ids = self.conversation.tokenizer.encode(text)
        self.tokenizer_judged = len(ids) >= ENOUGH
        if doubt := doubt_of_text(self.adapters.model, self.conversation.tokenizer, ids):
            note(doubt)

    def use(self, names: tuple[str, ...], scale: float) -> None:
        """Choose adapters, and forget the state that other weights computed."""
        before = self.adapters.used, self.adapters.scale
        try:
            self.adapters.use(names, scale)
        finally:  # Ctrl-C may have stopped the change and left no adapter in use
            if (self.adapters.used, self.adapters.scale) != before:
                self.conversation.read_again()
                self.conversation.engine.refresh()

    def switch(self, names: tuple[str, ...], scale: float) -> None:
        if (names, scale) != (self.adapters.used, self.adapters.scale):
            self.use(names, scale)
            self.conversation.template = self.chosen or self.template_of(self.paths())
            self.conversation.bos = self.bos_of(self.paths())
        again = self.conversation.turns and not self.conversation.read
        rest = f"; {self.turns()} so far: read again with these weights before the next answer"
        note(self.in_use() + (rest if again else ""))

    def turns(self) -> str:
        return counted(len(self.conversation.turns), "turn")

    def paths(self) -> list:
        """Return the files in use."""
        return [self.adapters.by_name[name].path for name in self.adapters.used]

    def in_use(self) -> str:
        if not self.adapters.used:
            return "no adapter: the base answers"
        return f"adapter {'+'.join(self.adapters.used)}, scale {self.adapters.scale:g}"

    @command("adapter", "[NAME|NAME+NAME|none]")
    def choose_adapter(self, argument: str) -> None:
        """answer with this adapter, with the sum of several, or with the base alone; without a name: list
        them
        """
        if argument:
            names = () if argument == NO_ADAPTER else tuple(name.strip() for name in argument.split("+"))
            if len({*names}) < len(names):
                raise UserError(f"/adapter {argument} names an adapter twice; /scale makes one stronger")
            return self.switch(names, self.scale if names else 1.0)
        for name, adapter in self.adapters.by_name.items():
            rank = adapter.metadata["options"].get("rank")
            used = "*" if name in self.adapters.used else " "
            note(f"{used} {name}: {adapter.path}, {adapter.metadata['method']}{f' r={rank}' if rank else ''}")
        note(self.in_use() if self.adapters.by_name else "no --adapter was given")

    @command("scale", "[NUMBER]")
    def choose_scale(self, argument: str) -> None:
        """multiply the change of the adapter by this; 1: as it was trained"""
        if argument:
            self.scale = valid_number("scale", argument)
            if self.adapters.used:
                return self.switch(self.adapters.used, self.scale)
        note(f"scale {self.scale:g}" + ("" if self.adapters.used else ", once an adapter is in use"))

    @command("reset")
    def begin_anew(self, argument: str) -> None:
        """begin a new conversation"""
        self.conversation.reset()
        self.results = []
        note("a new conversation")

    @command("undo")
    def take_back(self, argument: str) -> None:
        """take back the last question and its answer"""
        self.conversation.undo()
        self.results = []
        note(f"taken back; {self.turns()} left")

    @command("retry")
    def answer_again(self, argument: str) -> None:
        """another answer in the place of the last one"""
        conversation = self.conversation
        before = conversation.turns[:], conversation.state, conversation.read, conversation.earlier
        conversation.undo()
        if not conversation.sampling.temperature:
            note("temperature 0 draws the same answer again; /temperature 1 draws others")
        try:
            self.answer(before[0][-1].messages[:-1])
        finally:
            if len(conversation.turns) < len(before[0]):  # stopped before its first word
                conversation.turns, conversation.state, conversation.read, conversation.earlier = before

    @command("temperature", "[NUMBER]")
    def choose_temperature(self, argument: str) -> None:
        """how freely the next answers are drawn; 0: always the likeliest token"""
        self.choose_sampling("temperature", argument)

    @command("top_p", "[NUMBER]")
    def choose_top_p(self, argument: str) -> None:
        """draw among the likeliest tokens whose probabilities add up to this; 1: among all"""
        self.choose_sampling("top_p", argument)

    def choose_sampling(self, name: str, argument: str) -> None:
        if argument:
            sampling = dataclasses.replace(self.conversation.sampling, **{name: valid_number(name, argument)})
            sampling.check()
            self.conversation.sampling = sampling
        note(f"{name} {getattr(self.conversation.sampling, name):g}")

    @command("save", "FILE")
    def save_to(self, argument: str) -> None:
        """write the conversation and its state to a file"""
        save_chat(self.conversation, self.adapters, needed("save", argument))
        note(f"{self.turns()} saved in {argument}")

    @command("load", "FILE")
    def load_from(self, argument: str) -> None:
        """go on with a saved conversation"""
        used = load_chat(self.conversation, self.adapters, needed("load", argument))
        self.results = []
        self.chosen, bos = self.conversation.template, self.conversation.bos
        self.bos_of = lambda paths: bos
        again = ", saved with other adapters or another scale: read again before the next answer"
        note(f"{self.turns()} of {argument}" + (again if self.conversation.turns and not used else ""))

    @command("think", "[MODE]")
    def choose_mode(self, argument: str) -> None:
        """ask for answers with or without thoughts: off, think, normal, short, long, chinese, fake, compact,
        flower, or a name of --template
        """
        self.ask_in_mode("think", argument)
        note(f"template {self.conversation.template.name}")

    @command("mode", "[MODE]")
    def choose_mode_and_sampling(self, argument: str) -> None:
        """as /think MODE, and draw answers as the releases of the G1 models recommend for that mode"""
        self.ask_in_mode("mode", argument)
        if argument:
            best = recommended(self.conversation.template.opening)
            self.conversation.sampling = best or self.conversation.sampling
            origin = "as recommended" if best else "as before: nothing is recommended for this mode"
        else:
            origin = "as it is; /mode MODE sets both"
        note(f"template {self.conversation.template.name}; {self.conversation.sampling} ({origin})")

    def ask_in_mode(self, command_name: str, mode: str) -> None:
        """Choose a mode of RWKV's template, if one is given. Raises UserError for another template."""
        template = self.conversation.template
        if not isinstance(template, RwkvTemplate):
            raise UserError(f"/{command_name} is about RWKV's template; this chat has {template.name}")
        if mode:
            self.chosen = RwkvTemplate(named_mode(command_name, mode), template.tools.name)
            self.conversation.template = self.chosen
            base = self.adapters.model.base_name
            if (model := released(base or "")) and self.chosen.name not in model.modes:
                note(f"note: {modes_note(base, self.chosen)}")

    @command("tools", "[FILE|none]")
    def choose_tools(self, argument: str) -> None:
        """begin a new conversation with the tools of a JSON file, or with none; without a file: list them"""
        if argument:
            self.conversation.use_tools([] if argument == "none" else read_tools(argument))
            self.results = []
        tools = self.conversation.tools
        for tool in tools:
            function = read_function(tool)
            note(f"  {function['name']}: {function.get('description') or 'no description'}")
        note(f"{counted(len(tools), 'tool')}{', a new conversation' if argument else ''}")

    @command("result", "TEXT")
    def give_result(self, argument: str) -> None:
        """give the model the result of a call; after the last result it goes on"""
        calls = self.conversation.calls
        if not calls:
            raise UserError(
                "/result gives the model the result of a call, and the last answer has no call at its end"
            )
        results = [*self.results, {"role": "tool", "content": needed("result", argument)}]
        if len(results) == len(calls):
            self.answer(results)  # if it fails, the last result is still to be given
        else:
            self.results = results
            note_calls(calls, len(results))

    @command("compare", "TEXT")
    def compare_answers(self, argument: str) -> None:
        """the base's answer and the adapter's to the same words, side by side; the conversation stays as it
        is
        """
        print(self.compared(needed("compare", argument)))

    @command("help")
    def list_commands(self, argument: str) -> None:
        """this list"""
        width = max(len(name) + len(entry.arguments) for name, entry in COMMANDS.items()) + 2
        for name, entry in COMMANDS.items():
            note(f"/{name + ' ' + entry.arguments:<{width}} {entry.help}")
        note(
            "Words that begin with a slash: type a space or another slash before them. "
            "Ctrl-C stops an answer. Ctrl-D ends the chat."
        )

    @command("quit")
    @command("exit")
    def leave(self, argument: str) -> None:
        """end the chat; so do exit, quit, /quit and Ctrl-D"""
        self.over = True

    def compared(self, text: str) -> str:
        """Write two columns: the answers of the base and of the adapter in use, with the same random
        numbers. Raises UserError without an adapter."""
        names, scale, conversation = self.adapters.used, self.adapters.scale, self.conversation
        if not names:
            loaded = ", ".join(self.adapters.by_name)
            advice = (
                f"/adapter NAME, of {loaded}"
                if loaded
                else "start with --model BASE --adapter ADAPTER; a merged file has the adapter in its weights"
            )
            raise UserError(f"no adapter is in use, so there is nothing to compare the base with; {advice}")
        before = conversation.state, conversation.read, conversation.earlier
        answers = []
        try:
            for weights in (names, ()):  # the base has no state yet, and reads the conversation first
                if weights != names:
                    self.use(weights, 1.0)
                twin = conversation.twin(self.seed)
                answers.append(
                    twin.template.opening.lstrip() + "".join(twin.answer(text, self.max_tokens)).lstrip(" ")
                )
        finally:
            self.use(names, scale)
            conversation.state, conversation.read, conversation.earlier = before
        return side_by_side(
            ("base", answers[1]),
            (f"{'+'.join(names)}, scale {scale:g}", answers[0]),
            shutil.get_terminal_size().columns,
        )


def find(name: str) -> Command:
    """Find the command of that name. Raises UserError with all of them, and one that is near."""
    if name in COMMANDS:
        return COMMANDS[name]
    near = difflib.get_close_matches(name, COMMANDS, 1)
    guess = f", did you mean /{near[0]}?" if near else "."
    raise UserError(
        f"there is no command /{name}{guess} There are /{', /'.join(COMMANDS)}. "
        "To say it to the model, type a space or another slash before it."
    )


def named_mode(command_name: str, name: str) -> str:
    """Return the mode of RWKV's template, by its own or its short name. Raises UserError for any other."""
    mode = MODE_NAMES.get(name, name)
    if mode not in MODES:
        names = ", ".join(dict.fromkeys([*MODE_NAMES, *MODES]))
        raise UserError(f"/{command_name} {name}: expected one of {names}")
    return mode


def needed(name: str, argument: str) -> str:
    if not argument:
        raise UserError(f"/{name} needs {COMMANDS[name].arguments}: {COMMANDS[name].help}")
    return argument


def note_calls(calls: list[dict], done: int = 0) -> None:
    """Print the calls of an answer that have no result yet; `done` have one."""
    for number, call in enumerate(calls[done:], done + 1):
        function = call["function"]
        note(f"call {number} of {len(calls)}: {function['name']} {function['arguments']}")
    if calls:
        note(f"/result TEXT is what call {done + 1} gave")


def note(text: str) -> None:
    print(text, file=sys.stderr)


def show(pieces: Generator[str, None, Any]) -> None:
    """Print an answer as it is made. If it is stopped, the conversation keeps the text so far."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    finally:
        pieces.close()


def check_typed(text: str) -> None:
    """Raise UserError for text from a shell or a terminal in another encoding than Python expects."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"what was typed is no {sys.stdin.encoding} text; if it is UTF-8, set PYTHONUTF8=1"
        ) from None


def valid_number(name: str, text: str) -> float:
    """Convert to a finite number, or raise UserError."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} {text!r}: expected a number such as 0.7")
    return number
