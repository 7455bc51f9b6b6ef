"""Where images come from: inside a request, or from hosts on a list; and what is error."""

from __future__ import annotations

import asyncio
import base64
import io
import shutil
import socket
import ssl
import subprocess
import time
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cobra_edge.errors import InputError
from cobra_edge.serve.address_policy import Address, is_public
from cobra_edge.serve.errors import ApiError
from cobra_edge.serve.image_fetcher import Fetcher, resolve
from cobra_edge.serve.image_input import ImageInput
from cobra_edge.serve.limits import Limits
from cobra_edge.serve.url_policy import ImageHosts, Location

LIMITS = Limits(image_bytes=2000, image_pixels=1000, fetch_seconds=2.0)


def image(width: int = 8, height: int = 8, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, kind)
    return file.getvalue()


PNG = image()


def data_uri(file: bytes, head: str = "data:image/png;base64,") -> str:
    return head + base64.b64encode(file).decode()


def read(url: str, fetcher: Fetcher | None = None, limits: Limits = LIMITS) -> bytes:
    return asyncio.run(ImageInput(limits, fetcher).read(url))


def error_of(url: str, fetcher: Fetcher | None = None, limits: Limits = LIMITS) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(url, fetcher, limits)
    assert caught.value.param == "messages"
    return caught.value


# data: URIs


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM"])
def test_an_image_inside_a_request_is_read_as_it_is(kind: str):
    file = image(kind=kind)
    assert read(data_uri(file)) == file


@pytest.mark.parametrize(
    "url",
    [
        data_uri(PNG, "DATA:IMAGE/PNG;BASE64,"),
        data_uri(PNG, "data:image/png;name=a.png;base64,"),
        data_uri(PNG, "data:;base64,"),
        data_uri(PNG, "data:application/octet-stream;base64,"),
        data_uri(PNG, "data:text/plain;base64,"),
        data_uri(PNG, "data:image/png;base64;charset=utf-8,"),
        data_uri(PNG, " data:image/png; base64 ,"),
        data_uri(PNG).rstrip("="),
        data_uri(PNG) + "==",
        data_uri(PNG).replace("+", "-").replace("/", "_").replace("image_", "image/"),
        data_uri(PNG, ""),
        data_uri(PNG, "\n").rstrip("="),
        "\n".join(base64.urlsafe_b64encode(PNG).decode()[i : i + 7] for i in range(0, 200, 7)),
        data_uri(PNG).replace("+", "%2B").replace("/", "%2f").replace("image%2f", "image/").replace("=", "%3D"),
        "data:image/png;base64,\n" + "\r\n".join(base64.encodebytes(PNG).decode().split()) + " ",
    ],
)
def test_spellings_of_the_same_data_are_read(url: str):
    assert read(url) == PNG


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png,abc",
        "data:image/png;base64",
        "data:",
        "file:///etc/passwd",
        "ftp://example.org/a.png",
        "javascript:alert(1)",
        "image.png",
        "/etc/passwd",
        "",
        "aGk=",
        "aGVsbG8" * 10 + "!",
        "blob:http://localhost/1",
        "\ud800",
    ],
)
def test_what_is_no_image_s_address_is_refused_with_what_is(url: str):
    error = error_of(url, Fetcher(["example.org"], LIMITS))
    assert (error.status, error.code) == (400, "invalid_image_url")
    assert "data:image/png;base64,..." in error.message


@pytest.mark.parametrize("text", ["", "a", "ab=c", "====", "abcde", "ab,c", "é", "ab%zzcd", "\ud800"])
def test_broken_base64_is_refused(text: str):
    error = error_of("data:image/png;base64," + text)
    assert (error.status, error.code) == (400, "invalid_image") and "base64" in error.message


def test_escapes_take_no_more_memory_than_their_text():
    url = "data:image/png;base64," + "%41" * 500_000
    tracemalloc.start()
    assert error_of(url, limits=Limits()).code == "invalid_image"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * len(url)


def test_a_file_of_the_limit_is_read_and_one_byte_more_is_refused_undecoded(monkeypatch):
    file = PNG + bytes(LIMITS.image_bytes - len(PNG))
    assert read(data_uri(file)) == file
    monkeypatch.setattr(base64, "b64decode", None)
    error = error_of("data:image/png;base64," + base64.b64encode(file + b"x").decode())
    assert (error.status, error.code) == (413, "image_too_large") and "2,001 bytes" in error.message


# addresses


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "192.0.1.1"]
)
def test_public_addresses(address: str):
    assert is_public(ip_address(address))


