"""A bucket server on loopback that speaks both APIs of Google Cloud Storage, as published.

Arrow uses the JSON API (resumable uploads, downloads, listings, deletions), Lance the XML API
(whole and multipart uploads, ranges, copies, preconditions). Objects are in memory.
"""

import itertools
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from urllib.request import Request, urlopen
from xml.sax.saxutils import escape


@dataclass(frozen=True)
class Object:
    """Its bytes, its generation (a new one whenever it is written) and when it was written."""

    data: bytes
    generation: int
    time: float


@dataclass
class Bucket:
    """The objects by name, and uploads under way by id: their name and parts by number."""

    objects: dict[str, Object] = field(default_factory=dict)
    uploads: dict[str, tuple[str, dict[int, bytes]]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def put(self, name: str, data: bytes, wanted: str | None = None) -> Object | None:
        """Write an object; None where its generation (0: there is none) is not the one wanted."""
        with self.lock:
            known = self.objects.get(name)
            if wanted is not None and int(wanted) != (known.generation if known else 0):
                return None
            self.objects[name] = Object(data, next(self.numbers), time.time())
            return self.objects[name]

    def begin(self, name: str) -> str:
        """The id of a new upload."""
        with self.lock:
            number = f"upload-{next(self.numbers)}"
            self.uploads[number] = name, {}
            return number

    def below(self, prefix: str, delimiter: str) -> tuple[list[str], list[str]]:
        """Names that begin so, and the common beginnings of those with another delimiter behind."""
        with self.lock:
            names = sorted(name for name in self.objects if name.startswith(prefix))
        if not delimiter:
            return names, []
        here = [name for name in names if delimiter not in name[len(prefix) :]]
        folders = {
            prefix + name[len(prefix) :].partition(delimiter)[0] + delimiter
            for name in names
            if delimiter in name[len(prefix) :]
        }
        return here, sorted(folders)


class Handler(BaseHTTPRequestHandler):
    """One request; the server knows its buckets by name."""

    protocol_version = "HTTP/1.1"
    buckets: dict[str, Bucket]
    name: str
    bucket: Bucket

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        body = self._body()
        if parts.path == "/storage/v1/b":
            self.buckets[json.loads(body)["name"]] = Bucket()
            self._answer(200, body)
            return
        for pattern, api in APIS.items():
            if found := re.fullmatch(pattern, parts.path):
                self.name = unquote(found["bucket"])
                if self.name not in self.buckets:
                    self._answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
                    return
                self.bucket = self.buckets[self.name]
                api(self, unquote(found["name"] or ""), query, body)
                return

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815

    def _json(self, name: str, query: dict[str, str], _body: bytes) -> None:
        bucket = self.bucket
        if not name:
            here, folders = bucket.below(query.get("prefix", ""), query.get("delimiter", ""))
            found = {"items": [self._resource(n) for n in here], "prefixes": folders}
            self._answer(200, json.dumps(found).encode())
        elif name not in bucket.objects:
            self._answer(404, b'{"error": {"code": 404, "message": "Not Found"}}')
        elif self.command == "DELETE":
            del bucket.objects[name]
            self._answer(204)
        elif query.get("alt") == "media":
            self._content(bucket.objects[name])
        else:
            self._answer(200, json.dumps(self._resource(name)).encode())

    def _resource(self, name: str) -> dict[str, str]:
        held = self.bucket.objects[name]
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(held.time))
        return {
            **{"kind": "storage#object", "bucket": self.name, "name": name, "updated": when},
            **{"timeCreated": when, "size": str(len(held.data))},
            **{"generation": str(held.generation), "metageneration": "1"},
        }

    def _upload(self, _name: str, query: dict[str, str], body: bytes) -> None:
        bucket = self.bucket
        if self.command == "POST":
            name = query.get("name") or json.loads(body)["name"]
            number = bucket.begin(name)
            self._answer(200, Location=f"{self._address()}{self.path}&upload_id={number}")
            return
        name, parts = bucket.uploads[query["upload_id"]]
        sent, _, total = self.headers["Content-Range"].removeprefix("bytes ").partition("/")
        if sent != "*":
            parts[int(sent.partition("-")[0])] = body
        data = b"".join(parts[start] for start in sorted(parts))
        if total != "*" and len(data) == int(total):
            bucket.put(name, data)
            self._answer(200, json.dumps(self._resource(name)).encode())
        else:
            self._answer(308, Range=f"bytes=0-{len(data) - 1}")

    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _xml(self, name: str, query: dict[str, str], body: bytes) -> None:
        bucket = self.bucket
        if not name:
            self._list(query)
        elif "uploads" in query:
            number = bucket.begin(name)
            self._answer(200, f"<R><UploadId>{number}</UploadId></R>".encode())
        elif "partNumber" in query:
            bucket.uploads[query["uploadId"]][1][int(query["partNumber"])] = body
            self._answer(200, ETag=f'"part-{query["partNumber"]}"')
        elif "uploadId" in query:
            _, parts = bucket.uploads.pop(query["uploadId"])
            if self.command == "DELETE":
                self._answer(204)
                return
            self._put(name, b"".join(parts[number] for number in sorted(parts)))
        elif self.command == "PUT":
            source = self.headers.get("x-goog-copy-source")
            if source is None:
                self._put(name, body)
                return
            held = bucket.objects.get(unquote(source).lstrip("/").removeprefix(f"{self.name}/"))
            if held is None:
                self._answer(404)
            else:
                self._put(name, held.data)
        elif name not in bucket.objects:
            self._answer(404)
        elif self.command == "DELETE":
            del bucket.objects[name]
            self._answer(204)
        else:
            self._content(bucket.objects[name])

    def _put(self, name: str, data: bytes) -> None:
        made = self.bucket.put(name, data, self.headers.get("x-goog-if-generation-match"))
        if made is None:
            self._answer(412)
            return
        tag = f'"{made.generation}"'
        answer = f"<R><ETag>{escape(tag)}</ETag></R>".encode()
        self._answer(200, answer, ETag=tag, x_goog_generation=str(made.generation))

    def _list(self, query: dict[str, str]) -> None:
        here, folders = self.bucket.below(query.get("prefix", ""), query.get("delimiter", ""))
        after = query.get("start-after", "")
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(held.data)}</Size>"
            f"<ETag>&quot;{held.generation}&quot;</ETag><LastModified>"
            f"{time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime(held.time))}"
            "</LastModified></Contents>"
            for name in here
            if name > after and (held := self.bucket.objects.get(name))
        )
        entries += "".join(
            f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
            for folder in folders
        )
        self._answer(200, f"<ListBucketResult>{entries}</ListBucketResult>".encode())

    def _content(self, held: Object) -> None:
        headers = {
            "ETag": f'"{held.generation}"',
            "Last_Modified": formatdate(held.time, usegmt=True),
            "x_goog_generation": str(held.generation),
        }
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if not wanted:
            self._answer(200, held.data, **headers)
            return
        total = len(held.data)
        first, _, last = wanted.partition("-")
        start = int(first) if first else max(0, total - int(last))
        end = min(int(last) + 1, total) if first and last else total
        headers["Content_Range"] = f"bytes {start}-{end - 1}/{total}"
        self._answer(206, held.data[start:end], **headers)


