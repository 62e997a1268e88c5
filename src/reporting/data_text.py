"""What the plan says of the data: what is trained on, how it lies in rows, and what is held out."""

from __future__ import annotations

from collections.abc import Iterator

from rwkv_miss.files.hub_names import recorded

from ..common.formatting import counted
from ..config import Config
from ..data.batches import Schedule
from ..data.encode import Encoder
from ..data.leading_token import describe_leading
from ..data.units import Units
from ..planning.job import Data
from ..planning.step import unit_of
from .preference_text import left_out, too_long_text


def documents_line(config: Config, found: Data) -> str:
    """The line of the plan about what is trained on."""
    documents = found.documents
    file = found.found.files.get(config.data_file)  # None where there are several
    described = f" ({file.describe()})" if file else ""
    several = "".join(f" ({text})" for text in rewritten(documents))
    encoder = found.encoder
    leading = f", {describe_leading(encoder.bos)}" if encoder.bos else ""
    trained = f", {documents.targets:,} of them trained{weighing(documents)}: {mask(config)}"
    if config.on_preferences:
        trained = f", {documents.targets:,} of them in answers"
    elif config.on_rewards:
        trained = " of prompts"
    line = (
        f"data       {recorded(config.data_file)}{described}: {counted(len(documents), unit_of(config))}"
        f"{several}, {counted(documents.tokens, 'token')}{trained} (template"
        f" {encoder.template.name}{leading}){left_out(config, found)}"
    )
    return line.encode("utf-8", "backslashreplace").decode()


def rows(config: Config, schedule: Schedule) -> str:
    """How documents lie in rows."""
    if config.on_rewards:
        return f"up to {counted(max(schedule.lengths), 'token')} for a question with its answers"
    if not config.packing:
        return f"rows of up to {counted(max(schedule.lengths), 'token')}, a {unit_of(config)} in each"
    return f"rows of {config.ctx_len} tokens, {fullness(config, schedule):.0%} full"


def fullness(config: Config, schedule: Schedule) -> float:
    """The share of the places in packed rows that have a token."""
    return sum(schedule.lengths) / (len(schedule.rows) * config.ctx_len)


def data(config: Config, documents: Units, schedule: Schedule) -> list[str]:
    """Lines of the plan about the data, with a warning where rows are cut or teach nothing."""
    count = counted(len(documents), unit_of(config))
    trained = " of prompts" if config.on_rewards else f", loss on {documents.targets:,}"
    lines = [f"data       {count}, {counted(documents.tokens, 'token')}{trained}"]
    if too_long := too_long_text(config, documents):
        lines.append(f"left out   {too_long}")
    if config.packing and not documents.alone:
        lines.append(
            f"packing    {counted(len(schedule.rows), 'row')} of {config.ctx_len} tokens, "
            f"{fullness(config, schedule):.1%} full; documents in a row do not see each other"
        )
    lines += [f"turns      {text}" for text in rewritten(documents)]
    if documents.split:
        lines.append(
            f"long texts {counted(documents.split, 'text')} of more than --ctx_len {config.ctx_len} tokens,"
            " cut into several documents, each of which begins with the last token of the one before"
        )
    return lines + [f"warning    {text}" for text in cut_warnings(config, documents)]


def held_out(config: Config, held_out: Units, evaluated: Units) -> list[str]:
    """Line of the details about the documents that are not trained on, if there are any."""
    if not held_out:
        return []
    cut = f", {held_out.cut:,} of them cut" if held_out.cut else ""
    unit = unit_of(config)
    source, taken = recorded(config.eval_file or config.data_file), counted(len(evaluated), unit)
    looked_at = f"the loss is on {counted(evaluated.targets, 'token')} of {taken}"
    if config.on_rewards:
        looked_at = f"{taken} of them {'is' if len(evaluated) == 1 else 'are'} answered"
    return [f"held out   {counted(len(held_out), unit)} of {source}{cut}; {looked_at}"]


def rewritten(documents: Units) -> list[str]:
    """How many conversations became several documents, if any did."""
    conversations, several = documents.rewritten
    if not conversations:
        return []
    counts = f"{counted(conversations, 'conversation')} became {counted(several, 'document')}"
    return [f"{counts}, because the template rewrites earlier turns"]


def cut_warnings(config: Config, documents: Units) -> Iterator[str]:
    """What --ctx_len takes away."""
    of_all = f"of {counted(len(documents), 'document')}"
    if documents.cut:
        lost = counted(documents.cut_tokens, "token")
        yield f"{documents.cut:,} {of_all} cut at --ctx_len {config.ctx_len}: {lost} lost"
    if documents.untrained:
        left_out = counted(documents.untrained, "document")
        yield f"{left_out} left out: nothing in the first {config.ctx_len} tokens is trained"


def weighing(documents: Units) -> str:
    """What the weights of the trained tokens add up to, where that is not their number."""
    if documents.weight == documents.targets:
        return ""
    return f" (with weights that add up to {documents.weight:,.1f}, by which a loss is divided)"


def mask(settings: Config | Encoder) -> str:
    """What is trained, in words."""
    names = {"assistant": "the assistant's turns and plain text", "all": "everything"}
    thoughts = f", thoughts times {settings.think_weight:g}" if settings.think_weight != 1 else ""
    prompts = f", prompts times {settings.prompt_weight:g}" if settings.prompt_weight else ""
    return names.get(settings.loss_mask, f"what follows {settings.loss_mask!r}") + thoughts + prompts


def trained_part(config: Config) -> str:
    """mask(), and of a preference or reward the answers."""
    if config.on_rewards:
        return "the answers that are drawn"
    return "the answers that are compared" if config.on_preferences else mask(config)
