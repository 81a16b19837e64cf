"""Weights from a URL or the Hugging Face hub: fetched once, checked, kept, and gone on with after an interruption.

A file's sha256 is compared with the trusted one where one is known: in the table of presets, or given by the caller as
`#sha256=...` at the end of the name. Otherwise the one of the first use is recorded, and every later use must equal it.
What is kept lies in `$CROSSVIT_CACHE`, or `crossvit` in the user's cache folder:

    sha256.json                             name -> sha256 of its first use
    hub/OWNER--NAME@REVISION/FILE           files of the hub; a file put there by hand is taken as fetched
    urls/DIGEST-FILE                        files of other addresses

The hub is the one `HF_ENDPOINT` names, with the token of `huggingface-cli login`; its own cache is read too, and
`HF_HUB_OFFLINE=1` keeps away from the network. What is fetched, and whom it waits for, is said on standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

from crossvit.cache import cache_folder
from crossvit.errors import UsageError, WeightsError
from crossvit.files import write_atomically
from crossvit.model.presets import ALIASES, PRESETS, Preset
from crossvit.weights.sniff import kind_of

HUB_FILE = "model.safetensors"
HUB_DESCRIPTION = "config.json"  # of a timm repository: what the model is and its class names; not every one has it
TIMEOUT = 10.0  # seconds until a server that says nothing is given up
SLOW = 0.5  # seconds after which it is said which server is waited for
TRIES = 4  # in a row that bring no byte, after which a download is given up
PAUSE = 1.0  # seconds between two tries
CHUNK = 1 << 18  # bytes; at most this much is lost by an interruption
_REPOSITORY = re.compile(
    r"(?:hf-hub:)?(?P<repository>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?"
)


@dataclasses.dataclass(frozen=True)
class Remote:
    """One file elsewhere. name: its key in sha256.json and in messages.  kept: where it lies once it is fetched.
    sha256: the trusted digest, if there is one.  on_hub: whether the hub's token and metadata go with it."""

    name: str
    url: str
    kept: Path
    sha256: str | None = None
    on_hub: bool = False


def locate(source: str | Path) -> Path:
    """The local file or folder meant by `source`, fetched if it is elsewhere. In this order:

    a path that exists;  `https://...`;  a released model's name (timm's file for timm's name, the authors' for theirs);
    `owner/name[@revision]` on the hub (`hf-hub:` may stand before it).  `#sha256=...` may stand behind all but the first.

    UsageError if it is none of them; WeightsError if it cannot be fetched or is not what it should be.
    """
    try:
        path = Path(source).expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{str(source)[:100]} cannot be a path ({_reason(error)})") from None
    if there or isinstance(source, Path):
        return path
    try:
        return _fetched(source, path)
    except OSError as error:
        raise WeightsError(
            f"the cache {cache_folder()} cannot be used ({error.strerror or error}): set CROSSVIT_CACHE to a folder of yours"
        ) from error


def _fetched(source: str, path: Path) -> Path:
    """`locate` for what is not here."""
    name, mark, digest = source.partition("#")
    sha256 = digest.removeprefix("sha256=").lower() if mark else None
    if sha256 is not None and not (
        digest.startswith("sha256=") and re.fullmatch(r"[0-9a-f]{64}", sha256)
    ):
        raise UsageError(f"{source}: behind # stands sha256= and 64 hexadecimal digits")
    if name.startswith(("https://", "http://")):
        return _fetch(_of_url(name, sha256))
    preset = PRESETS.get(ALIASES.get(name, name))
    if preset is not None and name == preset.alias:
        return _fetch(_of_url(preset.url, sha256))
    if preset is not None and preset.released:
        name = preset.hub
    elif preset is not None:
        raise UsageError(
            f"no weights of {name} were released: give a file, a run, or leave --weights out to start anew"
        )
    match = _REPOSITORY.fullmatch(name)
    if match is None or name.endswith((".pth", ".pt", ".bin", ".safetensors", "/")):
        kinds = "a run folder, a .safetensors or .pth file, an https:// address, or owner/name on the hub"
        raise UsageError(f"no weights at {path}: give {kinds}")
    return _from_hub(match["repository"], match["revision"] or "main", sha256)


