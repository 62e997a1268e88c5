"""Lines of the plan about the data: the documents, their rows, and the held-out ones."""

from __future__ import annotations

from collections.abc import Iterator

from rwkv_miss.files.hub_names import recorded

from ..common.formatting import counted
from ..data.bos import describe_bos
from ..data.examples import Examples
from ..data.formats import places_text
from ..planning.plan import Data, Plan


def documents_line(plan: Plan) -> str:
    """Write the line of the plan about the documents."""
    config, found, documents = plan.settings, plan.data, plan.data.documents
    file = found.found.files.get(config.data_file)  # None for several files
    described = f" ({file.describe()})" if file else ""
    several = "".join(f" ({text})" for text in [*rewritten(documents), *cut_texts(documents, config.ctx_len)])
    encoder = found.encoder
    bos = f", {describe_bos(encoder.bos)}" if encoder.bos else ""
    trained = plan.source.trained_text(documents)
    line = (
        f"data       {recorded(config.data_file)}{described}: {counted(len(documents), documents.word)}"
        f"{several}, {counted(documents.tokens, 'token')}{trained} (template"
        f" {encoder.template.name}{bos}){left_out(found, config.ctx_len)}"
    )
    return line.encode("utf-8", "backslashreplace").decode()


def rows(plan: Plan) -> str:
    """Describe how documents lie in rows."""
    config, schedule = plan.settings, plan.schedule
    source, longest = plan.source, counted(max(schedule.lengths), "token")
    if content := source.loss.words.content:
        return f"up to {longest} for a {content}"
    if not config.packing:
        return f"rows of up to {longest}, a {source.loss.words.example} in each"
    full = sum(schedule.lengths) / (len(schedule.rows) * config.ctx_len)
    return f"rows of {config.ctx_len} tokens, {full:.0%} full"


def sources(plan: Plan) -> list[str]:
    """Write the lines of the details about files and rows that documents_line() leaves out."""
    found = plan.data.found
    return [*found.source_lines(but=plan.settings.data_file), *found.bad_lines()]


def long_texts(documents: Examples, ctx_len: int) -> list[str]:
    """Write the line of the details about texts that became several documents, if any did."""
    return [
        f"long texts {cut}, each of which begins with the last token of the one before"
        for cut in cut_texts(documents, ctx_len)
    ]


def cut_texts(documents: Examples, ctx_len: int) -> list[str]:
    """Say how many texts became several documents, if any did."""
    if not documents.split:
        return []
    texts = counted(documents.split, "text")
    return [f"{texts} of more than --ctx_len {ctx_len} tokens, cut into several documents"]


def held_out(plan: Plan) -> list[str]:
    """Write the line of the details about the documents that are not trained on, if there are any."""
    config, held = plan.settings, plan.data.held_out
    if not held:
        return []
    cut = f", {held.cut:,} of them cut" if held.cut else ""
    file, source = recorded(config.eval_file or config.data_file), plan.source
    count = counted(len(held), source.loss.words.example)
    looked_at = source.evaluated_text(plan.evaluated)
    return [f"held out   {count} of {file}{cut}; {looked_at}"]


def rewritten(documents: Examples) -> list[str]:
    """Say how many conversations became several documents, if any did."""
    conversations, several = documents.rewritten
    if not conversations:
        return []
    counts = f"{counted(conversations, 'conversation')} became {counted(several, 'document')}"
    return [f"{counts}, because the template rewrites earlier turns"]


def cut_warnings(documents: Examples, ctx_len: int) -> Iterator[str]:
    """Say what --ctx_len cuts off."""
    of_all = f"of {counted(len(documents), 'document')}"
    if documents.cut:
        lost = counted(documents.cut_tokens, "token")
        yield f"{documents.cut:,} {of_all} cut at --ctx_len {ctx_len}: {lost} lost"
    if documents.untrained:
        left_out = counted(documents.untrained, "document")
        yield f"{left_out} left out: nothing in the first {ctx_len} tokens is trained"


def left_out(found: Data, ctx_len: int) -> str:
    """Name the rows left out and why, for the end of a line; "" if none."""
    parts = [found.documents.too_long_text(ctx_len)]
    for file in found.found.files.values():
        for reason, (count, places) in file.left_out.items():
            parts.append(f"{counted(count, 'row')} in which {reason}: {places_text(count, places)}")
    text = "; ".join(filter(None, parts))
    return f"; left out: {text}" if text else ""
