"""Files that a caller names, fetched without letting him reach what only this machine can reach.

A URL's host is looked up once, every address that it has must be public, and the connection goes to one of these very
addresses; so it is for each redirect. Proxies are not used: one would look up the name again.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes, urljoin

import httpcore2
import httpx2

from dmd2.runtime.errors import UserError, first_line, shown

REDIRECTS = 5
SILENCE = 30.0
"""seconds without a byte, or to connect, after which a server is given up"""
GLANCE = 0.25
"""seconds that pass at most until a download that waits notices that nobody waits for it"""
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(map(ipaddress.ip_network, texts))


# IANA's registries of special-purpose addresses (RFC 6890, RFC 8190) as of 2026: what is not globally reachable. Not
# `is_global`, about which Python's releases disagree: some call 192.0.0.192 global.
_REFUSED = _networks(
    "0.0.0.0/8",  # this network
    "10.0.0.0/8",
    "100.64.0.0/10",  # providers' own
    "127.0.0.0/8",
    "169.254.0.0/16",  # link-local: clouds tell secrets here
    "172.16.0.0/12",
    "192.0.0.0/24",  # protocols
    "192.0.2.0/24",  # documentation, as 198.51.100.0/24 and 203.0.113.0/24
    "192.88.99.0/24",  # 6to4's relays, given up
    "192.168.0.0/16",
    "198.18.0.0/15",  # benchmarks
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, and broadcast
    # Of IPv6, 2000::/3 is what is not reserved or used within sites. In this:
    "2001::/23",  # protocols; in it Teredo, benchmarks, ORCHID
    "2001:db8::/32",  # documentation, as 3fff::/20
    "2002::/16",  # 6to4: an IPv4 address inside, and nobody uses it any more
    "3fff::/20",
)
_REACHABLE = _networks(
    *("192.0.0.9/32", "192.0.0.10/32"),  # anycast of PCP and TURN
    *("2001:1::1/128", "2001:1::2/128", "2001:1::3/128", "2001:3::/32", "2001:4:112::/48"),
    *("2001:20::/28", "2001:30::/28"),
)
"""parts of the above that the registries call globally reachable"""
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def look_up(host: str) -> list[Address]:
    """The addresses of a host. Raises OSError if it has none. How long it takes is the system's resolver's matter."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(str(entry[4][0])) for entry in found]


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet: not private, loopback, link-local, multicast, …

    An IPv4 address within an IPv6 one (mapped, NAT64) is what counts.
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is None and address not in _GLOBAL_UNICAST:
            return False
        address = inner or address
    return any(address in network for network in _REACHABLE) or not any(address in network for network in _REFUSED)


class Missing(UserError):
    """The server says that there is no such file."""


class Patience:
    """A deadline that several downloads share.

    Args:
        seconds: from now on.
        gone: set once nobody waits for them any more. From any thread.
    """

    def __init__(self, seconds: float, gone: threading.Event | None = None) -> None:
        self._until = time.monotonic() + seconds
        self._gone = gone or threading.Event()

    def left(self, field: str) -> float:
        """Seconds left. Raises UserError once there are none, or nobody waits any more."""
        left = self._until - time.monotonic()
        if self._gone.is_set():
            raise UserError(f"{field}: the download was given up: nobody waits for it")
        if left <= 0:
            raise UserError(f"{field}: the download took too long; expected a faster server or a smaller file")
        return left