BUCKET = r"/(?P<bucket>[^/]+)"
APIS = {
    rf"/storage/v1/b{BUCKET}/o(/(?P<name>.*))?": Handler._json,
    rf"/upload/storage/v1/b{BUCKET}/o(/(?P<name>.*))?": Handler._upload,
    rf"{BUCKET}(/(?P<name>.*))?": Handler._xml,
}


@contextmanager
def gcs_server(folder: Path) -> Iterator[dict[str, str]]:
    """Run the server; yields the environment in which Arrow and Lance use it.

    folder: where the key file of a service account is put that needs no login.
    """
    handler = type("Handler", (Handler,), {"buckets": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    account = folder / "account.json"
    no_key = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    account.write_text(json.dumps({"disable_oauth": True} | no_key))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {
            "GOOGLE_BASE_URL": address,
            "GOOGLE_SKIP_SIGNATURE": "true",
            "GOOGLE_SERVICE_ACCOUNT": str(account),
            "GOOGLE_ALLOW_HTTP": "true",
        }
    finally:
        server.shutdown()
        server.server_close()


def create_bucket(name: str) -> None:
    """A new bucket at the server of the environment."""
    address = f"{os.environ['GOOGLE_BASE_URL']}/storage/v1/b"
    urlopen(Request(address, json.dumps({"name": name}).encode())).close()