NOT_PUBLIC = """
0.0.0.0 10.1.2.3 100.64.0.1 100.127.255.255 127.0.0.1 127.255.0.1 169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.1
192.0.2.1 192.88.99.1 192.168.0.1 198.18.0.1 198.19.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.1.1.1 240.0.0.1
255.255.255.255 :: ::1 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:0:127.0.0.1 64:ff9b::7f00:1
64:ff9b::a00:1 64:ff9b:1::808:808 100::1 2001::1 2001:0:7f00:1::1 2001:db8::1 2002:7f00:1::1 2002:808:808::1 3fff::1
5f00::1 fc00::1 fd00::1 fe80::1 fe80::1%eth0 fec0::1 ff02::1
"""


@pytest.mark.parametrize(
    "address",
    NOT_PUBLIC.split(),
)
def test_addresses_that_are_not_public(address: str):
    assert not is_public(ip_address(address))


# the list of hosts


@pytest.mark.parametrize(
    ("entry", "url"),
    [
        ("example.org", "http://example.org/a.png"),
        ("example.org", "https://EXAMPLE.ORG.:443/a.png"),
        ("Example.org.", "https://example.org"),
        ("*.example.org", "https://a.b.example.org/"),
        ("example.org:8443", "https://example.org:8443/"),
        ("bücher.example", "https://xn--bcher-kva.example/"),
        ("xn--bcher-kva.example", "https://BÜCHER.example/"),
        ("8.8.8.8", "http://8.8.8.8/"),
        ("[2606:4700::1111]:8080", "http://[2606:4700:0:0::1111]:8080/"),
    ],
)
def test_hosts_on_the_list(entry: str, url: str):
    ImageHosts([entry]).require(Location.of(url))


@pytest.mark.parametrize(
    ("entry", "url"),
    [
        ("example.org", "http://a.example.org/"),
        ("example.org", "http://example.org.evil.example/"),
        ("example.org", "http://evilexample.org/"),
        ("*.example.org", "http://example.org/"),
        ("*.example.org", "http://evilexample.org/"),
        ("example.org", "http://example.org:8080/"),
        ("example.org:8080", "http://example.org/"),
        ("example.org", "http://127.0.0.1/"),
        ("example.org", "http://2130706433/"),
        ("example.org", "http://0x7f.1/"),
        ("example.org", "http://0177.0.0.1/"),
        ("example.org", "http://[::ffff:127.0.0.1]/"),
        ("example.org", "http://evil.example#@example.org/"),
        ("example.org", "http://evil.example/example.org"),
        ("example.org", "http://ex%61mple.org/"),
    ],
)
def test_hosts_that_are_not_on_the_list(entry: str, url: str):
    with pytest.raises(ApiError) as caught:
        ImageHosts([entry]).require(Location.of(url))
    assert (caught.value.status, caught.value.code) == (400, "invalid_image_url")


@pytest.mark.parametrize(
    "url",
    [
        "http://user@example.org/",
        "http://user:secret@example.org/",
        "http://@example.org/",
        "http://example.org\\@evil.example/",
        "http://example.org/a b",
        "http://exam\tple.org/",
        "http://example.org/\r\nX: 1",
        "http://a..example.org/",
        "http:///a.png",
        "http:a.png",
        "http://[::1/",
        "http://example.org:99999/",
        "http://example.org:x/",
        "http://" + "a" * 300 + ".org/",
        "http://example.org/" + "a" * 9000,
        "http://example.org/\ud800",
        "http://exa℀mple.org/",
        "ftp://example.org/",
    ],
)
def test_addresses_that_programs_read_differently_are_refused(url: str):
    with pytest.raises(ApiError) as caught:
        Location.of(url)
    assert (caught.value.status, caught.value.code) == (400, "invalid_image_url")
    assert "secret" not in caught.value.message
    caught.value.message.encode()


def test_a_location_is_what_is_asked_for():
    location = Location.of("HTTPS://Example.ORG:443/ä/%20?q=ü&x=[1]#part")
    assert location == Location("https", "example.org", 443, "/%C3%A4/%20?q=%C3%BC&x=[1]")
    assert location.url == "https://example.org/%C3%A4/%20?q=%C3%BC&x=[1]"
    assert Location.of("http://[2606::1]:8080?a").url == "http://[2606::1]:8080/?a"


@pytest.mark.parametrize(
    "entry",
    ["", "*", "*.", "*.org", "https://example.org", "a@b", "a b", "127.0.0.1", "192.168.1.20", "[::1]", "*.8.8.8.8", "a:x"],
)
def test_entries_that_are_no_hosts_are_refused(entry: str):
    with pytest.raises(InputError, match="--allow-image-host"):
        Fetcher([entry], LIMITS)


