"""Lines of the plan about the data: the documents, their rows, and the held-out ones."""

from __future__ import annotations

from collections.abc import Iterator

from rwkv_miss.files.hub_names import recorded

from ..common.formatting import counted
from ..config import Config
from ..data.batches import Schedule
from ..data.bos import describe_bos
from ..data.examples import Examples
from ..data.formats import places_text
from ..objectives.kinds import objective_of
from ..planning.job import Data


def documents_line(config: Config, found: Data) -> str:
    """Write the line of the plan about the documents."""
    documents = found.documents
    file = found.found.files.get(config.data_file)  # None for several files
    described = f" ({file.describe()})" if file else ""
    several = "".join(f" ({text})" for text in rewritten(documents))
    encoder = found.encoder
    bos = f", {describe_bos(encoder.bos)}" if encoder.bos else ""
    trained = objective_of(config).trained_text(documents)
    line = (
        f"data       {recorded(config.data_file)}{described}: {counted(len(documents), documents.word)}"
        f"{several}, {counted(documents.tokens, 'token')}{trained} (template"
        f" {encoder.template.name}{bos}){left_out(config, found)}"
    )
    return line.encode("utf-8", "backslashreplace").decode()


def rows(config: Config, schedule: Schedule) -> str:
    """Describe how documents lie in rows."""
    objective, longest = objective_of(config), counted(max(schedule.lengths), "token")
    if objective.one_row:
        return f"up to {longest} for a {objective.one_row}"
    if not config.packing:
        return f"rows of up to {longest}, a {objective.word} in each"
    full = sum(schedule.lengths) / (len(schedule.rows) * config.ctx_len)
    return f"rows of {config.ctx_len} tokens, {full:.0%} full"


def sources(config: Config, found: Data) -> list[str]:
    """Write the lines of the details about files and rows, without what documents_line() says of them."""
    said = (f"format     {config.data_file}: ", "left out   ")
    return [line for line in found.found.lines() if not line.startswith(said)]


def long_texts(config: Config, documents: Examples) -> list[str]:
    """Write the line of the details about texts that became several documents, if any did."""
    if not documents.split:
        return []
    return [
        f"long texts {counted(documents.split, 'text')} of more than --ctx_len {config.ctx_len} tokens, cut"
        " into several documents, each of which begins with the last token of the one before"
    ]


def held_out(config: Config, held_out: Examples, evaluated: Examples) -> list[str]:
    """Write the line of the details about the documents that are not trained on, if there are any."""
    if not held_out:
        return []
    cut = f", {held_out.cut:,} of them cut" if held_out.cut else ""
    source, objective = recorded(config.eval_file or config.data_file), objective_of(config)
    count, looked_at = counted(len(held_out), objective.word), objective.evaluated_text(evaluated)
    return [f"held out   {count} of {source}{cut}; {looked_at}"]


def rewritten(documents: Examples) -> list[str]:
    """Say how many conversations became several documents, if any did."""
    conversations, several = documents.rewritten
    if not conversations:
        return []
    counts = f"{counted(conversations, 'conversation')} became {counted(several, 'document')}"
    return [f"{counts}, because the template rewrites earlier turns"]


def cut_warnings(config: Config, documents: Examples) -> Iterator[str]:
    """Say what --ctx_len cuts off."""
    of_all = f"of {counted(len(documents), 'document')}"
    if documents.cut:
        lost = counted(documents.cut_tokens, "token")
        yield f"{documents.cut:,} {of_all} cut at --ctx_len {config.ctx_len}: {lost} lost"
    if documents.untrained:
        left_out = counted(documents.untrained, "document")
        yield f"{left_out} left out: nothing in the first {config.ctx_len} tokens is trained"


def left_out(config: Config, found: Data) -> str:
    """Name the rows left out and why, for the end of a line; "" if none."""
    parts = [found.documents.too_long_text(config.ctx_len)]
    for file in found.found.files.values():
        for reason, (count, places) in file.left_out.items():
            parts.append(f"{counted(count, 'row')} in which {reason}: {places_text(count, places)}")
    told = "; ".join(filter(None, parts))
    return f"; left out: {told}" if told else ""
