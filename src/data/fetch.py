"""Fetching of settings' files from the Hugging Face hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from rwkv_miss.errors import UserError
from rwkv_miss.files import hub, hub_names
from rwkv_miss.files.model_files import read_model
from rwkv_miss.progress import print_notes

from ..common.first_process import is_first_process
from ..config import Config
from .formats.sources import Reading, sources, weighted_paths

KINDS = {
    "load_model": hub_names.MODEL,
    "reference": hub_names.MODEL,
    "data_file": hub_names.DATA,
    "eval_file": hub_names.DATA,
}


def fetch_inputs(config: Config) -> Config:
    """Replace names of the hub in the settings by local files."""
    return dataclasses.replace(config, **fetch_files(pinned_names(config)))


def fetch_data(data_file: str) -> str:
    """Replace names of the hub in --data_file by local files."""
    return fetch_inputs(Config(data_file=data_file)).data_file


def pinned_names(config: Config, recorded: Config | None = None) -> dict[str, str]:
    """Map setting -> its text with a commit in every name of the hub, for settings with such names.

    A name keeps the commit that it has in `recorded`, whatever branch it names. Local files are looked at
    before the hub is asked.
    """
    if any(hub_names.HUB in getattr(config, setting) for setting in KINDS):
        _check_local(config)
    pinned = {}
    for setting, kind in KINDS.items():
        text = getattr(config, setting)
        if hub_names.HUB not in text:
            continue
        earlier = _parts(setting, getattr(recorded, setting)) if recorded else []
        began = [hub_names.parse(path, kind) for path, _ in earlier if hub_names.is_hub_name(path)]
        parts = []
        for path, weight in _parts(setting, text):
            if hub_names.is_hub_name(path):
                path = str(_pinned(setting, hub_names.parse(path, kind), began))
            parts.append((path, weight))
        pinned[setting] = _joined(parts)
    return pinned


def _pinned(setting: str, name: hub_names.HubName, began: list[hub_names.HubName]) -> hub_names.HubName:
    """Give a name its commit: that of the run's first start, unless another commit was given."""
    for one in began:
        same = (one.repo, one.repo_type) == (name.repo, name.repo_type) and name.file in ("", one.file)
        if same and not name.has_commit:
            if name.revision and is_first_process():
                print_notes([f"--{setting} {name}: the run goes on with its commit, {one}"])
            return one
    return hub.pin(name, is_first_process())


def fetch_files(names: Mapping[str, str], shown: bool = True) -> dict[str, hub_names.Fetched]:
    """Download what pinned_names() gave, and return the local files by setting."""
    local = {}
    for setting, text in names.items():
        parts = []
        for path, weight in _parts(setting, text):
            if hub_names.is_hub_name(path):
                path = str(hub.fetch(hub_names.parse(path, KINDS[setting]), shown))
                if "," in path and KINDS[setting] == hub_names.DATA:
                    raise UserError(
                        f"--{setting} {text}: the hub's cache has a comma in its path, {path}; set HF_HOME to"
                        " a folder without one"
                    )
            parts.append((path, weight))
        local[setting] = hub_names.Fetched(_joined(parts), text)
    return local


def _check_local(config: Config) -> None:
    """Raise UserError if a model or data on this machine can't be read, before anything is downloaded."""
    for setting, kind in KINDS.items():
        text = getattr(config, setting)
        for path, _ in _parts(setting, text) if text else []:
            if hub_names.is_hub_name(path):
                continue
            if kind == hub_names.DATA:
                sources(path, Reading.of(config))
            else:
                read_model(path)


def _parts(setting: str, text: str) -> list[tuple[str, float]]:
    return weighted_paths(text) if KINDS[setting] == hub_names.DATA else [(text, 1.0)]


def _joined(parts: list[tuple[str, float]]) -> str:
    return ",".join(
        path if weight == 1 else f"{path}:{weight!r}".removesuffix(".0") for path, weight in parts
    )
