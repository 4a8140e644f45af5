"""A Hugging Face Hub on this machine: the few calls that huggingface_hub makes to download a file."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LocalHub:
    """Serves `repositories`, {"owner/name": {revision: {file: bytes}}}, until `close`.

    Attributes:
        url: Its address, for HF_ENDPOINT.
        cut: Bytes after which a download breaks off; None for never.
        stall: The same, but the connection stays open and nothing more comes.
        stalled: Set once that happened.
        requests: What was asked, "GET /owner/name/resolve/main/file".
    """

    def __init__(self, repositories):
        self.repositories = repositories
        self.cut = self.stall = None
        self.stalled, self._closing = threading.Event(), threading.Event()
        self.requests = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_GET(self):
                hub.answer(self, body=True)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request, body):
        self.requests.append(f"{request.command} {request.path}")
        parts = request.path.lstrip("/").split("/", 4)
        owner, name, _, revision, file = parts if len(parts) == 5 else (*parts, *[""] * (5 - len(parts)))
        revisions = self.repositories.get(f"{owner}/{name}")
        headers, content = {}, b""
        if revisions is None:
            headers["X-Error-Code"] = "RepoNotFound"
        elif revision not in revisions:
            headers["X-Error-Code"] = "RevisionNotFound"
        else:
            headers["X-Repo-Commit"] = hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()
            content = revisions[revision].get(file)
            if content is None:
                headers["X-Error-Code"] = "EntryNotFound"
            else:
                headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        found = "X-Error-Code" not in headers
        content = content if found else b""
        start = int(request.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0]) if found and body else 0
        request.send_response(404 if not found else 206 if start else 200)
        for key, value in {**headers, "Content-Length": len(content) - start}.items():
            request.send_header(key, value)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.end_headers()
        if not body:
            return
        limit = self.cut if self.cut is not None else self.stall
        request.wfile.write(content[start : None if limit is None else start + limit])
        if limit is not None and len(content) - start > limit:
            if self.stall is not None:
                request.wfile.flush()
                self.stalled.set()
                self._closing.wait(60)
            request.close_connection = True
