"""A server on this machine that stands in for the Hugging Face hub; the fixture `server` points its client there."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub as hub
import pytest
from huggingface_hub import constants

from loading.hub import SD14

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """Serves the files of one folder as the repository SD14, as the Hugging Face Hub would."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[tuple[str, str, str | None]] = []  # method, file, Range
        self.others: list[str] = []  # what else was asked for
        self.cut: int | None = None  # break off the next long answer after so many bytes
        self.stays_down = True  # and answer 503 from then on

    @property
    def downloads(self) -> list[str]:
        """The files asked for, in order."""
        return [file for method, file, _ in self.requests if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in {"X_Repo_Commit": COMMIT, "Content_Length": 0, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        match = re.fullmatch(rf"/{SD14}/resolve/(?:main|{COMMIT})/(.+)", self.path)
        file, ranges = match[1] if match else self.path, self.headers.get("Range")
        if not match:  # the client looks around on its own account
            self.server.others.append(self.path)
            return self.answer(404)
        self.server.requests.append((self.command, file, ranges))
        if not (self.server.folder / file).is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        if self.server.cut == 0:
            return self.answer(503)
        content = (self.server.folder / file).read_bytes()
        etag, start = f'"{hashlib.sha256(content).hexdigest()}"', 0
        if ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", ranges)[1])
        sizes = {"Content_Length": len(content) - start, "Accept_Ranges": "bytes"}
        self.answer(206 if start else 200, ETag=etag, X_Xet_Hash="0" * 64, X_Xet_Refresh_Route="/xet", **sizes)
        if self.command == "GET":
            content, cut = content[start:], self.server.cut
            if cut and len(content) > cut:
                content, self.close_connection = content[:cut], True
                self.server.cut = 0 if self.server.stays_down else None
            self.wfile.write(content)
        return None


@pytest.fixture
def server(tiny, tmp_path, monkeypatch):
    """A server of the tiny model, an empty cache, and the hub's client pointed at both."""
    server = Server(tiny)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 512)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its own attempts
    yield server
    hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()
