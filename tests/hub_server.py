"""A Hub on the loopback address: as much of its HTTP protocol as huggingface_hub needs, in memory.

Repositories of models, public or private, with branches, tags and commits; small files inside of commits, large ones
by git LFS; tokens; errors by X-Error-Code. Clients need `HF_ENDPOINT` (read when huggingface_hub is imported) and
`HF_HUB_DISABLE_XET=1`.

    POST /api/repos/create, /api/validate-yaml
    GET /api/models/{id}[/revision/{rev}], …/tree/{rev}[/{path}], …/commits/{rev}
    POST /api/models/{id}/preupload/{rev}, …/commit/{rev}, …/branch/{name}, …/tag/{rev}
    POST /{id}.git/info/lfs/objects/batch, PUT and POST (verify) /lfs/{oid}
    HEAD and GET /{id}/resolve/{rev}/{path}
    POST /faults {"drop_uploads": [...], "drop_downloads": [...]}: sets these attributes of `Hub` from another process

Protocol: huggingface.co/docs/hub/api, the client's source, and git-lfs' docs/api/batch.md.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LARGE = 20_000
REPO = r"/(?P<repo>[^/]+/[^/]+)"
MODEL = "/api/models" + REPO
LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png")


def blob_id(data: bytes) -> str:
    """The name that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class File:
    data: bytes
    is_large: bool

    @property
    def etag(self):
        return hashlib.sha256(self.data).hexdigest() if self.is_large else blob_id(self.data)

    def entry(self, path):
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": blob_id(self.data)}
        if self.is_large:
            entry["lfs"] = {"oid": self.etag, "size": len(self.data), "pointerSize": 134}
        return entry


@dataclass
class Repository:
    owner: str
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict] = field(default_factory=dict)
    """sha -> {"files": {path: File}, "parent": sha or None, "title": …}"""

    def commit(self, branch, files, title):
        parent = self.branches.get(branch)
        told = [parent, title, len(self.commits), sorted((path, file.etag) for path, file in files.items())]
        sha = hashlib.sha1(json.dumps(told).encode()).hexdigest()
        self.commits[sha] = {"files": files, "parent": parent, "title": title}
        self.branches[branch] = sha
        return sha

    def resolve(self, revision):
        """The commit of a branch, a tag or (the beginning of) a sha; None: there is no such revision."""
        for names in (self.branches, self.tags):
            if revision in names:
                return names[revision]
        return next((sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)), None)

    def files(self, revision="main"):
        """{path: bytes}, for tests."""
        return {path: file.data for path, file in self.commits[self.resolve(revision)]["files"].items()}

    def history(self, revision="main"):
        """The commits' titles, newest first."""
        titles, sha = [], self.resolve(revision)
        while sha is not None:
            titles.append(self.commits[sha]["title"])
            sha = self.commits[sha]["parent"]
        return titles


class RefusedError(Exception):
    """Answered with an error, as the Hub does: the client makes its exceptions from the status and X-Error-Code."""

    def __init__(self, status, message, code=None, **headers):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {**({"X-Error-Code": code} if code else {}), "X-Error-Message": message, **headers}


