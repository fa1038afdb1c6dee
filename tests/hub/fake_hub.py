"""A small server that speaks the Hub's HTTP API, as far as publishing and loading need it, with faults on demand."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from ruamel.yaml import YAML

TOKEN = "hf_" + "T" * 34  # may write to its own user's repositories
USER = "tester"


@dataclass
class Repo:
    """A repository: each commit holds all its files."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def commit(self, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(files)}{message}".encode()).hexdigest()
        self.commits.append((oid, dict(files)))
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        if revision == "main":
            return self.commits[-1]
        found = next((commit for commit in self.commits if commit[0] == revision), None)
        if found is None:
            raise Refusal(404, f"no revision {revision}", "RevisionNotFound")
        return found


@dataclass
class Fault:
    """A fault at a request: a status, or "drop" before or "drop after" the request was carried out."""

    path: str
    answer: int | str
    times: int = 1
    method: str = "POST"


@dataclass
class FakeHub:
    """The server's state; tests look at it and put faults into it."""

    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    lose: set[str] = field(default_factory=set)
    """Names of files that a commit silently leaves out."""
    url: str = ""

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """Put a repository there."""
        self.repos[name] = Repo(private)
        self.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"} | files, "initial commit")
        return self.repos[name]

    def fault_for(self, method: str, path: str) -> int | str | None:
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault.answer
        return None


def is_large(name: str, content: bytes) -> bool:
    """Return True if the Hub keeps a file as a large one."""
    return name.endswith(".safetensors") or len(content) > 5_000_000


