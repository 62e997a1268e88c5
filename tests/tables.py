"""Tables of cases as text, and rows of data."""

import re


def cases(table):
    r"""Return the rows of a text table. Two spaces or more part cells; the last ones may be left out.
    \n in one is a line's end; a backslash ends a line that goes on in the next one; # begins a comment.
    """
    lines = [line.strip() for line in table.replace("\\\n", "").strip().splitlines()]
    rows = [re.split(" {2,}", line.replace(r"\n", "\n")) for line in lines if not line.startswith("# ")]
    width = max(map(len, rows))
    return [tuple(row + [""] * (width - len(row))) for row in rows]


def talk(question, answer):
    """Return a row of data: a conversation of one question and its answer."""
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}
