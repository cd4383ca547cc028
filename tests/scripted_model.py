"""A model that says what a script tells it to, in OpenAI's chat completions, on 127.0.0.1.

What it answers follows from the question alone: the n-th step, when the conversation that it is shown holds n answers
of its own. So a question that is asked again, because a connection broke, gets the same answer, and no step is skipped.

    python -m tests.scripted_model SCRIPT.json      # prints its port; ends with its stdin

A script is a list of steps: `{"say": "text"}`, or `{"call": "tool", "with": {…}}`. After its last step it says "Done.".
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Step = dict[str, Any]


class ScriptedModel:
    """Serves until `close`. `questions` holds each question that came with tools, as it came.

    Args:
        on_question: called with a step's number before it is given, in the thread of its request; it may wait.
    """

    def __init__(self, script: list[Step], on_question: Callable[[int], object] = lambda position: None) -> None:
        self.script = script
        self._on_question = on_question
        self.questions: list[dict[str, Any]] = []
        model = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                body = json.dumps(model.answer(question)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """The whole answer to one request."""
        if not question.get("tools"):  # such as the one for a conversation's title
            return _completion({"role": "assistant", "content": "A scripted conversation"}, "stop")
        self.questions.append(question)
        position = sum(message["role"] == "assistant" for message in question["messages"])
        self._on_question(position)
        step = self.script[position] if position < len(self.script) else {"say": "Done."}
        if "say" in step:
            return _completion({"role": "assistant", "content": step["say"]}, "stop")
        function = {"name": step["call"], "arguments": json.dumps(step["with"])}
        call = {"id": f"call_{position}", "type": "function", "function": function}
        return _completion({"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls")


def _completion(message: dict[str, Any], reason: str) -> dict[str, Any]:
    """Source: OpenAI's API reference, the chat completion object."""
    return {
        "id": "chatcmpl-scripted",
        "object": "chat.completion",
        "created": 0,
        "model": "scripted",
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


def main() -> None:
    model = ScriptedModel(json.loads(Path(sys.argv[1]).read_text()))
    print(model.port, flush=True)
    sys.stdin.read()
    model.close()


if __name__ == "__main__":
    main()
