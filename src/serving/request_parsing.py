"""Parsing of a request's fields into the engine's terms, with checks."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from rwkv_miss.errors import UserError

from ..common.formatting import counted, short, shown
from ..data.bos import with_bos
from ..data.chat_template import Template
from ..data.rwkv_template import RwkvTemplate
from ..inference.adapters import Applied
from ..inference.constraint import GrammarCompiler
from ..inference.engine import Request
from ..inference.logit_changes import LogitChanges
from ..inference.sampling import Sampling, recommended
from .errors import Refused, wrong
from .fields import LARGEST_SEED, Fields
from .forms import answer_form, read_form, text_form
from .limits import Limits
from .messages import read_messages, without_thoughts
from .states import States
from .think_modes import read_mode
from .tools import Tools, read_tools

MOST_LOGPROBS = 20
MOST_PROMPT_LOGPROBS = 1 << 16  # written as JSON within a second, while the others wait
MOST_STOPS, LONGEST_STOP = 20, 500
# A text with more characters for each token that a prompt may have is mostly too long. Its tokens are counted
# in its beginning first; the last LONGEST of these may differ from the whole text's.
CHARACTERS, LONGEST = 8, 128
# rwkv_lightning's names of sampling fields
OTHER_NAMES = {
    "presence_penalty": "alpha_presence",
    "frequency_penalty": "alpha_frequency",
    "penalty_decay": "alpha_decay",
}
BEGINS = "a new answer begins after the last message"
# fields that change an answer elsewhere -> (a value that changes nothing, why no other one can be had)
UNREAD: dict[str, tuple[Any, str]] = {
    "modalities": (["text"], "this model writes text only"),
    "continue_final_message": (False, BEGINS),
    "add_generation_prompt": (True, BEGINS),
    "echo": (False, "/v1/completions puts a prompt before an answer, and a chat does not"),
    "suffix": ("", "this model writes on, and fills no gap"),
    "best_of": (1, "the client chooses the best of n answers"),
}


class Chosen(NamedTuple):
    """Model that a request names: base, or base with adapters."""

    id: str
    applied: Applied
    template: Template
    bos: tuple[int, ...]
    fingerprint: str  # a digest of the contents of base and adapters


@dataclasses.dataclass(frozen=True)
class Defaults:
    """Defaults for fields that a request leaves out."""

    max_tokens: int = 1024
    system: str = ""
    sampling: dict[str, float] = dataclasses.field(default_factory=dict)  # fields of Sampling
    seed: int | None = None  # None: a new one for every request

    def sampling_of(self, opening: str) -> Sampling:
        """Choose the sampling for answers with this opening: the operator's, else the recommended one."""
        return dataclasses.replace(recommended(opening) or Sampling(), **self.sampling)


@dataclasses.dataclass(frozen=True)
class RequestReader:
    """Reader of requests to one server. `find(fields)` returns the model that one names.

    `states` are those that requests may go on from.
    """

    tokenizer: Any
    find: Callable[[Fields], Chosen]
    limits: Limits
    defaults: Defaults
    states: States

    @functools.cached_property
    def _compiler(self) -> GrammarCompiler:
        return GrammarCompiler(self.tokenizer)

    def compiler(self) -> GrammarCompiler:
        """Return the compiler of forms, made on first use. Raises UserError if there can be none."""
        return self._compiler


@dataclasses.dataclass(frozen=True)
class ParsedRequest:
    """Request that may be answered."""

    chosen: Chosen
    requests: list[Request]
    stream: bool
    usage: bool  # whether a stream ends with the usage
    ignored: list[str]  # fields that nobody has read
    state_tokens: int = dataclasses.field(default=0, kw_only=True)  # tokens of the state before each prompt

    @property
    def model(self) -> str:
        return self.chosen.id


@dataclasses.dataclass(frozen=True)
class ParsedChat(ParsedRequest):
    template: Template
    tools: Tools
    stops: list[str]  # the client's own


class Prompt(NamedTuple):
    """Prompt of a completion."""

    text: str
    tokens: list[int]
    begin: int  # tokens before the text's own: the BOS


