"""Files are written whole, listed, read by ranges and deleted, on a disk as in a store."""

import errno
import os
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug import Response

from mnistsum_ray.errors import (
    ConflictError,
    MissingFileError,
    NoAnswerError,
    RequestError,
    StorageError,
    TryAgainError,
)
from mnistsum_ray.storage import bucket as buckets
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import arrow_place, locate, locate_existing
from tests.storage.conftest import serve_s3, serving


def names(folder: Location) -> list[str]:
    return [file.path.removeprefix(folder.path).lstrip("/") for file in folder.files()]


def test_what_is_written_is_there_whole_also_from_another_process(bucket: Location) -> None:
    folder = bucket / "a folder"
    odd = folder / "100% é #1/a b;c=[d]*~'+&"
    assert (folder.exists(), folder.files(), odd.file_entry()) == (False, [], None)
    odd.write(b"1")
    odd.write(pa.py_buffer(b"second"))
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        assert process.submit(odd.read_bytes).result() == b"second"
        process.submit((folder / "b" / "c").create, {"x": 1}).result()
    with pytest.raises(ConflictError):
        (folder / "b" / "c").create({"x": 2})
    assert (folder / "b" / "c").read_json() == {"x": 1}
    assert folder.is_folder()
    assert folder.file_entry() is None
    assert not (folder / "b" / "c").is_folder()
    assert [file.path for file in folder.files()] == [odd.path, (folder / "b" / "c").path]
    assert folder.files()[0] == odd.file_entry() == (odd.path, 6, folder.files()[0].e_tag)
    before = odd.file_entry()
    odd.write(b"third.")
    assert odd.file_entry() != before


def test_files_are_deleted_and_missing_ones_are_no_error(bucket: Location) -> None:
    folder = bucket / "deleted"
    for name in ("a", "b/c", "b/d", "bb"):
        (folder / name).write(b"1")
    folder.delete_files(["none", "a", "b/none", "b/c"])
    assert names(folder) == ["b/d", "bb"]
    for name in ("b/d", "bb", "bb"):
        (folder / name).delete()
    assert names(folder) == []
    for read in (Location.read_bytes, Location.open):
        with pytest.raises(MissingFileError, match=r"bb.*: does not exist"):
            read(folder / "bb")


def test_ranges_are_read_of_the_file_that_was_listed_and_of_no_other(bucket: Location) -> None:
    place = bucket / "opened" / "file"
    place.write(bytes(range(100)))
    listed = place.file_entry()
    with place.open(listed) as file:
        file.seek(10)
        assert (bytes(file.read(3)), file.tell()) == (b"\x0a\x0b\x0c", 13)
        file.seek(-2, os.SEEK_END)
        assert (bytes(file.read()), bytes(file.read(5))) == (b"\x62\x63", b"")
        place.write(bytes(range(100, 200)))
        file.seek(0)
        if bucket.is_local:
            assert bytes(file.read(2)) == b"\x00\x01", "a file that is open stays what it was"
        else:
            with pytest.raises(ConflictError):
                file.read(2)
    with pytest.raises(ConflictError):
        place.open(listed).read(1)
    assert bytes(place.open().read(2)) == b"\x64\x65"


def test_a_storage_that_is_silent_or_busy_gives_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(buckets._RETRIES, "retry_timeout", timedelta(0))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")  # else its keys are asked of this machine
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    said = r"s3://bucket/x\S+: cannot be \w+: Generic S3 error: [^\n]*$"
    with serving(Response("", 503)) as busy:
        for port in (9, busy):
            query = f"region=eu-west-1&scheme=http&endpoint_override=127.0.0.1:{port}"
            silent = locate(f"s3://bucket/x?{query}", "--output")
            create = partial(silent.create, b"")
            for ask in (silent.read_bytes, silent.file_entry, silent.files, create):
                with pytest.raises(NoAnswerError, match=f"^{said}"):
                    ask()
            with pytest.raises(TryAgainError, match=f"^--output {said}"):
                locate_existing(silent.display, "--output")


