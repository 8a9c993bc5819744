"""Server addresses: validate them, recognize the loopback, and name the proxy in use."""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import urlsplit

from aisle.errors import InputError

_NAMED = re.compile(r"(dns|ipv4|ipv6):(?://[^/]*/)?(.*)", re.S)
_UNCHECKED = ("unix:", "unix-abstract:", "vsock:", "xds:")  # forms of gRPC that have no port
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # the variables that gRPC reads, in this order
NO_PROXY = ("no_grpc_proxy", "no_proxy")  # the variables that list hosts without a proxy


def check_address(url: str) -> None:
    """Refuse addresses that gRPC cannot resolve.

    Raises:
        InputError: the address is not HOST:PORT, nor one of gRPC's other forms.
    """
    if not isinstance(url, str) or not url.strip():
        raise InputError("the server's address is empty; give HOST:PORT, such as localhost:8001")
    if url.startswith(_UNCHECKED):
        return
    if found := re.match(r"(?!dns|ipv|unix|vsock|xds)[A-Za-z][A-Za-z0-9+.-]*://", url):
        rest = urlsplit(url).netloc or "localhost:8001"
        tls = " (turn TLS on with AISLE_TLS=1 or tls=)" if url.lower().startswith("https") else ""
        raise InputError(f"{url}: a gRPC address has no {found[0]}; give HOST:PORT, such as {rest}{tls}")
    for endpoint in _endpoints(url):
        _check_endpoint(endpoint, url)


def _endpoints(url: str) -> list[str]:
    """Return the HOST:PORT of each server that an address names."""
    if found := _NAMED.fullmatch(url):
        return [endpoint.strip() for endpoint in found[2].split(",")]
    return [url]


def _check_endpoint(endpoint: str, url: str) -> None:
    host, colon, port = endpoint.rpartition(":")
    if not colon or endpoint.endswith("]"):
        raise InputError(f"{url}: the port is missing; give HOST:PORT: `aisle serve` listens on {endpoint}:8001")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise InputError(f"{url}: put an IPv6 address in brackets, such as [::1]:8001")
    if not host or re.search(r"[\s/@?#]", endpoint):
        raise InputError(f"{url!r} is not an address; give HOST:PORT, such as localhost:8001")
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise InputError(f"{url}: the port must be a number from 1 to 65535; `aisle serve` listens on 8001")


def hosts(url: str) -> list[str]:
    """Return the host of each server that an address names; an empty list for a Unix socket."""
    if url.startswith(_UNCHECKED):
        return []
    return [endpoint.rpartition(":")[0].strip("[]") for endpoint in _endpoints(url)]


def is_loopback(url: str) -> bool:
    """Return whether an address names this machine, which no proxy can reach."""
    return all(map(_is_loopback_host, hosts(url)))


def _is_loopback_host(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def proxy_hint(url: str) -> str:
    """Return a sentence about the proxy that gRPC uses, without its password; empty if it uses none."""
    name = next((each for each in PROXIES if os.environ.get(each)), None)
    if name is None or is_loopback(url):
        return ""
    without = next((value for each in NO_PROXY if (value := os.environ.get(each))), "")
    excluded = tuple(each.strip() for each in without.split(",") if each.strip())
    if "*" in excluded or all(host.endswith(excluded) for host in hosts(url)):
        return ""
    proxy = urlsplit(os.environ[name]).netloc.rpartition("@")[2] or "(unknown form)"
    return f" The proxy {proxy} ({name}) was used; set no_proxy={','.join(hosts(url))} to connect without it."
