"""A Hugging Face Hub on the loopback interface: the part of its HTTP API that the client needs to upload and download.

Everything is kept in memory. There is one branch, `main`; other branches, pull requests and unknown addresses are
refused. A `.gitignore`, the `expand` and `files_metadata` of `model_info` and ranges of a file have no effect. Xet is
not offered: content goes through git-LFS uploads and plain downloads.

`huggingface_hub` reads the environment when it is imported, so a test does one of two things:

- It starts a subprocess with `os.environ | hub.environment(home, token)`: `HF_ENDPOINT` and `HF_TOKEN`; `HF_HOME` and
  `HF_HUB_CACHE`, away from the user's own; `HF_HUB_OFFLINE=0`, because `conftest.py` sets it; `HF_HUB_DISABLE_XET=1`,
  because the client uploads by `hf_xet` wherever that is installed, whatever the server offers;
  `HF_HUB_DISABLE_TELEMETRY=1`, so that the log holds no calls of the client's own; `NO_PROXY`.
- It calls `HfApi(endpoint=hub.url, token=...)`, with `HF_HUB_OFFLINE` off, `HF_HUB_DISABLE_XET` and
  `HF_HUB_DISABLE_TELEMETRY` on in `huggingface_hub.constants`. `token=False`, not `None`, is a client without a token.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

import yaml

LFS_SUFFIXES = (".bin", ".ckpt", ".jpg", ".npy", ".npz", ".onnx", ".parquet", ".png", ".pt", ".pth", ".safetensors")
LFS_SIZE = 5 * 2**20
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()

# "user/repo" is a model; the names of other repositories begin with their type, as in the addresses of the Hub
REPO = r"(?:models/)?(?P<key>(?:(?:datasets|spaces)/)?[^/]+/[^/]+)"


@dataclass
class Repo:
    """A repository; the last of its commits is `main`."""

    private: bool
    sdk: str | None
    commits: dict[str, dict[str, bytes]]  # sha → {path: content}

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]


class HubServer(ThreadingHTTPServer):
    """A context manager that serves `repos` to the owners of `tokens` (token → user) and logs every request."""

    request_queue_size = 64  # the client opens a connection per file, eight at a time

    def __init__(self, tokens: dict[str, str]):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []  # (method, path without the query)
        self.lock = threading.Lock()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Environment variables that direct the client in a subprocess to this server, with its caches below `home`."""
        switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        caches = {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": token or "", "NO_PROXY": "127.0.0.1", **switches, **caches}

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.shutdown()
        self.server_close()


class Refusal(Exception):
    """An answer other than 200; the client chooses its exception by the status and by the header `X-Error-Code`."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None, **body: str):
        super().__init__(message)
        self.status = status
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.headers = {name: value for name, value in headers.items() if value is not None}
        self.body = {"error": message, "errors": [{"message": message}], **body}


def is_lfs(path: str, size: int) -> bool:
    return size > LFS_SIZE or (size > 0 and path.endswith(LFS_SUFFIXES))


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


def file_info(path: str, content: bytes) -> dict:
    """A line of the tree. Git stores an LFS file as a pointer, whose oid is that of the line."""
    info = {"type": "file", "path": path, "size": len(content)}
    if not is_lfs(path, len(content)):
        return info | {"oid": git_oid(content)}
    sha256 = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
    lfs = {"oid": sha256, "size": len(content), "pointerSize": len(pointer)}
    return info | {"oid": git_oid(pointer), "lfs": lfs}


def content_oid(path: str, content: bytes) -> str:
    info = file_info(path, content)
    return info.get("lfs", info)["oid"]


def card_metadata(readme: str) -> dict:
    """The YAML at the beginning of a README.md."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n?---\s*(\n|$)", readme, flags=re.DOTALL)
    try:
        metadata = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError:
        metadata = "not YAML at all"
    if not isinstance(metadata, dict | None):
        raise Refusal(400, "Expected the metadata of README.md to be a YAML mapping.")
    return metadata or {}


