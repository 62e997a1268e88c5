"""Tables: parquet and Arrow files and Hugging Face data sets -> (place, record).

They are read by pyarrow and datasets, which are in the optional extra `data`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

from rwkv_miss.errors import UserError, first_line
from rwkv_miss.files import hub
from rwkv_miss.files.hub_names import DATA, HubName
from rwkv_miss.progress import print_notes

from ...common.first_process import is_first_process
from .text import Position, Record

BATCH = 256  # records in memory at a time
ARROW_STREAM, ARROW_FILE = (
    b"\xff\xff\xff\xff",
    b"ARROW1",
)  # how Arrow's two forms begin; datasets writes the first


def _needed(package: str, path: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"{path} needs the package {package.partition('.')[0]}: pip install pyarrow datasets ({error})"
        ) from None


def parquet(path: str, position: Position) -> Iterator[Record]:
    """Read the rows of a parquet file, a batch at a time."""
    module = _needed("pyarrow.parquet", path)
    try:
        with module.ParquetFile(path) as file:
            row = 0
            position.share = lambda: row / max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(BATCH):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path}, row {row}", record
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        raise UserError(f"data file {path} can't be read as parquet: {first_line(error)}") from None


def arrow(path: str, position: Position) -> Iterator[Record]:
    """Read the rows of an Arrow file: of a data set's folder, of the cache of datasets, or of Feather."""
    module = _needed("pyarrow", path)
    try:
        with module.memory_map(path) as file:
            is_stream = file.read(len(ARROW_STREAM)) == ARROW_STREAM
            file.seek(0)
            row = done = 0
            if is_stream:
                batches = module.ipc.open_stream(file)
                position.share = lambda: file.tell() / max(file.size(), 1)
            else:
                reader = module.ipc.open_file(file)
                batches = map(reader.get_batch, range(reader.num_record_batches))
                position.share = lambda: done / max(reader.num_record_batches, 1)
            for batch in batches:
                done += 1
                for start in range(0, len(batch), BATCH):
                    for record in batch.slice(start, BATCH).to_pylist():
                        row += 1
                        yield f"{path}, row {row}", record
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        raise UserError(f"data file {path} can't be read as Arrow: {first_line(error)}") from None


def saved_dataset(path: str, split: str, position: Position) -> Iterator[Record]:
    """Read the rows of a folder that Dataset.save_to_disk or DatasetDict.save_to_disk wrote."""
    module = _needed("datasets", path)
    try:
        data = module.load_from_disk(path)
    except Exception as error:  # datasets raises many kinds for a damaged folder
        raise UserError(f"data folder {path} can't be read by datasets: {first_line(error)}") from None
    if isinstance(data, module.DatasetDict):
        if split not in data:
            raise UserError(
                f"{path} has no split {split!r}; choose one of {', '.join(data)} with --sft_split"
            )
        data = data[split]
    return _rows(path, data, position)


def named_dataset(name: str, split: str, position: Position) -> Iterator[Record]:
    """Read the rows of a data set of the Hugging Face hub, OWNER/NAME or OWNER/NAME/CONFIG.

    The package datasets downloads it, or takes it from its cache.
    """
    module = _needed("datasets", f"the data set {name}")
    owner, short, *config = name.split("/")
    repository = f"{owner}/{short}"
    if is_first_process():
        print_notes([f"no file or folder {name} here; asking the hub for a data set of that name"])
    offline = module.config.HF_HUB_OFFLINE
    problem = "" if offline else hub.why_unreachable(HubName(repository, repo_type=DATA))
    module.config.HF_HUB_OFFLINE = offline or bool(
        problem
    )  # then its cache, without half a minute of retries
    try:
        data = module.load_dataset(repository, *config, split=split)
    except Exception as error:  # datasets raises many kinds: no network, no such data set, split or CONFIG
        raise UserError(
            f"{name} is no file or folder here, and datasets can't load a data set of this name, split"
            f" {split!r} (--sft_split): {problem or first_line(error)}"
        ) from None
    finally:
        module.config.HF_HUB_OFFLINE = offline
    return _rows(name, data, position)


def _rows(where: str, data: Any, position: Position) -> Iterator[Record]:
    start = 0
    position.share = lambda: start / max(len(data), 1)
    for start in range(0, len(data), BATCH):
        try:
            columns = data[start : start + BATCH]
        except Exception as error:
            raise UserError(f"{where}, row {start + 1}: can't be read: {first_line(error)}") from None
        for i, values in enumerate(zip(*columns.values())):
            yield f"{where}, row {start + i + 1}", dict(zip(columns, values))


def is_saved_dataset(path: str) -> bool:
    return any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))