@dataclasses.dataclass(frozen=True)
class ParsedCompletion(ParsedRequest):
    prompts: list[Prompt]
    echo: bool  # whether answers begin with their prompt
    prompt_logprobs: int | None  # the field that the client sent; an echo needs the prompt's without it


def read_chat(reader: RequestReader, body: dict[str, Any]) -> ParsedChat:
    """Read a request to /v1/chat/completions. Raises Refused."""
    fields = Fields(body)
    chosen = reader.find(fields)
    state = reader.states.find(fields, chosen.fingerprint)
    template = read_mode(fields, chosen.template)
    tools = read_tools(fields)
    messages = read_messages(fields)
    _refuse_changes(fields)
    form = answer_form(reader.compiler, template, tools, read_form(fields, reader.compiler))
    tokens = chat_tokens(reader, chosen, template, tools, [*state.messages, *messages])
    wants_logprobs = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, MOST_LOGPROBS)
    if top is not None and not wants_logprobs:
        raise wrong("top_logprobs", "needs logprobs: true")
    request = _request(
        reader,
        fields,
        template.opening,
        template.stops,
        tokens=state.rest(tokens),
        start=state.state,
        applied=chosen.applied,
        logprobs=(top or 0) if wants_logprobs else None,
        prompt_logprobs=fields.integer("prompt_logprobs", 0, MOST_LOGPROBS),
        form=form,
    )
    # an answer that must be reproducible reads its whole prompt, in chunks
    seeded = fields.take("seed") is not None or reader.defaults.seed is not None
    if not request.sampling.greedy and not seeded:
        request = dataclasses.replace(request, continues=True)
    stream, usage = _streaming(fields)
    counts = [] if request.prompt_logprobs is None else [request.prompt_logprobs]
    _check_prompt_logprobs([request], counts, stream and bool(counts))
    ignored, read = fields.ignored(), len(state.tokens)
    stops = _stops(fields)
    return ParsedChat(chosen, [request], stream, usage, ignored, template, tools, stops, state_tokens=read)


def read_completion(reader: RequestReader, body: dict[str, Any]) -> ParsedCompletion:
    """Read a request to /v1/completions. Raises Refused."""
    fields = Fields(body)
    chosen = reader.find(fields)
    state = reader.states.find(fields, chosen.fingerprint)
    prompts = _prompts(reader, fields, () if state.tokens else chosen.bos)
    logprobs = fields.integer("logprobs", 0, MOST_LOGPROBS)
    echo = fields.flag("echo")
    prompt_logprobs = fields.integer("prompt_logprobs", 0, MOST_LOGPROBS)
    counts = [count for count in (logprobs if echo else None, prompt_logprobs) if count is not None]
    _refuse_changes(fields)
    form = text_form(reader.compiler, read_form(fields, reader.compiler))
    shared = {"applied": chosen.applied, "logprobs": logprobs, "prompts": len(prompts), "form": form}
    shared |= {"prompt_logprobs": max(counts, default=None), "start": state.state}
    requests = [_request(reader, fields, "", (), tokens=prompt.tokens, **shared) for prompt in prompts]
    stream, usage = _streaming(fields)
    each = counts * requests[0].n  # an answer has its prompt's
    _check_prompt_logprobs(requests, each, stream and prompt_logprobs is not None)
    ignored, read = fields.ignored(), len(state.tokens)
    return ParsedCompletion(
        chosen, requests, stream, usage, ignored, prompts, echo, prompt_logprobs, state_tokens=read
    )


def chat_tokens(
    reader: RequestReader, chosen: Chosen, template: Template, tools: Tools, messages: list[dict]
) -> list[int]:
    """Encode a conversation as a prompt for its next message. Raises Refused."""
    if reader.defaults.system and all(message["role"] != "system" for message in messages):
        messages = [{"role": "system", "content": reader.defaults.system}, *messages]
    if isinstance(template, RwkvTemplate) and "</think" in template.opening:
        messages = without_thoughts(messages)
    try:
        pieces = [text for text, _ in template.segments(messages, tools.described or None, ask=True)]
        ids = encoded(reader, pieces, "messages")
    except (UserError, RecursionError) as error:  # the schema of a tool may be too deep
        raise wrong("messages", str(error)) from None
    return checked(reader, with_bos(ids, chosen.bos), "messages")


