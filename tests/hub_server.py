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
        self.large_files = {}  # SHA-256 -> bytes
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
        self.large_files |= {
            hashlib.sha256(content).hexdigest(): content for content in commits[commit].values()
        }
        self.branches.setdefault((kind, name), {})[branch] = commit
        return commit

    def asked(self, method, part=""):
        return [path for _, how, path, _ in self.log if how == method and part in path]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers about self.server.hub, as the hub itself or, where self.server.is_large, from the place of its
    large files.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    @property
    def hub(self):
        return self.server.hub

    def answer(self):
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.log.append(
            ("large" if self.server.is_large else "endpoint", self.command, self.path, headers)
        )
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/").split("/")
        if self.hub.refusal:
            self.refuse(self.hub.refusal, "")
        elif self.server.is_large:
            self.large_file(*path)
        elif path[0] != "api":
            kind = path.pop(0) if path[0] == "datasets" else "models"
            self.file(kind, *path)
        elif len(path) < 4:  # the package asks about itself
            self.refuse(404, "")
        else:
            self.repository(*path[1:])

    do_HEAD = do_GET = answer

    def large_file(self, digest):
        self.send(self.hub.large_files[digest], {"ETag": f'"{digest}"'})

    def file(self, kind, owner, name, resolve, revision, *path):
        """Answer /OWNER/NAME/resolve/REVISION/PATH."""
        assert resolve == "resolve"
        commit = self.commit(kind, f"{owner}/{name}", revision)
        if not commit:
            return
        files, path = self.hub.repositories[kind, f"{owner}/{name}"][commit], "/".join(path)
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            self.refuse(404, "EntryNotFound", headers)
        elif path.endswith(LARGE):
            digest = hashlib.sha256(files[path]).hexdigest()
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(files[path]))}
            self.send(b"", {**headers, "Location": f"{self.hub.large}/{digest}"}, 302)
        else:
            etag = hashlib.sha1(b"blob %d\0" % len(files[path]) + files[path]).hexdigest()
            self.send(files[path], {**headers, "ETag": f'"{etag}"'})

    def repository(self, kind, owner, name, what="", *revision):
        """Answer /api/KIND/OWNER/NAME: the repository, its refs, or its tree at a revision."""
        key = kind, f"{owner}/{name}"
        commit = self.commit(*key, "/".join(revision) or "main")
        if not commit:
            return
        files = self.hub.repositories[key][commit]
        if what == "refs":
            answer = self.refs(key)
        elif what == "tree":
            answer = [
                {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                for path, content in files.items()
            ]
        else:
            siblings = [{"rfilename": path} for path in files]
            answer = {"id": key[1], "sha": commit, "private": False, "downloads": 0, "likes": 0, "tags": []}
            answer |= {"siblings": siblings}
        self.send(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def refs(self, key):
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit}
            for branch, commit in self.hub.branches[key].items()
        ]
        return {"branches": branches, "tags": [], "converts": []}

    def commit(self, kind, name, revision):
        """The commit of a revision, or None after the answer that says why there is none."""
        hub, key = self.hub, (kind, name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if key not in hub.repositories or hub.private.get(name, token) != token:
            return self.refuse(404 if token else 401, "RepoNotFound")
        if name in hub.gated:
            return self.refuse(403, "GatedRepo")
        commit = hub.branches[key].get(revision, revision)
        return commit if commit in hub.repositories[key] else self.refuse(404, "RevisionNotFound")

    def send(self, content, headers, status=200):
        hub, begin = self.hub, 0
        if (asked := self.headers.get("Range")) and status == 200:
            begin, status = int(asked.removeprefix("bytes=").partition("-")[0]), 206
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self.begin(status, {**headers, "Content-Length": str(len(content) - begin)})
        if self.command == "HEAD":
            return
        if hub.cut is not None and self.server.is_large:
            self.wfile.write(content[begin : begin + hub.cut])
            hub.cut, hub.refusal = None, 503  # gone, until somebody repairs it
            self.close_connection = True
        else:
            self.wfile.write(content[begin:])

    def refuse(self, status, code, headers=()):
        self.begin(status, {**dict(headers), "X-Error-Code": code, "Content-Length": "0"})

    def begin(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub, is_large):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.is_large = hub, is_large

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a client that has broken off


@contextlib.contextmanager
def serving():
    """A Hub that answers at hub.endpoint while the context lasts."""
    hub = Hub()
    servers = [Server(hub, is_large) for is_large in (False, True)]
    hub.endpoint, hub.large = (server.address for server in servers)
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
