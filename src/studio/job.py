"""Job of the training page as a process: python -m src.studio.job MODULE FLAGS

It runs a program of this project, whose progress becomes a line each second. The module `fetch` downloads a
name of the hub.
"""

from __future__ import annotations

import json
import runpy
import sys

from ..common.startup import importing, naming_missing_packages

with importing():
    from rwkv_miss import progress
    from rwkv_miss.errors import one_line_errors
    from rwkv_miss.files.hub import local_path


def main() -> None:
    progress.LINE, progress.LINE_SHARE = 1.0, 0.0
    module, *words = sys.argv[1:]
    sys.argv = [module, *words]
    if module != "fetch":
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    with one_line_errors(), naming_missing_packages():
        name, repo_type = words
        print(json.dumps({"name": name, "path": str(local_path(name, repo_type))}))


if __name__ == "__main__":
    main()
