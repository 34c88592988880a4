"""A small OpenAI-compatible server over a real socket."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


class Endpoint(BaseHTTPRequestHandler):
    """Replies with what `say` makes of the text; `status` and `body` stand for all that can go wrong."""

    seen: ClassVar[list] = []
    status, body = 200, None

    def say(self, text):
        raise NotImplementedError

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        chat = self.path.endswith("/chat/completions")
        self.seen.append((self.path, request, self.headers.get("Authorization")))
        said = self.say(request["messages"][0]["content"] if chat else request["prompt"])
        choice = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": said}} if chat else {"text": said, "logprobs": None}
        reply = {"id": "1", "object": "x", "created": 1, "model": request["model"], "choices": [choice]}
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write((json.dumps(reply) if self.body is None else self.body).encode())

    def log_message(self, *_):
        pass


@contextmanager
def serving(kind):
    """The address of a server, and the class that answers, which keeps what it has `seen`."""
    handler = type("Handler", (kind,), {"seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", handler
    server.shutdown()
    server.server_close()