class Hub:
    """
    Args:
        tokens: {token: user}.

    Attributes:
        drop_uploads, drop_downloads: for each of the next transfers of a large file, after how many bytes the
            connection is dropped (None: not at all).
        requests: (method, path, Range or None) of every request that came.
    """

    def __init__(self, tokens):
        self.tokens = dict(tokens)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.drop_uploads: list[int | None] = []
        self.drop_downloads: list[int | None] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.lock = threading.RLock()

    @contextmanager
    def serve(self):
        """The endpoint, as long as the context lasts."""
        methods = {f"do_{method}": HubHandler.answer for method in ("GET", "HEAD", "POST", "PUT")}
        handler = type("Handler", (HubHandler,), {"hub": self, **methods})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def user(self, header):
        """Who sent a request; None: somebody without a token."""
        if not header:
            return None
        user = self.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return user

    def repository(self, name, user, write=False):
        found = self.repositories.get(name)
        if found is None or (found.private and user != found.owner):  # whether it is there is nobody else's business
            status, message = (404, "Repository not found") if user else (401, "Invalid username or password.")
            raise RefusedError(status, message, "RepoNotFound")
        if write and user != found.owner:
            raise RefusedError(403 if user else 401, f"You have no right to write to {name}")
        return found

    def commit_of(self, repository, revision):
        sha = repository.resolve(revision)
        if sha is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]["files"]


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, between which it would wait
    hub: Hub

    ROUTES = [
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/faults", "set_faults"),
        ("POST", MODEL + r"/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", MODEL + r"/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", MODEL + r"/branch/(?P<branch>[^/]+)", "branch"),
        ("POST", MODEL + r"/tag/(?P<revision>[^/]+)", "tag"),
        ("GET", MODEL + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("GET", MODEL + r"/commits/(?P<revision>[^/]+)", "commits"),
        ("GET", MODEL + r"(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", REPO + r"\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_verify"),
        ("HEAD", REPO + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", REPO + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def log_message(self, *_):
        """Tests read `Hub.requests`."""

    def answer(self):
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, unquote(path), self.headers.get("Range")))
        # What is not read before an answer is sent may cost the client the answer.
        body = None if self.command == "PUT" else self._body()
        try:
            answer = self._answer_of(path, body)
        except RefusedError as refused:
            self._send(refused.status, json.dumps({"error": refused.message}).encode(), refused.headers)
        else:
            if answer is not None:
                self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _answer_of(self, path, body):
        """What goes into the answer as JSON; None: it is sent already."""
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                named = {key: value and unquote(value) for key, value in match.groupdict().items()}
                user = None if "oid" in named else self.hub.user(self.headers.get("Authorization"))
                with self.hub.lock:
                    return getattr(self, name)(user, body, **named)
        raise RefusedError(404, f"no route for {self.command} {path}")

    def _send(self, status, data, headers, length=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data) if length is None else length), **headers}.items():
            self.send_header(key, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self, limit=None):
        """The bytes of the request, or the first `limit` of them."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            length = int(self.headers.get("Content-Length") or 0)
            return self.rfile.read(length if limit is None else min(length, limit))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
            if limit is not None and sum(map(len, parts)) >= limit:
                return b"".join(parts)[:limit]
        self.rfile.readline()
        return b"".join(parts)

    def create(self, user, body):
        asked = json.loads(body)
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if not name.startswith(f"{user}/"):
            raise RefusedError(403, f"You have no right to create a model under the namespace of {name}")
        url = f"http://{self.headers['Host']}/{name}"
        if name in self.hub.repositories:
            self._send(409, json.dumps({"error": "You already created this model repo", "url": url}).encode(), {})
            return None
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(user, bool(private))
        self.hub.repositories[name].commit("main", {}, "initial commit")
        return {"url": url, "name": name, "id": name}

    def validate_yaml(self, user, body):
        """Only whether it is YAML; what the Hub makes of its fields is its own."""
        content = json.loads(body)["content"]
        try:
            yaml.safe_load(content.split("---")[1] if content.startswith("---") else "")
        except yaml.YAMLError as error:
            raise RefusedError(400, str(error).splitlines()[0]) from error
        return {"errors": [], "warnings": []}

    def set_faults(self, user, body):
        for name, sizes in json.loads(body).items():
            setattr(self.hub, name, sizes)
        return {}

    def preupload(self, user, body, repo, revision):
        there = self.hub.commit_of(self.hub.repository(repo, user, write=True), revision)[1]
        answers = []
        for file in json.loads(body)["files"]:
            is_large = file["size"] > LARGE or file["path"].endswith(LARGE_SUFFIXES)
            remote = there[file["path"]].etag if file["path"] in there else None
            mode = "lfs" if is_large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": remote})
        return {"files": answers}

    def lfs_batch(self, user, body, repo):
        self.hub.repository(repo, user, write=True)
        url = f"http://{self.headers['Host']}/lfs/"
        answers = []
        for file in json.loads(body)["objects"]:
            answer = {"oid": file["oid"], "size": file["size"]}
            if file["oid"] not in self.hub.objects:
                href = {"href": url + file["oid"]}
                answer["actions"] = {"upload": href, "verify": href}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    def lfs_upload(self, user, body, oid):
        drop = self.hub.drop_uploads.pop(0) if self.hub.drop_uploads else None
        data = self._body(limit=drop)
        if drop is not None:
            self.close_connection = True
            return
        if hashlib.sha256(data).hexdigest() != oid:
            raise RefusedError(400, "the bytes that arrived have another SHA-256")
        self.hub.objects[oid] = data
        self._send(200, b"", {})

    def lfs_verify(self, user, body, oid):
        if len(self.hub.objects.get(oid, b"")) != json.loads(body)["size"]:
            raise RefusedError(404, f"no object {oid} of this size")
        return {}

    def commit(self, user, body, repo, revision):
        found = self.hub.repository(repo, user, write=True)
        if revision not in found.branches:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, title = dict(self.hub.commit_of(found, revision)[1]), ""
        for line in body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", found.branches[revision]) != found.branches[revision]:
                    raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), is_large=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise RefusedError(400, f"LFS pointer of {value['path']} points to a file that does not exist")
                files[value["path"]] = File(self.hub.objects[value["oid"]], is_large=True)
            elif key == "deletedFile":
                files.pop(value["path"])
            elif key == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
        sha = found.commit(revision, files, title)
        return {"success": True, "commitOid": sha, "commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{sha}"}

    def branch(self, user, body, repo, branch):
        found = self.hub.repository(repo, user, write=True)
        if branch in found.branches:
            raise RefusedError(409, f"Reference already exists: {branch}")
        found.branches[branch] = self.hub.commit_of(found, json.loads(body or b"{}").get("startingPoint", "main"))[0]
        return {}

    def tag(self, user, body, repo, revision):
        found, name = self.hub.repository(repo, user, write=True), json.loads(body)["tag"]
        if name in found.tags:
            raise RefusedError(409, f"Tag reference exists already: {name}")
        found.tags[name] = self.hub.commit_of(found, revision)[0]
        return {}

    def commits(self, user, body, repo, revision):
        found = self.hub.repository(repo, user)
        sha, _ = self.hub.commit_of(found, revision)
        answer = []
        while sha is not None:
            answer.append({"id": sha, "title": found.commits[sha]["title"], "message": "", "authors": [],
                           "date": "2025-01-01T00:00:00.000Z"})  # fmt: skip
            sha = found.commits[sha]["parent"]
        return answer

    def info(self, user, body, repo, revision=None):
        found = self.hub.repository(repo, user)
        sha, files = self.hub.commit_of(found, revision or "main")
        card = files["README.md"].data.decode() if "README.md" in files else ""
        card = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
        return {"_id": sha[:24], "id": repo, "modelId": repo, "sha": sha, "private": found.private, "downloads": 0,
                "likes": 0, "tags": card.get("tags") or [], "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"), "cardData": card,
                "siblings": [{"rfilename": path} for path in sorted(files)]}  # fmt: skip

    def tree(self, user, body, repo, revision, path=None):
        _, files = self.hub.commit_of(self.hub.repository(repo, user), revision)
        inside = f"{path.strip('/')}/" if path else ""
        below = {name: file for name, file in files.items() if name.startswith(inside)}
        if inside and not below:
            raise RefusedError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        if "recursive=true" in urlsplit(self.path).query.lower():
            return [file.entry(name) for name, file in sorted(below.items())]
        names = sorted({inside + name[len(inside) :].split("/")[0] for name in below})
        folder = {"type": "directory", "size": 0, "oid": "0" * 40}
        return [below[name].entry(name) if name in below else {**folder, "path": name} for name in names]

    def resolve(self, user, body, repo, revision, path):
        sha, files = self.hub.commit_of(self.hub.repository(repo, user), revision)
        if path not in files:
            raise RefusedError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        file = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes",
                   "Content-Type": "application/octet-stream"}  # fmt: skip
        if file.is_large:
            headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        data, status = file.data, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            if first >= len(data):
                raise RefusedError(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        faults, length = self.hub.drop_downloads, len(data)
        drop = faults.pop(0) if file.is_large and self.command == "GET" and faults else None
        if drop is not None:
            self.close_connection, data = True, data[:drop]
        self._send(status, data, headers, length)