def _of_url(url: str, sha256: str | None) -> Remote:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UsageError(f"{url} is not an address ({error})") from None
    if (
        parts.scheme == "http"
        and sha256 is None
        and parts.hostname not in ("localhost", "127.0.0.1", "::1")
    ):
        raise UsageError(
            f"{url} is not encrypted: use https://, or add #sha256=... of the file you expect"
        )
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return Remote(
        url,
        url,
        cache_folder() / "urls" / f"{digest}-{Path(parts.path).name or 'weights.pth'}",
        sha256,
    )


def _from_hub(repository: str, revision: str, sha256: str | None) -> Path:
    from huggingface_hub import hf_hub_url, try_to_load_from_cache

    folder = (
        cache_folder() / "hub" / f"{repository.replace('/', '--')}@{revision.replace('/', '--')}"
    )

    def remote(file: str, sha256: str | None = None) -> Remote:
        endpoint = os.environ.get("HF_ENDPOINT") or None
        url = hf_hub_url(repository, file, revision=revision, endpoint=endpoint)
        name = f"{repository}@{revision}" if file == HUB_FILE else f"{repository}@{revision}/{file}"
        return Remote(name, url, folder / file, sha256, on_hub=True)

    weights = remote(HUB_FILE, sha256 or _pinned(repository, revision))
    shared = try_to_load_from_cache(repository, HUB_FILE, revision=revision)
    if isinstance(shared, str) and not weights.kept.is_file():
        _check(weights, Path(shared))
        return Path(shared)
    if not weights.kept.is_file():
        _fetch(remote(HUB_DESCRIPTION), optional=True)
    return _fetch(weights)


def _pinned(repository: str, revision: str) -> str | None:
    presets: list[Preset] = [
        preset for preset in PRESETS.values() if preset.released and preset.hub == repository
    ]
    return presets[0].sha256 if presets and revision == "main" else None


def _fetch(remote: Remote, *, optional: bool = False) -> Path:
    """The kept file of `remote`, fetched if it is not there, and checked. `optional`: one that does not exist is fine."""
    if remote.kept.is_file():  # nothing is written, so that a cache that is only read will do
        _check(remote, remote.kept)
        return remote.kept
    remote.kept.parent.mkdir(parents=True, exist_ok=True)
    with _waiting_lock(remote.kept.with_name(f".{remote.kept.name}.lock")):
        if remote.kept.is_file():
            _check(remote, remote.kept)
            return remote.kept
        partial, announced = _download(remote, optional=optional)
        if partial is None:
            return remote.kept
        try:
            _check(remote, partial, announced=announced)
        except WeightsError:
            partial.unlink()
            raise
        partial.replace(remote.kept)
        return remote.kept


