"""Remote stores: where one file behind a URL lies, what its server says of it, and its bytes by range.

http and https are read with the standard library; every other scheme is fsspec's, and may name a folder too. A store
opens the file that its URL names and nothing else: no neighbour, no redirect to another scheme. Nothing is sent that
the URL or the store's own configuration does not hold.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from converters.errors import CheckpointError, UnknownFormat, UnsafeCheckpoint, printable

__all__ = ["Folder", "State", "Store", "Transient", "find_store", "without_secrets"]

TIMEOUT = 30.0  # seconds without a byte
PROBE = 1 << 16  # bytes of the first request, which asks whether the server reads by ranges
PIECE = 1 << 20
MAX_NAMES = 10_000  # in a folder
ODD = re.compile(r"^\.{0,2}$|[\\:?#\0]")  # a name that would lead elsewhere, or not be read as it is
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
INDIRECT = {  # fsspec's schemes that open local files, or files that another file names
    *("file", "local", "asynclocal", "data", "dir", "git", "reference", "zip", "tar", "libarchive", "dask"),
    *("generic", "cached", "blockcache", "filecache", "simplecache", "async_wrapper", "asyncwrapper"),
}
VERSIONS = ("blob_id", "ETag", "etag", "generation", "mtime", "LastModified", "last_modified", "updated", "created")


class Transient(Exception):
    """What another attempt may mend."""


@dataclass(frozen=True)
class State:
    """What a server says of a file's content; empty, or of an unranged file -1, where it does not say."""

    size: int
    version: str = ""
    sha256: str = ""
    md5: str = ""  # in base64


