"""What callers may have fetched: nothing that only this machine can reach, nothing too large, nothing too slow."""

from __future__ import annotations

import base64
import contextlib
import io
import ipaddress
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import dmd2.weights.guard
from dmd2.runtime.errors import UserError
from dmd2.weights.guard import REDIRECTS, Address, Guard, Patience, is_public, look_up

LOOPBACK = ipaddress.ip_network("127.0.0.0/8")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.paths.append(self.path)
        if self.path == "/image":
            self._send(200, b"x" * 1000)
        elif self.path.startswith("/to/"):
            self._send(302, b"", Location=self.path[4:])
        elif self.path == "/round":
            self._send(302, b"", Location="/round")
        elif self.path == "/endless":  # no length is told
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while not server.closing.is_set():
                try:
                    self.wfile.write(b"400\r\n" + b"y" * 0x400 + b"\r\n")
                except OSError:
                    break
            self.close_connection = True
        elif self.path in ("/drip", "/drip-head"):
            try:
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                if self.path == "/drip":
                    self.wfile.write(b"Content-Length: 1000\r\n\r\n")
                while not server.closing.wait(0.1):
                    self.wfile.write(b"X-A: b\r\n" if self.path == "/drip-head" else b"z")
            except OSError:
                pass
            self.close_connection = True
        elif self.path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"short")
            self.close_connection = True
        else:
            self._send(404, b"")

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.paths: list[str] = []
        self.closing = threading.Event()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


GUARD = Guard(most_bytes=10_000, seconds=10)
HERE = replace(GUARD, allowed=(LOOPBACK,))


def fetch(url: str, guard: Guard = HERE) -> bytes:
    file = io.BytesIO()
    guard.fetch(url, file, "image")
    return file.getvalue()


def resolving(*addresses: str) -> Guard:
    return replace(GUARD, resolve=lambda host: [ipaddress.ip_address(a) for a in addresses])


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.255.1.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",  # clouds tell secrets here
        "100.64.0.1",
        "0.0.0.0",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "239.1.1.1",
        "240.0.0.1",
        "255.255.255.255",
        "192.0.0.192",  # some clouds tell secrets here; to some Pythons it is global
        *("192.0.0.0", "192.0.0.1", "192.0.0.8", "192.0.0.11", "192.0.0.170", "192.0.0.255"),
        *("0.1.2.3", "10.255.255.255", "100.127.255.255", "172.31.255.255", "192.0.2.255"),
        *("192.88.99.1", "192.88.99.2", "198.19.255.255", "198.51.100.7", "203.0.113.7"),
        *("232.0.0.1", "233.252.0.1", "250.1.2.3"),
        "::1",
        "::",
        "::7f00:1",  # an IPv4-compatible address, long deprecated
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::7f00:1",  # NAT64 of 127.0.0.1
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1",
        "2002:7f00:1::",  # 6to4
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",  # Teredo
        "2001:db8::1",
        "fe80::1",
        "fe80::1%lo",
        *("::ffff:192.0.0.192", "64:ff9b::c000:c0", "64:ff9b::c058:6301", "::ffff:0:7f00:1", "::ffff:0:101:101"),
        *("::1.1.1.1", "64:ff9b:1:ffff::1", "64:ff9b:0:1::1", "100::1", "100:0:0:1::1", "5f00::1", "4000::1"),
        *("2001:2::1", "2001:10::1", "2001:1::4", "2001:5::1", "2001:1ff::1", "2001:4:113::1", "2001:0:1::"),
        *("2002:101:101::1", "3fff::1", "3fff:fff::1", "fd00:ec2::254", "fec0::1", "ff0e::1"),
        "fec0::1",
        "fc00::1",
        "fd12:3456::1",
        "ff02::1",
        "100::1",
    ],
)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    with pytest.raises(UserError, match=r"image: example\.com: refused, because .* is no public address"):
        fetch("http://example.com/x", resolving(address))