def test_a_busy_storage_is_asked_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many waits of the shortest are longer than the time; here each is 1 ms."""
    asked, waits = [], buckets._RETRIES["backoff"]
    monkeypatch.setitem(buckets._RETRIES, "backoff", dict.fromkeys(waits, timedelta(seconds=0.001)))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")

    def refuse(environ: Any, start_response: Any) -> Any:
        asked.append(environ["PATH_INFO"])
        return Response("", 503)(environ, start_response)

    with serving(refuse) as busy:
        query = f"region=eu-west-1&scheme=http&endpoint_override=127.0.0.1:{busy}"
        with pytest.raises(NoAnswerError):
            locate(f"s3://bucket/x?{query}", "--output").read_bytes()
    assert (len(asked) - 1) * waits["init_backoff"] >= buckets._RETRIES["retry_timeout"]


_EXPIRED = "<Error><Code>ExpiredToken</Code></Error>"


@pytest.mark.parametrize(("code", "text"), [(400, _EXPIRED), (400, ""), (401, ""), (403, "")])
def test_keys_that_have_expired_are_named_and_may_be_valid_again(
    code: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to HEAD has no text; a PUT and a list without a right have one."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with serving(Response(text or "<Error><Code>AccessDenied</Code></Error>", code)) as port:
        query = f"region=eu-west-1&scheme=http&endpoint_override=127.0.0.1:{port}"
        place = locate(f"s3://bucket/x?{query}", "--output")
        asks: list[Callable[[], object]] = [place.file_entry]
        if text:
            asks += [place.files, partial(place.write, b"")]
        for ask in asks:
            with pytest.raises(NoAnswerError, match=r"; the keys may have expired, or lack a perm"):
                ask()
        if code == 403:
            with pytest.raises(StorageError, match="AccessDenied") as raised:
                place.files()
            assert type(raised.value) is StorageError


def test_a_network_disk_that_is_gone_may_come_again() -> None:
    place = Location("/mnt/share/a")
    for number, kind in ((errno.ESTALE, NoAnswerError), (errno.ENOSPC, StorageError)):
        with pytest.raises(StorageError) as raised, place.storage_errors("read"):
            raise OSError(number, "why")
        assert type(raised.value) is kind


def test_an_address_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """obstore panics at the first request."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    said = r"^--input s3://\S+: cannot be \w+: .*; look at the endpoint and the region, in the URI"
    for query in ("region=x&endpoint_override=h:90000", "region=a%20b"):
        with pytest.raises(RequestError, match=said):
            locate_existing(f"s3://b/x?{query}", "--input")


def test_a_store_that_arrow_does_not_reach_is_one_line() -> None:
    with pytest.raises(
        StorageError, match=r"^abfs://b: Ray, which uses Arrow, does not reach it: Azure.* name$"
    ):
        arrow_place(Location("x", "abfs://b"))


def test_a_connection_that_is_reset_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """obstore itself asks again but for these two."""
    store, to_reset = DomainDispatcherApplication(create_backend_app), list[str]()

    def reset_first(environ: Any, start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] not in to_reset:
            return store(environ, start_response)
        to_reset.remove(environ["REQUEST_METHOD"])
        connection = environ["werkzeug.socket"]
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(connection.detach())
        raise ConnectionResetError

    monkeypatch.setattr(time, "sleep", lambda _: None)
    with serve_s3(monkeypatch, reset_first) as uri:
        folder = locate(uri, "--output") / "reset"
        to_reset += ["PUT", "POST"]
        (folder / "file").create(b"1")
        assert names(folder) == ["file"]
        folder.delete_files(["file"])
        assert (names(folder), to_reset) == ([], [])


def test_a_disk_keeps_no_part_of_a_file_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = locate(str(tmp_path), "--output")
    (tmp_path / "folder").mkdir()
    (place / "file").write(b"1")
    long = place / ("x" * 300)
    for at in (place / "folder", place / "file" / "x" / "y", long):
        with pytest.raises(StorageError, match=r"cannot be written: .*"):
            at.write(b"2")
    with pytest.raises(ConflictError):
        (place / "file").create(b"2")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        (place / "file").write(b"2")
    assert (names(place), (place / "file").read_bytes()) == (["file"], b"1")


def test_content_and_name_are_on_the_disk_when_a_write_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a file would be there that is empty, if the content came second."""
    synced: list[tuple[Path, bool]] = []
    file = locate(str(tmp_path), "--output") / "file"

    def fsync(number: int) -> None:
        synced.append((Path(f"/proc/self/fd/{number}").readlink(), file.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    file.create(b"1")
    (content, is_named), *rest = synced
    assert (content.parent, is_named) == (tmp_path, False)
    assert rest == [(tmp_path, True)]