class Store(Protocol):
    """One remote file."""

    state: State
    by_range: bool  # whether `read` can be called; else `stream`

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, or fewer. Raises Transient, and CheckpointError if the file changed."""

    def stream(self) -> Iterator[bytes]:
        """The whole file."""


@dataclass(frozen=True)
class Folder:
    """A remote folder: the names of what lies in it."""

    files: frozenset[str]
    folders: frozenset[str]


def without_secrets(url: str) -> str:
    """A URL as it may be shown: without user and password, query and fragment.

    >>> without_secrets("https://me:password@host/a/model.pth?token=secret")
    'https://host/a/model.pth'
    """
    scheme, _, rest = re.split(r"[?#]", url, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme.lower()}://{host.rpartition('@')[2]}{slash}{path}"


def find_store(url: str) -> Store | Folder:
    """What a URL names, asked once. Raises CheckpointError and Transient."""
    shown = without_secrets(url)
    scheme = shown.partition("://")[0]
    if scheme in ("http", "https"):
        return _HttpStore(url, shown)
    if scheme in ("file", "local"):
        raise CheckpointError("is a local file", file=shown, cure="give its path, without the scheme")
    if scheme in INDIRECT or "::" in url:
        raise UnsafeCheckpoint("names files through other files, which is not followed", file=shown)
    store = _FsspecStore(url, shown)
    return store.list() if store.is_folder else store


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) only, and never from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        scheme = urlsplit(newurl).scheme
        if scheme != "https" and not (scheme == "http" and req.type == "http"):
            raise UnsafeCheckpoint(
                f"redirects to another scheme ({printable(scheme, 20)}), which is not followed",
                file=without_secrets(req.full_url),
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _HttpStore:
    """A file of a web server."""

    def __init__(self, url: str, shown: str) -> None:
        self._url, self._shown = quote(url.partition("#")[0], safe="%/:=&?~+!$,;'@()*[]"), shown
        if "@" in urlsplit(url).netloc:
            raise CheckpointError("has a password in it, which is not sent", file=shown, cure="fetch it by other means")
        self._opener = urllib.request.OpenerDirector()  # without the handlers of file:, ftp: and data:
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            _Redirects(),
        ):
            self._opener.add_handler(handler)
        with self._get(0, PROBE) as answer:
            self.by_range = answer.status == 206
            self.state = self._state_of(answer)

    def read(self, start: int, end: int) -> bytes:
        with self._get(start, end) as answer:
            if answer.status != 206 or self._state_of(answer) != self.state:
                raise _changed(self._shown)
            if not answer.headers["Content-Range"].startswith(f"bytes {start}-"):
                raise CheckpointError("comes in other ranges than asked for", file=self._shown)
            return answer.read(end - start)

    def stream(self) -> Iterator[bytes]:
        with self._get() as answer:
            if self._state_of(answer) != self.state:
                raise _changed(self._shown)
            while piece := answer.read(PIECE):
                yield piece

    @contextmanager
    def _get(self, start: int = 0, end: int = 0) -> Iterator[Any]:
        headers = {"User-Agent": "timmport", "Accept-Encoding": "identity"}
        if end:
            headers["Range"] = f"bytes={start}-{end - 1}"
        try:
            request = urllib.request.Request(self._url, headers=headers)
            with self._opener.open(request, timeout=TIMEOUT) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            error.close()
            raise _refusal(error.code, self._shown) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, (socket.gaierror, ssl.SSLError)):
                what = "has a host that is not found" if isinstance(error.reason, socket.gaierror) else "fails TLS"
                raise CheckpointError(what, file=self._shown, cure="is the address right?") from error
            raise _transient(error.reason) from error
        except (http.client.InvalidURL, UnicodeError, ValueError) as error:
            raise CheckpointError("is no address", file=self._shown) from error
        except (OSError, http.client.HTTPException) as error:
            raise _transient(error) from error

    def _state_of(self, answer: http.client.HTTPResponse) -> State:
        if answer.headers.get_content_type() == "text/html":
            cure = "give the address of the file itself (on a hub /resolve/, not /blob/)"
            raise UnknownFormat("is an HTML page, not a checkpoint", file=self._shown, cure=cure)
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise CheckpointError("comes compressed by the server", file=self._shown, cure="fetch it by other means")
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        size = answer.headers.get("Content-Length") or ""
        if answer.status == 206:
            match = re.fullmatch(r"bytes \d+-\d+/(\d{1,18})", answer.headers.get("Content-Range", ""))
            if not match:
                raise CheckpointError("does not say how large it is", file=self._shown)
            size = match[1]
        return State(int(size) if re.fullmatch(r"\d{1,18}", size) else -1, version)


class _FsspecStore:
    """A file of a file system of fsspec."""

    by_range = True

    def __init__(self, url: str, shown: str) -> None:
        self._shown, self._scheme = shown, shown.partition("://")[0]
        with self._faults():
            import fsspec.core

            try:
                self._fs, self._path = fsspec.core.url_to_fs(url)
            except ImportError as error:
                package = PACKAGES.get(self._scheme)
                cure = f"pip install {package}" if package else printable(str(error).splitlines()[0], 100)
                raise CheckpointError(f"{self._scheme}:// needs a package", file=shown, cure=cure) from error
            except ValueError as error:
                if "rotocol" not in str(error):
                    raise
                problem = f"{self._scheme}:// is a scheme that nothing here reads"
                raise CheckpointError(problem, file=shown, cure="use hf, https, s3, gs or a path") from error
        self.is_folder = False
        self.state = self._look()

    def list(self) -> Folder:
        """What a folder holds under plain names."""
        with self._faults():
            found = self._fs.ls(self._path, detail=True)
        if len(found) > MAX_NAMES:
            raise UnsafeCheckpoint(f"holds more than {MAX_NAMES} files", file=self._shown)
        kinds = {entry["name"].rstrip("/").rpartition("/")[2]: entry["type"] for entry in found}
        plain = {name: kind for name, kind in kinds.items() if not ODD.search(name)}
        files, folders = ({name for name in plain if plain[name] == kind} for kind in ("file", "directory"))
        return Folder(frozenset(files), frozenset(folders))

    def read(self, start: int, end: int) -> bytes:
        with self._faults():
            if self._fs.async_impl:
                data = self._fs.cat_file(self._path, start=start, end=end)
            else:  # whose cat_file would read ahead
                known = {"size": self.state.size} if self._scheme == "hf" else {}  # or it lists the folder
                with self._fs.open(self._path, "rb", cache_type="none", **known) as file:
                    file.seek(start)
                    data = file.read(end - start)
        if self._look() != self.state:
            raise _changed(self._shown)
        return data

    def stream(self) -> Iterator[bytes]:
        raise AssertionError("a store that reads by ranges")

    def _look(self) -> State:
        with self._faults():
            if self._scheme == "hf":
                is_inside = self._path.strip("/").count("/") > 1  # of a repository: all its commits would be listed
                info: Mapping[str, Any] = self._fs.info(self._path, refresh=True, expand_info=is_inside)
            else:
                self._fs.invalidate_cache()
                info = self._fs.info(self._path)
        if info.get("type") == "directory":
            self.is_folder = True
            return State(-1)
        if info.get("size") is None:
            raise CheckpointError("does not say how large it is", file=self._shown, cure="fetch it by other means")
        version = next((str(info[name]) for name in VERSIONS if info.get(name)), "")
        sha256 = (info.get("lfs") or {}).get("sha256") or ""
        return State(int(info["size"]), version, sha256, info.get("md5Hash") or "")

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Errors of drivers, which share no class, as our own."""
        try:
            yield
        except CheckpointError:
            raise
        except FileNotFoundError as error:
            raise _refusal(404, self._shown) from error
        except PermissionError as error:
            raise _refusal(403, self._shown) from error
        except Exception as error:
            response = getattr(error, "response", None)
            code = getattr(response, "status_code", None) or getattr(error, "status", None)
            if isinstance(code, int) and code >= 400:
                raise _refusal(code, self._shown) from error
            if type(error).__name__ in ("NoCredentialsError", "DefaultCredentialsError"):
                raise _refusal(401, self._shown) from error
            if isinstance(error, OSError) or re.search("Connect|Timeout|Network|Protocol", type(error).__name__):
                raise _transient(error) from error
            said = re.sub(r"\?\S*", "", f"{error}\n".splitlines()[0])
            problem = f"cannot be read: {printable(said, 120) or type(error).__name__}"
            raise CheckpointError(problem, file=self._shown, cure="is the address right?") from error


def _refusal(code: int, shown: str) -> Exception:
    if code == 429 or code >= 500:
        return Transient("the server asks to wait (429)" if code == 429 else f"the server fails ({code})")
    if code in (401, 403):
        cure = "log in first (`hf auth login`; the Hub's private files are reached by hf:// only)"
        cure = cure if shown.startswith("hf:") or "huggingface.co/" in shown else "are your credentials right?"
        return CheckpointError(f"may not be read ({code})", file=shown, cure=cure)
    if code in (404, 410):
        return CheckpointError(f"does not exist ({code})", file=shown, cure="is the address right?")
    if code == 416:
        return CheckpointError("is empty, or shorter than it was (416)", file=shown)
    if 300 <= code < 400:
        return UnsafeCheckpoint(f"redirects to where nothing is followed ({code})", file=shown)
    return CheckpointError(f"is refused by its server ({code})", file=shown)


def _transient(error: object) -> Transient:
    late = isinstance(error, TimeoutError) or "timed out" in str(error).lower() or "Timeout" in type(error).__name__
    return Transient("the server does not answer in time" if late else "the connection broke")


def _changed(shown: str) -> CheckpointError:
    return CheckpointError("was changed on its server while it was read", file=shown, cure="run again")
