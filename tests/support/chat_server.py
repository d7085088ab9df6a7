"""A local server with OpenAI's chat interface, which answers as a test says and fails when it is told to."""

import base64
import contextlib
import http.server
import io
import json
import threading

import numpy as np
from PIL import Image


class ChatServer(http.server.ThreadingHTTPServer):
    """Gives `answer(image, text, request)`, a choice; `faults` are given out first, one for each request.

    A fault is a status code, a text in place of an answer, "hang up", or None for an answer after all.
    """

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.faults, self.requests, self.lock = answer, [], [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """A client that does not wait for its answer is what some tests are about."""


@contextlib.contextmanager
def running(answer):
    """A server in a thread."""
    server = ChatServer(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def says(text, top=None):
    """A choice with this text and, with `top`, the log-probabilities of its first token."""
    choice = {"message": {"role": "assistant", "content": text}}
    if top is not None:
        listed = [{"token": token, "logprob": float(np.log(p))} for token, p in top.items()]
        choice["logprobs"] = {
            "content": [{"token": listed[0]["token"], "logprob": 0, "top_logprobs": listed}]
        }
    return choice


class FaultyHandler(http.server.BaseHTTPRequestHandler):
    """Notes each request in `server.requests`, and gives out `server.faults` before it answers."""

    def noted(self, request):
        """What is kept of a request."""
        return request

    def answered(self, request):
        """The text of an answer."""
        raise AssertionError("a handler says what it answers")

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(self.noted(request))
            fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, int):
            self.send_response(fault)
            if fault == 429:
                self.send_header("Retry-After", "0.05")
            self.end_headers()
            self.wfile.write(b"no")
            return
        if fault == "hang up":
            self.close_connection = True
            return
        body = self.answered(request) if fault is None else fault
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


def shown_image(request):
    """The image of a request, as it was sent."""
    url = request["messages"][0]["content"][0]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


class _Handler(FaultyHandler):
    def answered(self, request):
        text = request["messages"][0]["content"][1]["text"]
        image = np.asarray(shown_image(request).convert("RGB"))
        return json.dumps({"choices": [self.server.answer(image, text, request)]})