@dataclass(frozen=True)
class Guard:
    """Downloads URLs that a caller names: public addresses only, within limits of size and time.

    Args:
        most_bytes: of the file.
        seconds: from the first connection to the last byte, unless `fetch` is told otherwise.
        resolve: host → addresses.
        allowed: networks that are reached though they are not public. For tests.
    """

    most_bytes: int
    seconds: float
    resolve: Callable[[str], Sequence[Address]] = look_up
    allowed: tuple[Network, ...] = ()

    def fetch(self, url: str, file: BinaryIO, field: str, patience: Patience | None = None) -> None:
        """Downloads an http, https or data URL into `file`.

        Args:
            field: what messages call the URL: the input that it was given as.

        Raises:
            UserError: another URL, a refused address, a failed or overlong download, too large a file.
        """
        if re.match(r"data:", url, re.IGNORECASE):
            content = _data(url, field, self.most_bytes)
            self._check_size(len(content), field)
            file.write(content)
            return
        backend = _Backend(self, field, patience or Patience(self.seconds))
        try:
            with httpcore2.ConnectionPool(network_backend=backend, max_connections=1) as pool:
                for _ in range(REDIRECTS + 1):
                    target = self._get(pool, _checked(url, field), file, field)
                    if target is None:
                        return
                    url = urljoin(url, target)
        except (
            httpcore2.NetworkError,
            httpcore2.ProtocolError,
            httpcore2.TimeoutException,
            httpcore2.UnsupportedProtocol,
            OSError,
        ) as error:
            raise UserError(f"{field}: the download failed: {first_line(error)}") from error
        raise UserError(f"{field}: more than {REDIRECTS} redirects")

    def _get(self, pool: Any, url: httpx2.URL, file: BinaryIO, field: str) -> str | None:
        """Writes the answer. Or, without reading it, returns where it redirects to."""
        raw = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        headers = {"Accept-Encoding": "identity", "User-Agent": "dmd2"}
        with pool.stream("GET", raw, headers=headers) as response:  # its streams have timeouts of their own
            told = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in (301, 302, 303, 307, 308) and "location" in told:
                return told["location"]
            if response.status != 200:
                kind = Missing if response.status in (404, 410) else UserError
                raise kind(f"{field}: the server answers {response.status}; expected a file there")
            self._check_size(int(told["content-length"]) if told.get("content-length", "").isdigit() else 0, field)
            size = 0
            for block in response.iter_stream():
                size += len(block)
                self._check_size(size, field)
                file.write(block)
        return None

    def _check_size(self, size: int, field: str) -> None:
        if size > self.most_bytes:
            raise UserError(f"{field}: larger than {self.most_bytes / 1e6:.0f} MB; expected a smaller file")

    def addresses(self, host: str, field: str) -> list[Address]:
        """Where a host may be reached. Raises UserError if any of its addresses is refused, or it has none."""
        try:
            found = list(dict.fromkeys(self.resolve(host)))
        except (OSError, UnicodeError) as error:
            raise UserError(f"{field}: {shown(host)}: there is no such host ({error})") from error
        for address in found:
            if not is_public(address) and not any(address in network for network in self.allowed):
                raise UserError(f"{field}: {shown(host)}: refused, because {address} is no public address")
        if not found:
            raise UserError(f"{field}: {shown(host)}: there is no such host")
        return found


def _checked(url: str, field: str) -> httpx2.URL:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise UserError(f"{field}: is no URL ({error})") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"{field}: expected an http, https or data URL")
    if parsed.userinfo:
        raise UserError(f"{field}: expected a URL without a user name and password")
    return parsed


def _data(url: str, field: str, most_bytes: int) -> bytes:
    """The content of a data URL (RFC 2397)."""
    head, comma, body = url.partition(",")
    if not comma:
        raise UserError(f"{field}: is no whole data URL: there is no comma")
    if len(body) > 3 * most_bytes + 64:  # even if every byte were written as %xx
        raise UserError(f"{field}: larger than {most_bytes / 1e6:.0f} MB; expected a smaller file")
    raw = unquote_to_bytes(body)
    if not re.search(r";\s*base64\s*$", head, re.IGNORECASE):
        return raw
    try:
        return base64.b64decode(b"".join(raw.split()), validate=True)
    except binascii.Error as error:
        raise UserError(f"{field}: is no whole data URL: {error}") from error


class _Backend(httpcore2.NetworkBackend):
    """Connects to checked addresses only, and lets nothing outlast patience."""

    def __init__(self, guard: Guard, field: str, patience: Patience) -> None:
        self._guard, self._field, self._patience = guard, field, patience
        self._sockets = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        failed: Exception | None = None
        for address in self._guard.addresses(host, self._field):
            left = min(self._patience.left(self._field), SILENCE)
            try:
                stream = self._sockets.connect_tcp(str(address), port, left, local_address, socket_options)
                return _Stream(stream, self._field, self._patience)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failed = error
        assert failed is not None
        raise failed


class _Stream(httpcore2.NetworkStream):
    """A connection on which every wait ends with patience, and soon after nobody waits any more."""

    def __init__(self, stream: httpcore2.NetworkStream, field: str, patience: Patience) -> None:
        self._stream, self._field, self._patience = stream, field, patience

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        silent = time.monotonic() + SILENCE
        while True:
            left = self._patience.left(self._field)
            try:
                return self._stream.read(max_bytes, min(left, GLANCE))
            except httpcore2.ReadTimeout:
                if time.monotonic() > silent:
                    raise

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._wait())

    def _wait(self) -> float:
        return min(self._patience.left(self._field), SILENCE)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return _Stream(
            self._stream.start_tls(ssl_context, server_hostname, self._wait()), self._field, self._patience
        )

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
