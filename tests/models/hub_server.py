"""A hub on this machine: enough of its interface for huggingface_hub to look up and download a model."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub(models: dict[str, dict[str, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """Serve models (name -> file -> content).

    Yields:
        (the address, the requests so far as "METHOD path").
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def log_message(self, *_) -> None:
            """Nothing is printed."""

        def _answer(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(f"{self.command} {path}")
            words = path.strip("/").split("/")
            if words[:2] == ["api", "models"] and (files := models.get("/".join(words[2:4]))) is not None:
                if words[4:5] == ["tree"]:
                    self._send(
                        json.dumps([
                            {
                                "type": "file",
                                "path": name,
                                "size": len(body),
                                "oid": hashlib.sha1(body).hexdigest(),
                            }
                            for name, body in files.items()
                        ]).encode()
                    )
                    return
                config = json.loads(files["config.json"]) if "config.json" in files else {}
                self._send(
                    json.dumps({
                        "id": "/".join(words[2:4]),
                        "sha": COMMIT,
                        "siblings": [{"rfilename": name} for name in files],
                        "config": {"model_type": config.get("model_type")},
                    }).encode()
                )
            elif (
                words[2:3] == ["resolve"]
                and (body := models.get("/".join(words[:2]), {}).get("/".join(words[4:]))) is not None
            ):
                self._send(body)
            else:
                self._send(b"", 404, "EntryNotFound" if "/".join(words[:2]) in models else "RepoNotFound")

        def _send(self, body: bytes, status: int = 200, error: str = "") -> None:
            self.send_response(status)
            for key, value in (
                ("ETag", f'"{hashlib.sha256(body).hexdigest()}"'),
                ("X-Repo-Commit", COMMIT),
                ("Content-Length", str(len(body))),
            ):
                self.send_header(key, value)
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