def _download(remote: Remote, *, optional: bool) -> tuple[Path | None, str | None]:
    """(the file with all bytes, the sha256 the hub announces for it). Bytes of an earlier try are kept and added to, as
    long as the server says that it is the same file."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise WeightsError(_unreachable(remote, "HF_HUB_OFFLINE is set"))
    try:
        with _said_if_slow(
            f"waiting for {urlsplit(remote.url).netloc}, {TIMEOUT:.0f} seconds at most"
        ):
            url, headers, etag, size = _ask(remote)
    except Exception as error:  # whatever a network and a client library can fail with
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404) and optional:
            return None, None
        if status in (401, 404):
            raise UsageError(_unknown(remote)) from error
        raise WeightsError(_unreachable(remote, _reason(error))) from error
    mark = hashlib.sha256((etag or "").encode()).hexdigest()[:12]
    partial = remote.kept.with_name(f"{remote.kept.name}.{mark}.partial")
    for other in remote.kept.parent.glob(f"{remote.kept.name}.*.partial"):
        if other != partial or etag is None:
            other.unlink()  # bytes of another version of the file
    if not optional:
        _tell(f"fetching {remote.url}" + (f" ({size / 1e6:.1f} MB)" if size else ""))
    with _interruption(remote, partial, size):
        _complete(partial, url, headers, size=size, name=remote.name.split("@")[0])
    return partial, etag if etag and re.fullmatch(r"[0-9a-f]{64}", etag) else None


def _complete(
    partial: Path, url: str, headers: dict[str, str], *, size: int | None, name: str
) -> None:
    """Add what `partial` lacks of the file at `url`, trying again as long as bytes arrive."""
    tries = 0
    partial.touch()
    while tries < TRIES:
        before = partial.stat().st_size
        try:
            _add(partial, url, headers, size=size, name=name)
        except Exception as error:
            tries = 1 if partial.stat().st_size > before else tries + 1
            if getattr(error, "response", None) is not None or tries == TRIES:
                raise
            _tell(f"no more bytes of {name} ({_reason(error)}): trying again")
            time.sleep(PAUSE)
        else:
            return


def _add(partial: Path, url: str, headers: dict[str, str], *, size: int | None, name: str) -> None:
    from huggingface_hub import get_session
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # as above

    start = partial.stat().st_size
    if size is not None and start == size:
        return
    asked = {**headers, "Accept-Encoding": "identity"} | (
        {"Range": f"bytes={start}-"} if start else {}
    )
    with get_session().stream(
        "GET", url, headers=asked, follow_redirects=True, timeout=TIMEOUT
    ) as answer:
        answer.raise_for_status()
        going_on = answer.status_code == HTTPStatus.PARTIAL_CONTENT
        bar = tqdm(  # type: ignore[no-untyped-call]
            total=size,
            initial=start * going_on,
            desc=name,
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        )
        with partial.open("ab" if going_on else "wb") as file, bar:
            for chunk in answer.iter_bytes(CHUNK):
                file.write(chunk)
                file.flush()
                bar.update(len(chunk))
    if size is not None and partial.stat().st_size < size:
        raise ConnectionError("the server ended too early")


def _ask(remote: Remote) -> tuple[str, dict[str, str], str | None, int | None]:
    """(address of the bytes, headers to ask for them with, etag, size) by a HEAD request."""
    from huggingface_hub import get_hf_file_metadata, get_session
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported when it is asked for

    if remote.on_hub:
        about = get_hf_file_metadata(
            remote.url, timeout=TIMEOUT, endpoint=os.environ.get("HF_ENDPOINT") or None
        )
        home = (
            urlsplit(about.location).netloc == urlsplit(remote.url).netloc
        )  # the token is for the hub's own host
        return (
            about.location,
            build_hf_headers() if home else build_hf_headers(token=False),
            about.etag,
            about.size,
        )
    answer = get_session().head(remote.url, follow_redirects=True, timeout=TIMEOUT)
    if answer.status_code in (
        HTTPStatus.FORBIDDEN,
        HTTPStatus.METHOD_NOT_ALLOWED,
        HTTPStatus.NOT_IMPLEMENTED,
    ):
        return remote.url, {}, None, None  # it may answer GET all the same, as signed addresses do
    answer.raise_for_status()
    size = answer.headers.get("Content-Length")
    return remote.url, {}, answer.headers.get("ETag"), int(size) if size else None


def in_hubs_cache(repository: str, files: Sequence[str], *, revision: str = "main") -> bool:
    """Whether the hub's own cache has one of `files` of `repository`."""
    from huggingface_hub import try_to_load_from_cache

    return any(
        isinstance(try_to_load_from_cache(repository, file, revision=revision), str)
        for file in files
    )