@pytest.mark.parametrize(
    "address",
    [
        *("1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"),
        *("192.0.0.9", "192.0.0.10", "192.0.1.0", "191.255.255.255", "192.31.196.1", "192.52.193.1", "192.175.48.1"),
        *("9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "172.15.255.255", "172.32.0.0"),
        *("192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0", "223.255.255.255", "128.0.0.1"),
        *("2001:1::1", "2001:1::2", "2001:1::3", "2001:3::1", "2001:4:112::1", "2001:20::1", "2001:30::1"),
        *("2001:200::1", "2620:4f:8000::1", "2a00:1450::1", "3ffe::1", "3fff:1000::1", "2003::1"),
    ],
)
def test_addresses_of_the_public_internet(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_one_refused_address_among_public_ones_is_enough() -> None:
    with pytest.raises(UserError, match=r"refused, because 10\.0\.0\.1"):
        fetch("http://example.com/", resolving("1.1.1.1", "10.0.0.1"))


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f.1", "127.1", "[::1]", "[::ffff:127.0.0.1]"])
def test_every_way_to_write_loopback_is_refused(server: Server, host: str) -> None:
    with pytest.raises(UserError, match=r"image: .*(refused|no such host)"):
        fetch(f"http://{host}:{server.server_address[1]}/image", GUARD)
    assert not server.paths


def test_the_address_that_was_checked_is_the_one_connected_to(server: Server) -> None:
    """A name that is looked up a second time could mean another address by then."""
    asked: list[str] = []

    def resolve(host: str) -> list[Address]:
        asked.append(host)
        return [ipaddress.ip_address("127.0.0.1")] if len(asked) == 1 else [ipaddress.ip_address("127.0.0.9")]

    port = server.server_address[1]
    assert fetch(f"http://no-such-name.invalid:{port}/image", replace(HERE, resolve=resolve)) == b"x" * 1000
    assert asked == ["no-such-name.invalid"]


def test_the_next_address_is_tried_where_the_first_does_not_answer(server: Server) -> None:
    def resolve(host: str) -> list[Address]:
        return [ipaddress.ip_address("127.0.0.99"), ipaddress.ip_address("127.0.0.1")]

    with socket.socket() as taken:  # nothing listens there, on this port
        taken.bind(("127.0.0.99", server.server_address[1]))
        assert fetch(f"http://two.invalid:{server.server_address[1]}/image", replace(HERE, resolve=resolve))


def test_names_are_looked_up_by_the_system() -> None:
    assert ipaddress.ip_address("127.0.0.1") in look_up("localhost")
    with pytest.raises(UserError, match="image: localhost: refused"):
        fetch("http://localhost/", GUARD)
    with pytest.raises(UserError, match=r"no-such-name\.invalid: there is no such host"):
        fetch("http://no-such-name.invalid/", GUARD)


# Redirects


def test_redirects_are_followed(server: Server) -> None:
    assert fetch(f"http://{server.address}/to//to//image") == b"x" * 1000
    assert server.paths == ["/to//to//image", "/to//image", "/image"]


def test_redirects_are_checked_like_the_first_address(server: Server) -> None:
    def resolve(host: str) -> list[Address]:
        return [ipaddress.ip_address("127.0.0.1" if host == "here.invalid" else "169.254.169.254")]

    url = f"http://here.invalid:{server.server_address[1]}/to/http://metadata.invalid/secret"
    with pytest.raises(UserError, match=r"metadata\.invalid: refused, because 169\.254\.169\.254"):
        fetch(url, replace(HERE, resolve=resolve))
    for target in ("file:///etc/hostname", "ftp://example.com/", "gopher://127.0.0.1/", "data:,x"):
        with pytest.raises(UserError, match="image: expected an http, https or data URL"):
            fetch(f"http://{server.address}/to/{target}")


def test_a_chain_of_redirects_ends_at_the_limit(server: Server) -> None:
    with pytest.raises(UserError, match=f"more than {REDIRECTS} redirects"):
        fetch(f"http://{server.address}/round")
    assert len(server.paths) == REDIRECTS + 1


# Limits


def test_a_download_beyond_the_limit_of_size_is_refused(server: Server) -> None:
    assert len(fetch(f"http://{server.address}/image", replace(HERE, most_bytes=1000))) == 1000
    with pytest.raises(UserError, match="image: larger than 0 MB"):
        fetch(f"http://{server.address}/image", replace(HERE, most_bytes=999))
    file = io.BytesIO()
    with pytest.raises(UserError, match="image: larger than"):
        HERE.fetch(f"http://{server.address}/endless", file, "image")
    assert len(file.getvalue()) <= 10_000


@pytest.mark.parametrize("path", ["/drip", "/drip-head"])
def test_a_server_that_drips_is_given_up(server: Server, path: str) -> None:
    with pytest.raises(UserError, match="image: the download"):
        fetch(f"http://{server.address}{path}", replace(HERE, seconds=0.5))


def test_a_server_that_says_nothing_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UserError, match="image: the download"):
            fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/", replace(HERE, seconds=0.3))


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nx"])
def test_a_download_ends_once_nobody_waits_for_it(answer: bytes) -> None:
    """Though its server would never say anything more, and the guard has an hour."""
    gone, ended = threading.Event(), threading.Event()
    patience = Patience(3600, gone)

    def download(port: int) -> None:
        with pytest.raises(UserError, match="image: the download was given up: nobody waits for it"):
            HERE.fetch(f"http://127.0.0.1:{port}/", io.BytesIO(), "image", patience)
        ended.set()

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        thread = threading.Thread(target=download, args=(silent.getsockname()[1],), daemon=True)
        thread.start()
        connection, _ = silent.accept()
        with connection:
            assert connection.recv(1000).startswith(b"GET / HTTP/1.1")
            connection.sendall(answer)
            assert not ended.is_set()
            gone.set()
            connection.settimeout(120)
            with contextlib.suppress(ConnectionResetError):  # it hangs up, perhaps with our bytes unread
                assert connection.recv(1000) == b""
    assert ended.wait(120)


def test_a_download_that_begins_late_does_not_begin(server: Server) -> None:
    with pytest.raises(UserError, match="image: the download took too long"):
        HERE.fetch(f"http://{server.address}/image", io.BytesIO(), "image", Patience(0))
    assert not server.paths


def test_a_server_that_falls_silent_is_given_up_before_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dmd2.weights.guard, "SILENCE", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UserError, match="image: the download failed: timed out"):
            fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/", replace(HERE, seconds=3600))


