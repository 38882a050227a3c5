"""A model hub on loopback that speaks as much of the protocol as downloads need."""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """
    Attributes:
        repositories: name -> file name -> contents.
        private: names that need the token ``"secret"``; the hub says of them that they are not there.
        gated: names whose terms were not accepted.
        requests: method, path and Range of every request.
        break_after: bytes after which the next download breaks, once.
    """

    def __init__(self):
        self.repositories, self.private, self.gated = {}, set(), set()
        self.requests, self.break_after = [], None

    def downloaded(self):
        """Names of the files whose contents were asked for."""
        return [
            path.rsplit("/", 1)[1]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        ]


@contextlib.contextmanager
def serving_hub():
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def answer(self):
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range")))
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
            if found:
                self.describe(*found.groups())
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.send_file(*found.groups())
            else:
                self.refuse(404, "EntryNotFound")

        def describe(self, name, kind, revision):
            if not self.may(name, revision):
                return
            files = hub.repositories[name]
            if kind == "tree":
                self.send_json([self.entry(*one) for one in files.items()])
            else:
                self.send_json(
                    {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                )

        def entry(self, file, data):
            return {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

        def send_file(self, name, revision, file):
            if not self.may(name, revision):
                return
            data = hub.repositories[name].get(file)
            if data is None:
                self.refuse(404, "EntryNotFound")
                return
            first, last = 0, len(data) - 1
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if asked:
                first, last = int(asked[1]), min(int(asked[2] or last), last)
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(last + 1 - first))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.end_headers()
            if self.command == "GET":
                self.send_data(data[first : last + 1])

        def send_data(self, data):
            if hub.break_after is not None and len(data) > hub.break_after:
                data, hub.break_after = data[: hub.break_after], None
                self.close_connection = True
            self.wfile.write(data)

        def may(self, name, revision):
            token = self.headers.get("Authorization") == "Bearer secret"
            if name not in hub.repositories or (name in hub.private and not token):
                self.refuse(401, "RepoNotFound")
            elif name in hub.gated:
                self.refuse(403, "GatedRepo")
            elif revision not in (None, "main", COMMIT):
                self.refuse(404, "RevisionNotFound")
            else:
                return True
            return False

        def refuse(self, status, code):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send_json(self, value):
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
