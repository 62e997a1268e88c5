"""Tables of cases as text."""

import re


def cases(table):
    r"""Return the rows of a text table. Cells are parted by two spaces or more; \n in one is a line's end."""
    rows = [re.split(" {2,}", line.strip()) for line in table.strip().splitlines()]
    assert len({len(row) for row in rows}) == 1, "rows of one length"
    return [tuple(cell.replace(r"\n", "\n") for cell in row) for row in rows]
