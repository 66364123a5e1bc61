"""A server on this machine in the place of the Hugging Face hub: the few addresses that
huggingface_hub asks for when it lists and downloads the files of a dataset."""
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Hub:
    """`files`: {path in the repository: bytes}. What it does wrong is set in `cut` (it ends in the
    middle of so many downloads) and `altered` (it changes a byte of so many)."""

    def __init__(self, repo, files):
        self.repo = repo
        self.files = files
        self.commit = "c" * 40
        self.cut = 0
        self.altered = 0
        self.requests = []  # (path, headers)
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self, with_content=True)

            def do_HEAD(self):
                hub.answer(self, with_content=False)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def downloads(self):
        """The files that were sent, in order."""
        return [path.split("/resolve/")[1].split("/", 1)[1] for method, path, _ in self.requests
                if method == "GET" and "/resolve/" in path]

    def answer(self, request, with_content):
        self.requests.append((request.command, request.path, dict(request.headers)))
        path = unquote(request.path.split("?")[0])
        if path == f"/api/datasets/{self.repo}" or path.startswith(
                f"/api/datasets/{self.repo}/revision/"):
            return self.send_json(request, {"id": self.repo, "sha": self.commit, "siblings": []})
        tree = re.fullmatch(f"/api/datasets/{self.repo}/tree/[^/]+(/.*)?", path)
        if tree:
            folder = (tree.group(1) or "").strip("/")
            return self.send_json(request, [entry(name, content)
                                            for name, content in self.files.items()
                                            if name.startswith(folder)])
        file = re.fullmatch(f"/datasets/{self.repo}/resolve/([^/]+)/(.*)", path)
        if file and file.group(1) in (self.commit, "main") and file.group(2) in self.files:
            return self.send_file(request, self.files[file.group(2)], with_content)
        request.send_error(404)

    def send_json(self, request, value):
        content = json.dumps(value).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def send_file(self, request, content, with_content):
        start = 0
        asked = re.match(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if asked:
            start = int(asked.group(1))
        body = content[start:]
        request.send_response(206 if asked else 200)
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        request.send_header("X-Repo-Commit", self.commit)
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(len(body)))
        if asked:
            request.send_header("Content-Range",
                                f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.end_headers()
        if not with_content:
            return
        if self.altered > 0 and len(body) > 100:
            self.altered -= 1
            body = body[:50] + bytes([body[50] ^ 1]) + body[51:]
        if self.cut > 0:
            self.cut -= 1
            body = body[:len(body) // 2]
            request.close_connection = True
        request.wfile.write(body)


def entry(name, content):
    """A file as the hub lists it; only large ones have a SHA-256."""
    row = {"type": "file", "path": name, "size": len(content),
           "oid": hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()}
    if not name.endswith(".json"):
        row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content),
                      "pointerSize": 130}
    return row