class HubRequest(BaseHTTPRequestHandler):
    """One request, on a connection of its own: HTTP/1.0, so that no connection outlives its server."""

    server: HubServer

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.url_path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        with self.server.lock:
            self.server.requests.append((self.command, self.url_path))
            try:
                status, headers, reply = 200, {}, self.route()
            except Refusal as refusal:
                status, headers, reply = refusal.status, refusal.headers, refusal.body
        if isinstance(reply, tuple):
            headers, content = reply
        else:
            content = json.dumps(reply).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *arguments) -> None:
        """Print nothing: the server has its own log."""

    def route(self) -> dict | list | tuple[dict, bytes]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        self.user = self.server.tokens.get(token)
        for pattern, reply in ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {self.url_path}"):
                groups = match.groupdict(default="main")  # the only optional one is the revision
                return reply(self, **{name: unquote(value) for name, value in groups.items()})
        raise Refusal(404, f"This server does not speak {self.command} {self.url_path}")

    def repo(self, key: str, write: bool = False) -> Repo:
        """Find a repository; for those who may not read it, it does not exist."""
        repo, owner = self.server.repos.get(key), key.split("/")[-2]
        readable = repo is not None and (not repo.private or self.user == owner)
        if self.user is None and (write or not readable):
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if not readable:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and self.user != owner:
            raise Refusal(403, "This repository is another user's")
        return repo

    def repo_to_change(self, key: str, revision: str) -> Repo:
        if revision != "main" or self.query:
            raise Refusal(501, "This server has neither branches nor pull requests")
        return self.repo(key, write=True)

    def snapshot(self, key: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self.repo(key)
        sha = repo.head if revision == "main" else revision
        if sha not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    def whoami(self) -> dict:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        return {"type": "user", "name": self.user, "orgs": []}

    def named_in_body(self) -> tuple[str, dict]:
        payload = json.loads(self.body)
        owner = payload["organization"] or self.whoami()["name"]
        if owner != self.whoami()["name"]:
            raise Refusal(403, "This namespace is another user's")
        repo_type = payload.get("type", "model")
        return ("" if repo_type == "model" else f"{repo_type}s/") + f"{owner}/{payload['name']}", payload

    def create_repo(self) -> dict:
        key, payload = self.named_in_body()
        url = f"{self.server.url}/{key}"
        if key in self.server.repos:
            raise Refusal(409, "You already created this repo", url=url)  # the URL is read where `exist_ok` is set
        commits = {secrets.token_hex(20): {".gitattributes": GIT_ATTRIBUTES}}
        self.server.repos[key] = Repo(payload.get("visibility") == "private", payload.get("sdk"), commits)
        return {"url": url}

    def delete_repo(self) -> dict:
        key, _ = self.named_in_body()
        self.repo(key, write=True)
        del self.server.repos[key]
        return {}

    def validate_yaml(self) -> dict:
        metadata = card_metadata(json.loads(self.body)["content"])
        return {"warnings": [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]}

    def repo_info(self, key: str, revision: str) -> dict:
        sha, files = self.snapshot(key, revision)
        repo, (owner, name) = self.repo(key), key.split("/")[-2:]
        info = {"id": f"{owner}/{name}", "author": owner, "sha": sha, "private": repo.private, "sdk": repo.sdk}
        card = card_metadata(files.get("README.md", b"").decode())
        info |= {"cardData": card, "library_name": card.get("library_name"), "tags": card.get("tags", [])}
        return info | {"siblings": [{"rfilename": path} for path in sorted(files)]}

    def tree(self, key: str, revision: str) -> list:
        if self.query.get("recursive") != ["true"]:
            raise Refusal(501, "This server lists whole repositories only")
        return [file_info(*item) for item in sorted(self.snapshot(key, revision)[1].items())]

    def resolve(self, key: str, revision: str, path: str) -> tuple[dict, bytes]:
        sha, files = self.snapshot(key, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit=sha)
        size, etag = len(files[path]), f'"{content_oid(path, files[path])}"'
        linked = {"X-Linked-Etag": etag, "X-Linked-Size": size} if is_lfs(path, size) else {}
        return {"Content-Type": "application/octet-stream", "X-Repo-Commit": sha, "ETag": etag, **linked}, files[path]

    def preupload(self, key: str, revision: str) -> dict:
        """Say how to upload each file, and the oid of the present one: the client does not upload the same file again."""
        files, answers = self.repo_to_change(key, revision).files, []
        for path, size in ((file["path"], file["size"]) for file in json.loads(self.body)["files"]):
            oid = content_oid(path, files[path]) if path in files else None
            mode = "lfs" if is_lfs(path, size) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self, key: str) -> dict:
        self.repo(key, write=True)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.server.lfs_objects:
                item["actions"] = {"upload": {"href": f"{self.server.url}/lfs-objects/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str) -> dict:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(422, "The content is not what its oid says")
        self.server.lfs_objects[oid] = self.body
        return {}

    def commit(self, key: str, revision: str) -> dict:
        repo = self.repo_to_change(key, revision)
        files = dict(repo.files)
        for line in map(json.loads, self.body.splitlines()):
            operation, value = line["key"], line["value"]
            path = value.get("path", "").rstrip("/")
            if operation == "header":
                if not repo.head.startswith(value.get("parentCommit", "")):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif operation == "file":
                files[path] = base64.b64decode(value["content"])
            elif operation == "lfsFile":
                if value["oid"] not in self.server.lfs_objects:
                    raise Refusal(400, "The commit names an LFS object that was not uploaded")
                files[path] = self.server.lfs_objects[value["oid"]]
            else:
                folder = f"{path}/" if operation == "deletedFolder" else None
                deleted = [name for name in files if (name.startswith(folder) if folder else name == path)]
                if not deleted:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                for name in deleted:
                    del files[name]
        card_metadata(files.get("README.md", b"").decode())  # refuses what is not metadata
        repo.commits[secrets.token_hex(20)] = files
        return {"commitOid": repo.head, "commitUrl": f"{self.server.url}/{key}/commit/{repo.head}"}


ROUTES = {
    "GET /api/whoami-v2": HubRequest.whoami,
    "POST /api/repos/create": HubRequest.create_repo,
    "DELETE /api/repos/delete": HubRequest.delete_repo,
    "POST /api/validate-yaml": HubRequest.validate_yaml,
    f"GET /api/{REPO}(/revision/(?P<revision>[^/]+))?": HubRequest.repo_info,
    f"GET /api/{REPO}/tree/(?P<revision>[^/]+)": HubRequest.tree,
    f"(GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": HubRequest.resolve,
    f"POST /api/{REPO}/preupload/(?P<revision>[^/]+)": HubRequest.preupload,
    rf"POST /{REPO}\.git/info/lfs/objects/batch": HubRequest.lfs_batch,
    "PUT /lfs-objects/(?P<oid>[0-9a-f]{64})": HubRequest.lfs_upload,
    f"POST /api/{REPO}/commit/(?P<revision>[^/]+)": HubRequest.commit,
}
