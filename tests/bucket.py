"""A bucket of Google Cloud Storage on loopback: what gcsfs and tensorstore speak to in tests."""

import contextlib
import functools
import logging
import re
import threading
from collections.abc import Callable, Iterator
from http.server import HTTPServer
from typing import Any

from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.handlers.objects import _checksums, _make_object_resource
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

for name in ("gcp_storage_emulator", "api.object"):  # it complains of each object that is not there
    logging.getLogger(name).setLevel(logging.CRITICAL)


class Bucket(Storage):
    """gs://bucket, kept in memory by gcp-storage-emulator.

    written: the names of objects, in the order in which they came. environment: by which clients
    find the bucket.
    """

    def __init__(self, port: int) -> None:
        super().__init__(use_memory_fs=True)
        self.written: list[str] = []
        host = f"http://localhost:{port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": host,  # gcsfs, Google's own client
            "TENSORSTORE_GCS_HTTP_URL": host,
            # There are no credentials, and these do not look for any.
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        self._traps: list[tuple[str, Callable[[], None]]] = []
        create_bucket("bucket", self)

    def names(self, below: str = "") -> list[str]:
        """Of the objects whose names begin with `below`, which the names returned lack."""
        names = self.objects.get("bucket", {})
        return sorted(name.removeprefix(below) for name in names if name.startswith(below))

    def read(self, name: str) -> bytes:
        return self.get_file("bucket", name)

    def put(self, name: str, content: bytes) -> None:
        """What another client would send."""
        about = _make_object_resource("", "bucket", name, "", str(len(content)))
        self.create_file("bucket", name, content, _checksums(content, about))

    def flip_a_byte(self, below: str) -> None:
        """In the middle of the largest object whose name begins so."""
        name = max((below + name for name in self.names(below)), key=lambda n: len(self.read(n)))
        content = bytearray(self.read(name))
        content[len(content) // 2] ^= 1
        self.put(name, bytes(content))

    def when_written(self, name: str, do: Callable[[], None]) -> None:
        """Call `do`, once, when an object comes whose name fits the pattern."""
        self._traps.append((name, do))

    def create_file(self, bucket_name: str, file_name: str, *about: Any) -> None:
        for trap in self._traps:
            if re.search(trap[0], file_name):
                self._traps.remove(trap)
                trap[1]()
                break
        super().create_file(bucket_name, file_name, *about)
        self.written.append(file_name)

    def _write_config_to_file(self) -> None:
        """Not at each change, as it would: nothing is to outlive this process."""


class _Handler(RequestHandler):
    def log_message(self, *args: object) -> None:
        pass


class _Server(HTTPServer):
    request_queue_size = 128  # tensorstore sends many requests at once

    def handle_error(self, *args: object) -> None:
        """A client that was killed waits for no answer."""


@contextlib.contextmanager
def served() -> Iterator[Bucket]:
    """A bucket that is there within the block."""
    with _Server(("localhost", 0), _Handler) as server:
        bucket = Bucket(server.server_port)
        server.RequestHandlerClass = functools.partial(_Handler, bucket)  # type: ignore
        thread = threading.Thread(target=server.serve_forever, args=[0.05], daemon=True)
        thread.start()
        try:
            yield bucket
        finally:
            server.shutdown()
            thread.join()