def test_errors_of_the_server_are_one_line(server: Server) -> None:
    with pytest.raises(UserError, match="image: the server answers 404"):
        fetch(f"http://{server.address}/nothing")
    with pytest.raises(UserError, match="image: the download failed"):
        fetch(f"http://{server.address}/cut")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="image: the download failed"):
            fetch(f"http://127.0.0.1:{nobody.getsockname()[1]}/")


# URLs


@pytest.mark.parametrize(
    "url", ["/etc/hostname", "file:///etc/hostname", "ftp://example.com/x", "image.png", "", "http://", "//a/b"]
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="image: expected an http, https or data URL"):
        fetch(url)


def test_a_url_with_a_password_is_refused() -> None:
    with pytest.raises(UserError, match="without a user name and password"):
        fetch("http://me:secret@example.com/x")


def test_data_urls_are_decoded_or_refused() -> None:
    content = bytes(range(256))
    assert fetch(f"data:image/png;base64,{base64.b64encode(content).decode()}") == content
    assert fetch("DATA:text/plain,a%20b,c") == b"a b,c"
    for wrong in ("data:image/png;base64", "data:;base64,a", "data:;base64,€"):
        with pytest.raises(UserError, match="image: is no whole data URL"):
            fetch(wrong)
    for length in (10_001, 100_000):
        with pytest.raises(UserError, match="image: larger than"):
            fetch(f"data:;base64,{base64.b64encode(bytes(length)).decode()}")