# fetching, from a server on this machine, which tests allow on purpose


class ImageHost:
    """Answers every request with the bytes `answers` has for its path; notes the heads of requests."""

    def __init__(self, answers: dict[str, bytes]) -> None:
        self.answers = answers
        self.heads: list[str] = []
        self.port = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            answer = self.answers[head.split()[1]].replace(b"PORT", str(self.port).encode())
            writer.write(answer)
            if answer.startswith(b"HTTP/1.1 200 Slow"):
                await asyncio.sleep(10)
            elif answer.startswith(b"HTTP/1.1 200 Endless"):
                while True:
                    writer.write(bytes(1000))
                    await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    @asynccontextmanager
    async def listening(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[None]:
        server = await asyncio.start_server(self.answer, "127.0.0.1", 0, ssl=tls)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()


def ok(body: bytes = PNG, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def to(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


async def here(host: str, port: int) -> Sequence[Address]:
    return [ip_address("127.0.0.1")]


def fetched(
    answers: dict[str, bytes], url: str = "http://images.example:PORT/a", limits: Limits = LIMITS, **options: Any
) -> tuple[bytes, list[str]]:
    """Fetch from a host of this machine; `options` are the Fetcher's. PORT becomes its port."""
    host = ImageHost(answers)

    async def run() -> bytes:
        async with host.listening(options.pop("server_tls", None)):
            names = options.pop("names", ["images.example"])
            given = {"resolver": here, "reachable": lambda address: True, **options}
            fetcher = Fetcher([f"{name}:{host.port}" for name in names], limits, **given)
            return await ImageInput(limits, fetcher).read(url.replace("PORT", str(host.port)))

    return asyncio.run(run()), host.heads


def fetch_error(*args: Any, **options: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        fetched(*args, **options)
    return caught.value


def test_an_image_on_an_allowed_host_is_fetched_and_little_is_said():
    file, (head,) = fetched({"/a?b=1": ok()}, "http://Images.example:PORT/a?b=1#c")
    assert file == PNG
    fields = dict(line.split(": ") for line in head.splitlines()[1:] if line)
    assert set(fields) <= {"Host", "Accept", "Accept-Encoding", "User-Agent", "Connection"}
    assert fields["Accept-Encoding"] == "identity" and fields["Host"].startswith("images.example:")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(status: int):
    assert fetched({"/a": to("/b", status), "/b": ok()})[0] == PNG


def test_three_redirects_are_followed_and_four_are_not():
    chain = {"/a": to("b"), "/b": to("c"), "/c": to("http://images.example:PORT/d"), "/d": ok()}
    assert fetched(chain)[0] == PNG
    error = fetch_error({**chain, "/d": to("e"), "/e": ok()})
    assert (error.status, error.code) == (400, "image_not_fetched") and "redirects" in error.message


@pytest.mark.parametrize(
    "place",
    ["http://evil.example:PORT/", "http://127.0.0.1:PORT/", "file:///etc/passwd", "http://u:p@images.example:PORT/", "//x/"],
)
def test_a_redirect_elsewhere_is_refused(place: str):
    assert fetch_error({"/a": to(place), "/": ok()}).code == "invalid_image_url"


def test_without_a_fetcher_no_image_is_fetched():
    error = error_of("https://example.org/a.png")
    assert (error.status, error.code) == (400, "invalid_image_url") and "--allow-image-host" in error.message


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["93.184.216.34", "127.0.0.1"], ["10.0.0.1"], ["::ffff:127.0.0.1"], ["169.254.169.254"], []]
)
def test_a_name_with_any_address_inside_is_refused_before_a_connection(addresses: list[str]):
    async def resolver(host: str, port: int) -> Sequence[Address]:
        return [ip_address(a) for a in addresses]

    host = ImageHost({"/a": ok()})

    async def run() -> None:
        async with host.listening():
            fetcher = Fetcher([f"images.example:{host.port}"], LIMITS, resolver)
            await fetcher.fetch(f"http://images.example:{host.port}/a")

    with pytest.raises(ApiError, match="not on the public internet"):
        asyncio.run(run())
    assert not host.heads


@pytest.mark.parametrize("name", ["localhost", "2130706433", "0x7f.1", "0177.0.0.1", "127.1"])
def test_names_and_numbers_of_this_machine_are_refused_even_on_the_list(name: str):
    error = error_of(f"http://{name}/a", Fetcher([name], LIMITS))
    assert (error.status, error.code) == (400, "image_not_fetched")


def test_the_address_that_was_looked_at_is_the_one_connected_to():
    asked = []

    async def rebinding(host: str, port: int) -> Sequence[Address]:
        asked.append(host)
        return [ip_address("127.0.0.1" if len(asked) == 1 else "127.9.9.9")]

    # the system's resolver knows no such name, so only the address that was looked at can have been used
    assert fetched({"/a": ok()}, resolver=rebinding)[0] == PNG
    assert asked == ["images.example"]


def test_a_redirect_is_looked_up_again():
    async def turning(host: str, port: int) -> Sequence[Address]:
        return [ip_address("127.0.0.1" if host == "images.example" else "10.0.0.1")]

    error = fetch_error(
        {"/a": to("http://inside.example:PORT/b")},
        names=["images.example", "inside.example"],
        resolver=turning,
        reachable=lambda address: address == ip_address("127.0.0.1"),
    )
    assert "inside.example is not on the public internet" in error.message


def test_the_next_address_is_tried_where_one_does_not_answer():
    async def two(host: str, port: int) -> Sequence[Address]:
        return [ip_address("::1"), ip_address("127.0.0.1")]

    assert fetched({"/a": ok()}, resolver=two)[0] == PNG


def test_a_name_without_address_is_refused():
    async def unknown(host: str, port: int) -> Sequence[Address]:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    assert "has no address" in fetch_error({}, resolver=unknown).message


def test_the_resolver_of_the_system_gives_addresses():
    assert ip_address("127.0.0.1") in asyncio.run(resolve("127.0.0.1", 80))


@pytest.mark.parametrize("status", ["404 Not Found", "204 No Content", "206 Partial Content", "500 Oops", "302 Found"])
def test_other_statuses_are_refused(status: str):
    error = fetch_error({"/a": f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()})
    assert (error.status, error.code) == (400, "image_not_fetched") and status[:3] in error.message


def test_what_is_compressed_is_refused():
    assert "compressed" in fetch_error({"/a": ok(PNG, "Content-Encoding: gzip")}).message
    assert fetched({"/a": ok(PNG, "Content-Encoding: identity")})[0] == PNG


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2001\r\n\r\n",
        b"HTTP/1.1 200 Endless\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + (b"3e8\r\n" + bytes(1000) + b"\r\n") * 3,
    ],
)
def test_what_is_too_large_is_refused_while_it_comes(answer: bytes):
    error = fetch_error({"/a": answer})
    assert (error.status, error.code) == (413, "image_too_large")