def encoded(reader: RequestReader, texts: list[str], param: str) -> list[int]:
    """Encode texts. Raises Refused before the rest is encoded: a huge one does not hold the others."""
    tokens: list[int] = []
    beginning = CHARACTERS * reader.limits.prompt_tokens
    for text in texts:
        if len(text) > beginning:
            # the beginning's tokens are the whole text's, up to the cut
            checked(reader, [*tokens, *reader.tokenizer.encode(text[:beginning])[:-LONGEST]], param)
        tokens += reader.tokenizer.encode(text)
        checked(reader, tokens, param)
    return tokens


def checked(reader: RequestReader, tokens: list[int], param: str) -> list[int]:
    if len(tokens) > reader.limits.prompt_tokens:
        raise Refused(
            400,
            f"{param}: at least {counted(len(tokens), 'token')}, and this server reads at most"
            f" {reader.limits.prompt_tokens:,}",
            param,
            "context_length_exceeded",
        )
    return tokens


def _prompts(reader: RequestReader, fields: Fields, bos: tuple[int, ...]) -> list[Prompt]:
    """Read the prompts. Ids are taken as they are."""
    value = fields.take("prompt")
    expected = "a text, a list of texts, ids, or a list of lists of ids"
    if value is None or value == []:
        if fields.take("messages") is not None:
            raise wrong("messages", "/v1/chat/completions answers them; this address continues a prompt")
        raise fields.refuse("prompt", value, f'{expected}; "" begins a new document')
    if value == "":
        value = [list(reader.tokenizer.eod)]  # as in OpenAI's API
    if isinstance(value, str) or isinstance(value, list) and all(map(is_id, value)):
        value = [value]
    if not isinstance(value, list):
        raise fields.refuse("prompt", value, expected)
    if len(value) > (most := reader.limits.answers):
        raise wrong("prompt", f"{len(value):,} prompts; this server gives {most} answers to a request")
    prompts = []
    for prompt in value:
        try:
            if isinstance(prompt, str):
                in_text = encoded(reader, [prompt], "prompt")
                text, ids = prompt, with_bos(in_text, bos)
            elif isinstance(prompt, list) and all(map(is_id, prompt)):
                ids = checked(reader, list(prompt), "prompt")  # before each id becomes a text
                text = reader.tokenizer.decode(ids)
                in_text = ids
            else:
                raise fields.refuse("prompt", value, expected)
        except UserError as error:
            raise wrong("prompt", str(error)) from None
        ids = checked(reader, ids or list(reader.tokenizer.eod), "prompt")
        prompts.append(Prompt(text, ids, len(ids) - len(in_text)))
    return prompts


def is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _request(
    reader: RequestReader, fields: Fields, opening: str, stops: tuple[str, ...], prompts: int = 1, **given
) -> Request:
    """Make the engine's request from the fields that both APIs have. `stops` end a template's turn."""
    limits = reader.limits
    changes = _changes(reader, fields)
    n = fields.integer("n", 1, limits.answers, 1)
    if n * prompts > limits.answers:
        raise wrong("n", f"{n} answers of {prompts} prompts; this server gives {limits.answers} to a request")
    short_name, long_name = (
        fields.integer(name, -1, LARGEST_SEED) for name in ("max_tokens", "max_completion_tokens")
    )
    if None not in (short_name, long_name) and short_name != long_name:
        raise wrong(
            "max_completion_tokens", f"got {long_name}, and max_tokens {short_name}; give one of them"
        )
    most = short_name if long_name is None else long_name
    if most is None:
        most = reader.defaults.max_tokens
    # clients for agents send 32,000 whatever the model, and some -1 for no limit of their own
    most = limits.answer_tokens if most == -1 else min(most, limits.answer_tokens)
    if changes.min_tokens > most:
        raise wrong("min_tokens", f"got {changes.min_tokens}, expected at most the limit of tokens, {most}")
    seed = fields.integer("seed", -LARGEST_SEED, LARGEST_SEED - 1, reader.defaults.seed)
    return Request(
        max_tokens=most,
        sampling=_sampling(fields, reader.defaults.sampling_of(opening)),
        seed=int.from_bytes(os.urandom(7), "little") if seed is None else seed,
        stops=(*(() if changes.ignore_eos else stops), *_stops(fields)),
        n=n,
        changes=changes,
        **given,
    )


