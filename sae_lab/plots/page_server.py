"""A local server for the feature page, which runs the model on text that somebody types there."""

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import parse_json

ADDRESS = "127.0.0.1"
LARGEST_REQUEST = 2**20
Answer = Callable[[str], dict[str, Any]]


def start_server(folder: Path, answer: Answer, port: int) -> "PageServer":
    """Return a server of index.html and features.json in `folder`; `serve_forever` runs it.

    It listens on this machine only. POST /activations with {"text": ...} returns `answer(text)`, or {"error": ...}. The
    Host of a request must be this server, and its content JSON, which no page of another site may send without asking:
    so only the page itself gets answers.

    Args:
        answer: describes a text. Called by one thread at a time.
        port: 0 takes a free one.

    Raises:
        UserError: the port is in use or not allowed.
    """
    try:
        return PageServer(folder, answer, port)
    except OSError as e:
        raise UserError(
            f"port={port} cannot be used ({e.strerror}): give another one, or port=0 for a free one."
        ) from e


class PageServer(ThreadingHTTPServer):
    """Serves one folder (see `start_server`). Threads, since a browser opens connections that it does not use."""

    daemon_threads = True

    def __init__(self, folder: Path, answer: Answer, port: int):
        super().__init__((ADDRESS, port), Handler)
        self.folder, self.lock, self._answer = folder, Lock(), answer
        self.names = [f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")]

    def answer(self, text: str) -> dict[str, Any]:
        with self.lock:
            return self._answer(text)


class Handler(BaseHTTPRequestHandler):
    server: PageServer
    TYPES = {"index.html": "text/html; charset=utf-8", "features.json": "application/json"}

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].strip("/") or "index.html"
        if not self.is_local() or name not in self.TYPES:
            return self.reply(404, b"not found", "text/plain")
        return self.reply(200, (self.server.folder / name).read_bytes(), self.TYPES[name])

    def do_POST(self) -> None:
        if not self.is_local() or self.path != "/activations":
            return self.reply(404, b"not found", "text/plain")
        code, found = self.answer()
        return self.reply(code, json.dumps(found).encode(), "application/json")

    def answer(self) -> tuple[int, dict[str, Any]]:
        """Return the status and the content of the reply to a text."""
        size = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json" or not size.isdecimal():
            return 415, {"error": 'send {"text": ...} as application/json.'}
        if int(size) > LARGEST_REQUEST:
            return 413, {"error": f"the text takes more than {LARGEST_REQUEST:,} bytes: send a part of it."}
        try:
            text = parse_json(self.rfile.read(int(size))).get("text")
            if not isinstance(text, str):
                raise ValueError("`text` must be a string")
            return 200, self.server.answer(text)
        except (ValueError, UserError) as e:
            return 400, {"error": str(e)}

    def is_local(self) -> bool:
        """Return whether the request names this server: a page of another site may reach it by a name of its own."""
        return self.headers.get("Host") in self.server.names

    def reply(self, code: int, content: bytes, kind: str) -> None:
        self.send_response(code)
        for name, value in (
            ("Content-Type", kind), ("Content-Length", str(len(content))),
            ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store"),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the text is the user's."""