def test_a_host_that_takes_too_long_in_all_is_given_up():
    begun = time.monotonic()
    slow = b"HTTP/1.1 200 Slow\r\nContent-Length: 100\r\n\r\nx"
    error = fetch_error({"/a": slow}, limits=replace(LIMITS, fetch_seconds=0.3))
    assert "more than 0.3 seconds" in error.message and time.monotonic() - begun < 5


@pytest.mark.parametrize("answer", [b"", b"what?\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"])
def test_a_host_that_does_not_speak_http_is_refused(answer: bytes):
    assert fetch_error({"/a": answer}).code == "image_not_fetched"


def test_a_port_where_nobody_listens_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fetcher = Fetcher([f"images.example:{port}"], LIMITS, here, lambda address: True)
    assert error_of(f"http://images.example:{port}/", fetcher).code == "image_not_fetched"


def test_what_was_fetched_is_handed_on_unread():
    assert fetched({"/a": ok(b"hello")})[0] == b"hello"  # what is inside is looked at when it is decoded


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """One file with a key and a certificate for images.example, which signs itself."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, to make a certificate")
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=images.example"]
    command += ["-addext", "subjectAltName=DNS:images.example", "-keyout", f"{file}.key", "-out", f"{file}.crt"]
    subprocess.run(command, check=True, capture_output=True)
    file.write_bytes(Path(f"{file}.key").read_bytes() + Path(f"{file}.crt").read_bytes())
    return file


def test_tls_is_verified_against_the_name_and_not_the_address(certificate: Path):
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(certificate)
    trusted = ssl.create_default_context(cafile=f"{certificate}.crt")
    options = {"server_tls": served, "names": ["images.example", "other.example"]}
    answers = {"/a": ok()}
    assert fetched(answers, "https://images.example:PORT/a", trusted=trusted, **options)[0] == PNG
    assert fetch_error(answers, "https://other.example:PORT/a", trusted=trusted, **options).code == "image_not_fetched"
    assert fetch_error(answers, "https://images.example:PORT/a", **options).code == "image_not_fetched"
