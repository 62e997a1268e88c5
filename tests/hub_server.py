"""A stand-in of the Hugging Face hub's HTTP interface on 127.0.0.1, and of the place of its large files.

It answers what huggingface_hub asks about repositories, revisions and files, as the hub does: with commits,
ETags, ranges, a redirect for large files, and errors that a header names. What was asked is in `log`.
"""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

LARGE = (".pth", ".safetensors")  # files behind the redirect


class Hub:
    """repositories[kind, "OWNER/NAME"][commit][file] is the file's bytes."""

    def __init__(self):
        self.repositories, self.branches = {}, {}
        self.gated, self.private = set(), {}  # names; name -> the token that may read it
        self.log = []  # (server, method, path, headers)
        self.cut = None  # bytes after which an answer with a body breaks off
        self.refusal = None  # a status that every answer has
        self.endpoint = self.large = ""

    def add(self, name, files, kind="models", branch="main"):
        """A new commit of a repository; returns its hash."""
        commits = self.repositories.setdefault((kind, name), {})
        commit = hashlib.sha1(f"{kind}{name}{len(commits)}".encode()).hexdigest()
        commits[commit] = {
            path: content.encode() if isinstance(content, str) else content for path, content in files.items()
        }
        self.branches.setdefault((kind, name), {})[branch] = commit
        return commit

    def asked(self, method, part=""):
        return [path for _, how, path, _ in self.log if how == method and part in path]


def _handler(hub, server):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def answer(self, body):
            hub.log.append(
                (
                    server,
                    self.command,
                    self.path,
                    {name.lower(): value for name, value in self.headers.items()},
                )
            )
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/").split("/")
            if hub.refusal:
                return self.refuse(hub.refusal, "")
            if server == "large":
                content = next(
                    files[name]
                    for commits in hub.repositories.values()
                    for files in commits.values()
                    for name in files
                    if hashlib.sha256(files[name]).hexdigest() == path[0]
                )
                return self.send(content, {"ETag": f'"{path[0]}"'}, body)
            if path[0] == "api" and len(path) < 4:  # what the package asks about itself
                return self.refuse(404, "")
            if path[0] == "api":
                return self.describe(*path[1:])
            kind = path.pop(0) if path[0] == "datasets" else "models"
            owner, name, resolve, revision, *file = path
            assert resolve == "resolve"
            commit = self.commit(kind, f"{owner}/{name}", revision)
            if not commit:
                return None
            files = hub.repositories[kind, f"{owner}/{name}"][commit]
            if (file := "/".join(file)) not in files:
                return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
            content, headers = files[file], {"X-Repo-Commit": commit}
            if not file.endswith(LARGE):
                etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                return self.send(content, {**headers, "ETag": f'"{etag}"'}, body)
            digest = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            return self.send(b"", {**headers, "Location": f"{hub.large}/{digest}"}, body, 302)

        def commit(self, kind, name, revision):
            """The commit of a revision, or None after the answer that says why there is none."""
            key = (kind, name)
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if key not in hub.repositories or hub.private.get(name, token) != token:
                return self.refuse(404 if token else 401, "RepoNotFound")
            if name in hub.gated:
                return self.refuse(403, "GatedRepo")
            commit = hub.branches[key].get(revision, revision)
            return commit if commit in hub.repositories[key] else self.refuse(404, "RevisionNotFound")

        def describe(self, kind, owner, name, what="", *rest):
            revision = "/".join(rest) if rest else "main"
            if not (commit := self.commit(kind, f"{owner}/{name}", revision)):
                return
            files = hub.repositories[kind, f"{owner}/{name}"][commit]
            if what == "refs":
                branches = [
                    {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit}
                    for branch, commit in hub.branches[kind, f"{owner}/{name}"].items()
                ]
                told = {"branches": branches, "tags": [], "converts": []}
            elif what == "tree":
                told = [
                    {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                    for path, content in files.items()
                ]
            else:
                told = {
                    "id": f"{owner}/{name}",
                    "sha": commit,
                    "private": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "siblings": [{"rfilename": path} for path in files],
                }
            self.send(json.dumps(told).encode(), {"Content-Type": "application/json"}, True)

        def send(self, content, headers, body, status=200):
            begin = 0
            if (asked := self.headers.get("Range")) and status == 200:
                begin, status = int(asked.removeprefix("bytes=").partition("-")[0]), 206
                headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content) - begin)}.items():
                self.send_header(name, value)
            self.end_headers()
            if body and hub.cut is not None and server == "large":
                self.wfile.write(content[begin : begin + hub.cut])
                hub.cut, hub.refusal = None, 503  # gone, until somebody repairs it
                self.close_connection = True
            elif body:
                self.wfile.write(content[begin:])

        def refuse(self, status, code, headers=()):
            self.send_response(status)
            for name, value in {**dict(headers), "X-Error-Code": code, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

    return Handler


@contextlib.contextmanager
def serving():
    """A Hub that answers at hub.endpoint while the context lasts."""
    hub, servers = Hub(), []

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            pass  # a client that has broken off

    for name in ("endpoint", "large"):
        server = Server(("127.0.0.1", 0), _handler(hub, name))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        setattr(hub, name, f"http://127.0.0.1:{server.server_port}")
        servers.append(server)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
