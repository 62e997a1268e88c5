"""Names of the Hugging Face hub, hf://OWNER/NAME[/FILE][@REVISION], and how records name its files."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from ..errors import UserError, similar_path

HUB = "hf://"
MODEL, DATA = "model", "dataset"  # huggingface_hub's names of the kinds of repositories
PREFIXES = {"models/": MODEL, "datasets/": DATA}
FORM = "hf://OWNER/NAME/FILE@REVISION, of which /FILE and @REVISION may be absent"
ADDRESS = re.compile(  # a web address of a file or of its page
    r"https?://(?:huggingface\.co|hf\.co)/(datasets/)?([\w.-]+/[\w.-]+)/(?:resolve|blob)/([^/]+)/([^?#]+)"
)
SUFFIXES = (".pth", ".safetensors", ".gguf", ".bin", ".pt")
COMMIT = re.compile(r"[0-9a-f]{40}")
REFERENCE = re.compile(r"refs/(pr|convert)/[^/]+")  # a revision with slashes that may stand before a file


class Fetched(str):
    """Local path of a file from the hub. `name`: its name in records, hf://...@COMMIT."""

    name: str

    def __new__(cls, path: str, name: str) -> Fetched:
        made = super().__new__(cls, path)
        made.name = name
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # for pickle and copy
        return str(self), self.name


def recorded(value: Any) -> Any:
    """Return a setting for a record: a file from the hub as its name with the commit, else the value."""
    return value.name if isinstance(value, Fetched) else value


@dataclasses.dataclass(frozen=True)
class HubName:
    """Name of the hub, parsed into its parts. Without a file it names the repository as a folder."""

    repo: str
    file: str = ""
    revision: str = ""
    repo_type: str = MODEL
    prefix: str = ""  # models/ or datasets/, if the user typed it

    def __str__(self) -> str:
        file, revision = self.file and f"/{self.file}", self.revision and f"@{self.revision}"
        return f"{HUB}{self.prefix}{self.repo}{file}{revision}"

    @property
    def has_commit(self) -> bool:
        """Tell whether the revision is a commit, which never changes, rather than a branch or tag."""
        return bool(COMMIT.fullmatch(self.revision))

    @property
    def kind(self) -> str:
        """Name the type of repository for messages."""
        return "data set" if self.repo_type == DATA else "model repository"

    def at(self, commit: str, file: str | None = None) -> HubName:
        """Copy the name with this commit and, if given, another file."""
        return dataclasses.replace(self, revision=commit, file=self.file if file is None else file)


def is_hub_name(text: str) -> bool:
    """Tell whether a text is meant as a name of the hub; parse() checks it."""
    return text.startswith(HUB)


def of_address(text: str) -> HubName | None:
    """Convert a file's address in a browser into its name; None for other texts."""
    match = ADDRESS.match(text)
    if not match:
        return None
    kind, repo, revision, file = match.groups("")
    return HubName(repo, file, "" if revision == "main" else revision, prefix=kind)


def hint(path: str) -> str:
    """Hint at a name of the hub or at a similar path, for an error about a path that does not exist."""
    if name := of_address(path):
        return f"; give {name}"
    if "://" in path:
        return (
            "; nothing is downloaded but files of the Hugging Face hub, hf://OWNER/NAME/FILE: fetch it first"
        )
    if near := similar_path(path):
        return near
    if re.fullmatch(r"[\w.-]+/[\w-][\w.-]*", path) and not path.endswith(SUFFIXES):
        return f"; if it is a repository of the Hugging Face hub, give {HUB}{path}"
    return ""


def parse(text: str, repo_type: str = MODEL) -> HubName:
    """Parse a name, or raise UserError; `repo_type`: the type of a name without models/ or datasets/.

    huggingface_hub's own order, OWNER/NAME@REVISION/FILE, is read, too.
    """
    rest, prefix = text.removeprefix(HUB), ""
    for start in PREFIXES:
        if rest.startswith(start):
            prefix, rest, repo_type = start, rest.removeprefix(start), PREFIXES[start]
    owner, _, rest = rest.partition("/")
    name, slash, file = rest.partition("/")
    name, at, revision = name.partition("@")
    if at and slash:
        long = REFERENCE.match(f"{revision}/{file}")
        whole = long[0] if long else revision
        revision, file = whole, f"{revision}/{file}".removeprefix(whole).lstrip("/")
    elif not at:
        file, at, revision = file.rpartition("@") if "@" in file else (file, "", "")
    parts = [owner, name, *(file.split("/") if file or slash and not at else ())]
    fits = all(re.fullmatch(r"[\w.-]+", part) for part in parts[:2])
    places = [*parts, *(revision.split("/") if at else ())]  # names of folders and files in the cache
    inside = all(
        part not in ("", ".", "..") and "\\" not in part and part.isprintable() and len(part) < 256
        for part in places
    )
    known_revision = re.fullmatch(r"[\w./+-]+", revision) if at else True
    if not fits or not inside or not known_revision or ".." in revision:
        raise UserError(f"{text} is no name of the Hugging Face hub; expected {FORM}")
    return HubName(f"{owner}/{name}", file, revision, repo_type, prefix)