def blob_id(content: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refusal(Exception):  # noqa: N818
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


@contextmanager
def serve() -> Iterator[FakeHub]:
    """Run the server in a thread."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet: two of them would wait for each other

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{method} {path}")
        fault = self.hub.fault_for(method, path)
        if fault == "drop":
            self.close_connection = True
            return
        try:
            if isinstance(fault, int):
                raise Refusal(fault, f"made to fail with {fault}")
            content, headers = self._route(method, path, body)
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message, "X-Error-Code": refusal.code}
            said = {"error": refusal.message}
            if path.endswith("/repos/create"):
                said["url"] = f"{self.hub.url}/{_created_name(body)}"  # as the Hub says of one that is there
            self._send(refusal.status, json.dumps(said).encode(), headers, method)
            return
        if fault == "drop after":
            self.close_connection = True
            return
        self._send(200, content, headers, method)

    def _send(self, status: int, content: bytes, headers: dict[str, str], method: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if method != "HEAD":
            self.wfile.write(content)

    def _route(self, method: str, path: str, body: bytes) -> tuple[bytes, dict[str, str]]:
        for wanted, pattern, action in _ROUTES:
            if method in wanted and (match := re.fullmatch(pattern, path)):
                result = action(self, *match.groups(), body)
                return result if isinstance(result, tuple) else (json.dumps(result).encode(), {})
        raise Refusal(404, f"no such endpoint: {method} {path}")

    def _user(self) -> str | None:
        given = self.headers.get("Authorization", "")
        if given and given != f"Bearer {TOKEN}":
            raise Refusal(401, "Invalid credentials in Authorization header")
        return USER if given else None

    def _writer(self, name: str) -> None:
        user = self._user()
        if user is None:
            raise Refusal(401, "Unauthorized")
        if name.partition("/")[0] != user:
            raise Refusal(403, f"You don't have the rights to write to {name}")

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self._user() is None):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def whoami(self, _: bytes) -> Any:
        if self._user() is None:
            raise Refusal(401, "Unauthorized")
        return {"name": USER, "type": "user"}

    def create(self, body: bytes) -> Any:
        given, name = json.loads(body), _created_name(body)
        self._writer(name)
        if name in self.hub.repos:
            raise Refusal(409, "You already created this model repo")
        self.hub.add(name, {}, private=given.get("visibility") == "private" or bool(given.get("private")))
        return {"url": f"{self.hub.url}/{name}"}

    def validate_yaml(self, body: bytes) -> Any:
        text = json.loads(body)["content"]
        header = text.split("---\n")[1] if text.startswith("---\n") else ""
        if not isinstance(YAML(typ="safe").load(header), dict):
            raise Refusal(400, "no metadata")
        return {"errors": [], "warnings": []}

    def info(self, name: str, revision: str | None, _: bytes) -> Any:
        repo = self._repo(name)
        oid, files = repo.at(revision or "main")
        siblings = [
            {"rfilename": path, "size": len(content), **_identity(path, content)} for path, content in files.items()
        ]
        return {"_id": "0", "id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": siblings}

    def tree(self, name: str, revision: str, _: bytes) -> Any:
        oid_files = self._repo(name).at(revision)[1]
        return [_tree_entry(path, content) for path, content in oid_files.items()]

    def preupload(self, name: str, _revision: str, body: bytes) -> Any:
        self._writer(name)
        files = self._repo(name).files
        answer = []
        for given in json.loads(body)["files"]:
            path = given["path"]
            large = path.endswith(".safetensors") or given["size"] > 5_000_000
            old = files.get(path)
            oid = None if old is None else hashlib.sha256(old).hexdigest() if large else blob_id(old)
            answer.append(
                {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        return {"files": answer}

    def batch(self, name: str, body: bytes) -> Any:
        self._writer(name)
        objects = []
        for given in json.loads(body)["objects"]:
            entry = dict(given)
            if given["oid"] not in self.hub.large:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/storage/{given['oid']}"},
                    "verify": {"href": f"{self.hub.url}/{name}.git/info/lfs/objects/verify"},
                }
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def store(self, oid: str, body: bytes) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "content and hash differ")
        self.hub.large[oid] = body
        return {}

    def verify(self, name: str, body: bytes) -> Any:
        self._writer(name)
        if json.loads(body)["oid"] not in self.hub.large:
            raise Refusal(404, "not uploaded")
        return {}

    def commit(self, name: str, _revision: str, body: bytes) -> Any:
        self._writer(name)
        repo = self._repo(name)
        files, message = dict(repo.files), ""
        for item in map(json.loads, body.splitlines()):
            key, value = item["key"], item["value"]
            path = value.get("path", "")
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", repo.head) != repo.head:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "deletedFile":
                if files.pop(path, None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            elif path in self.hub.lose:
                continue
            elif key == "file":
                files[path] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[path] = self.hub.large[value["oid"]]
        oid = repo.commit(files, message)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"}

    def resolve(self, name: str, revision: str, path: str, _: bytes) -> tuple[bytes, dict[str, str]]:
        oid, files = self._repo(name).at(revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        content = files[path]
        etag = hashlib.sha256(content).hexdigest() if is_large(path, content) else blob_id(content)
        return content, {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Content-Type": "application/octet-stream"}


def _created_name(body: bytes) -> str:
    given = json.loads(body)
    return f"{given.get('organization') or USER}/{given['name']}"


def _identity(path: str, content: bytes) -> dict[str, Any]:
    """Name a file's content as `info` does: a large file's blob is its pointer, not the content."""
    if not is_large(path, content):
        return {"blobId": blob_id(content)}
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"size": len(content), "sha256": digest, "pointerSize": 130}
    return {"blobId": blob_id(digest.encode()), "lfs": lfs}


def _tree_entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content)}
    if not is_large(path, content):
        return entry | {"oid": blob_id(content)}
    digest = hashlib.sha256(content).hexdigest()
    return entry | {"oid": blob_id(digest.encode()), "lfs": {"oid": digest, "size": len(content), "pointerSize": 130}}


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[tuple[str, ...], str, Any]] = [
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate_yaml),
    (("GET",), rf"/api/models/{_NAME}(?:/revision/(\w+))?", _Handler.info),
    (("GET",), rf"/api/models/{_NAME}/tree/(\w+)", _Handler.tree),
    (("POST",), rf"/api/models/{_NAME}/preupload/(\w+)", _Handler.preupload),
    (("POST",), rf"/api/models/{_NAME}/commit/(\w+)", _Handler.commit),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/verify", _Handler.verify),
    (("PUT",), r"/storage/(\w+)", _Handler.store),
    (("GET", "HEAD"), rf"/{_NAME}/resolve/(\w+)/(.+)", _Handler.resolve),
]
