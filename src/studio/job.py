"""Job of the training page as a process: python -m src.studio.job MODULE FLAGS

It runs a program of this project, whose progress becomes a line each second. The module `fetch` downloads a
name of the hub. A preview, which reads files of strangers, has a limit of memory.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
from collections.abc import Sequence

from ..common.startup import importing, naming_missing_packages

with importing():
    from rwkv_miss import progress
    from rwkv_miss.errors import one_line_errors
    from rwkv_miss.files.hub import local_path

    from ..common.available_memory import GIB, status_bytes
    from ..config import settle
    from ..config.parse import flag_parser, read_flags
    from ..data.fetch import fetch_inputs
    from ..data.formats.sources import Reading, files_in, sources
    from ..data.formats.text import MB

PREVIEW = "scripts.preview"
ROOM, OF_A_BYTE = 2 * GIB, 130  # memory for a preview, and for one byte that it reads


def main() -> None:
    progress.LINE, progress.LINE_SHARE = 1.0, 0.0
    module, *words = sys.argv[1:]
    sys.argv = [module, *words]
    with one_line_errors(), naming_missing_packages():
        if module == "fetch":
            name, repo_type = words
            print(json.dumps({"name": name, "path": str(local_path(name, repo_type))}))
            return
        if module == PREVIEW:
            limit_memory([word for word in words if "=" in word])
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def limit_memory(flags: Sequence[str]) -> None:
    """Limit the memory that a preview and its children may each take, so that small files cannot take all.

    There is room for what importing torch has taken, the model, which is mapped, and what reading takes.
    """
    config = fetch_inputs(settle(read_flags(flag_parser(PREVIEW, ""), flags)))
    names = filter(None, (config.data_file, config.eval_file))
    data = [source for name in names for source in sources(name, Reading.of(config))]
    if not all(source.size for source in data):
        return  # a data set of the hub has a size only when it has been read
    model = config.load_model
    files = files_in(model) if os.path.isdir(model) else [model] if model else []
    mapped = 2 * sum(map(os.path.getsize, files))  # the tokenizer and the template map the files once each
    read = config.largest_row * MB + sum(source.size for source in data)
    limit = status_bytes("/proc/self/status", "VmData") + mapped + ROOM + OF_A_BYTE * read
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


if __name__ == "__main__":
    main()
