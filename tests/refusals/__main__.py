"""python -m tests.refusals [--write]"""

import sys

from . import HERE, ROOMS, answers, differences

for room in ROOMS:
    changed = differences(room)
    print("\n".join(changed) or f"{room}.txt: as it is")
    if "--write" in sys.argv:
        (HERE / f"{room}.txt").write_text(answers(room)[0], "utf-8")