def _sampling(fields: Fields, default: Sampling) -> Sampling:
    ranges = {
        "temperature": (0, 100),
        "top_p": (0, 1),
        "presence_penalty": (-100, 100),
        "frequency_penalty": (-100, 100),
        "penalty_decay": (0, 1),
    }
    values: dict[str, float] = {}
    for name, (low, high) in ranges.items():
        for spelling in filter(None, (OTHER_NAMES.get(name), name)):
            value = fields.number(spelling, low, high)
            if value is not None:
                values[name] = value
    if "top_p" in values:
        values["top_p"] = max(values["top_p"], 1e-6)  # 0 leaves the likeliest token, as 1e-6 does
    top_k = fields.integer("top_k", -1, 1 << 31)
    if top_k is not None:
        values["top_k"] = max(top_k, 0)  # -1 is all tokens elsewhere
    return dataclasses.replace(default, **values)


def _changes(reader: RequestReader, fields: Fields) -> LogitChanges:
    return LogitChanges(
        _bias(reader, fields),
        fields.integer("min_tokens", 0, reader.limits.answer_tokens, 0),
        fields.flag("ignore_eos"),
        fields.number("repetition_penalty", 0.01, 100, 1.0),
        fields.number("min_p", 0, 1, 0.0),
    )


def _check_prompt_logprobs(requests: list[Request], counts: list[int], in_stream: bool) -> None:
    """Check the log-probabilities of prompts: a reply has each prompt's once for each of `counts`."""
    if in_stream:
        raise wrong("prompt_logprobs", "is for a whole answer; leave out stream")
    tokens = sum(len(request.tokens) for request in requests)
    numbers = tokens * sum(count + 1 for count in counts)
    if numbers > MOST_PROMPT_LOGPROBS:
        raise wrong(
            "prompt_logprobs",
            f"{numbers:,} log-probabilities of prompts; this server gives {MOST_PROMPT_LOGPROBS:,} at most",
        )


def _bias(reader: RequestReader, fields: Fields) -> dict[int, float]:
    """Read logit_bias, whose names are the ids of tokens."""
    inner = fields.inner("logit_bias")
    bias = {}
    for name in inner.values if inner else ():
        if not re.fullmatch("[0-9]{1,9}", name) or int(name) not in reader.tokenizer.ids:
            largest = reader.tokenizer.vocab_size - 1
            raise wrong("logit_bias", f"{short(name)} is no token's id, such as one from 0 to {largest}")
        bias[int(name)] = inner.number(name, -100, 100, 0.0)
    return bias


def _stops(fields: Fields) -> list[str]:
    value = fields.take("stop")
    stops = [value] if isinstance(value, str) else ([] if value is None else value)
    fits = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not fits or not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops):
        raise fields.refuse(
            "stop", value, f"a text, or at most {MOST_STOPS} of them, each of 1 to {LONGEST_STOP} characters"
        )
    return stops


def _streaming(fields: Fields) -> tuple[bool, bool]:
    """Read (stream, whether it ends with the usage)."""
    stream = fields.flag("stream")
    options = fields.inner("stream_options")
    if options and not stream:
        raise wrong("stream_options", "needs stream: true")
    return stream, bool(options and options.flag("include_usage"))


def _refuse_changes(fields: Fields) -> None:
    """Raise Refused for a field that would change the answer elsewhere, and that nobody reads here."""
    for name, (plain, why) in UNREAD.items():
        if name not in fields.seen and (value := fields.take(name)) not in (None, plain):
            raise wrong(name, f"got {shown(value)}, and {why}; leave it out")