def hub_address(repository: str) -> str:
    """Of the repository's page, on the hub that HF_ENDPOINT names."""
    from huggingface_hub import constants

    return f"{(os.environ.get('HF_ENDPOINT') or constants.ENDPOINT).rstrip('/')}/{repository}"


def knock(url: str) -> None:
    """Ask a server once; any answer will do. Raises what its client raises where none comes within TIMEOUT seconds: for those
    who would leave the asking to a library that does it again and again, for the better part of a minute, in silence."""
    from huggingface_hub import get_session

    get_session().head(url, timeout=TIMEOUT)


@contextlib.contextmanager
def _said_if_slow(line: str) -> Iterator[None]:
    """What takes longer than SLOW seconds inside is accounted for by `line`; a wrong name is refused before that."""
    timer = threading.Timer(SLOW, _tell, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _interruption(remote: Remote, partial: Path, size: int | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a network and a client library can fail with
        got = partial.stat().st_size
        of = f" of {size / 1e6:.1f}" if size else ""
        if size and got > size:
            partial.unlink()  # the server sent more than the file has: nothing to go on from
        raise WeightsError(
            f"the download of {remote.name} stopped after {got / 1e6:.1f}{of} MB ({_reason(error)}): "
            "run the same command again to go on from there"
        ) from error


def _check(remote: Remote, file: Path, *, announced: str | None = None) -> None:
    """WeightsError if `file` is not what it should be; the first digest of a file nobody vouches for is recorded."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    record = cache_folder() / "sha256.json"
    first = _recorded(record).get(remote.name)
    known = (
        (remote.sha256, "is trusted"),
        (
            first,
            f"was recorded at its first use in {record} (remove its line there to trust the new file)",
        ),
        (announced, "the hub announced"),
    )
    expected, who = next(((sha256, who) for sha256, who in known if sha256), (digest, ""))
    if digest != expected:
        where = (
            f"remove {file} and run again"
            if file == remote.kept
            else "run again, or ask where the file comes from"
        )
        raise WeightsError(
            f"{remote.name} is not the file it should be: its sha256 is {digest}, {expected} {who}; {where}"
        )
    if first is None:
        if file.name != HUB_DESCRIPTION and not remote.name.endswith(HUB_DESCRIPTION):
            kind_of(
                file, name=remote.name
            )  # a login page is not recorded as the file of the first use
        record.parent.mkdir(parents=True, exist_ok=True)
        with _waiting_lock(record.with_name(".sha256.json.lock")):
            recorded = _recorded(record) | {remote.name: digest}
            write_atomically(record, f"{json.dumps(recorded, indent=1, sort_keys=True)}\n".encode())


def _waiting_lock(path: Path) -> AbstractContextManager[object]:
    """One process at a time. The library is loaded here: it loads asyncio, which files that are here already do without."""
    from filelock import FileLock

    return FileLock(path)


def _recorded(record: Path) -> dict[str, str]:
    if not record.is_file():
        return {}
    try:
        return {
            str(name): str(digest)
            for name, digest in json.loads(record.read_text(encoding="utf-8")).items()
        }
    except (ValueError, AttributeError) as error:
        raise WeightsError(
            f"{record} is damaged ({error}): remove it to record digests anew"
        ) from None


def _unknown(remote: Remote) -> str:
    if not remote.on_hub:
        return f"there is nothing at {remote.url}"
    name = remote.name.split("@")[0]
    return f"no file or folder {name} here, and {remote.url} is not there, or not for you (`huggingface-cli login`)"


def _unreachable(remote: Remote, reason: str) -> str:
    url, kept, here = remote.url, remote.kept, ""
    if remote.on_hub:
        url, kept = f"{url.rpartition('/')[0]}/{HUB_FILE}", kept.with_name(HUB_FILE)
        here = f"no file or folder {remote.name.split('@')[0]} here, and "
    return (
        f"{here}{url} cannot be reached ({reason}): where there is a network, fetch that file and put it at {kept}, "
        "or give its path in place of the name"
    )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".:")
