"""Where tools may stand: the public network, and what the settings name. Judged is the address that is connected to."""

import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

Networks = Sequence[IPv4Network | IPv6Network]
AddressInfo = tuple[int, int, int, str, tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]]

# The last 32 bits are an IPv4 address, and where that leads is where they lead (RFC 4291, RFC 6052).
_HOLD_IPV4 = (IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96"))
# Python takes these for global: old ways to write or to wrap an IPv4 address, the local NAT64, site-local addresses,
# SRv6, and a block for documentation.
_NOT_PUBLIC = tuple(
    ip_network(network)
    for network in ("::/96", "::ffff:0:0:0/96", "2002::/16", "64:ff9b:1::/48", "fec0::/10", "5f00::/16", "3fff::/20")
)


class OutOfReach(Exception):
    """Nothing is connected to there; the text says why and what to do."""

    def __init__(self, host: str) -> None:
        super().__init__(
            f"the tool's host {host} is at an address that tools may not have; see tools.loop.allow_networks"
        )


def may_reach(address: str, allowed: Networks) -> bool:
    """Whether a tool may stand at this address: a public one, or one of the networks that the settings name."""
    ip: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if any(ip in network for network in _HOLD_IPV4):
        ip = IPv4Address(int(ip) & 0xFFFFFFFF)
    if any(ip in network for network in allowed):
        return True
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _NOT_PUBLIC)


class GuardedResolver(AbstractResolver):
    """Names lead only where tools may stand. What is connected to is what was judged: no second look-up follows."""

    def __init__(self, allowed: Networks) -> None:
        self._allowed = allowed
        self._inner = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        kept = [result for result in found if may_reach(result["host"], self._allowed)]
        if not kept:
            raise OutOfReach(host)
        return kept

    async def close(self) -> None:
        await self._inner.close()


def guarded_sockets(allowed: Networks) -> Callable[[AddressInfo], socket.socket]:
    """Makes the sockets of a connector. An address in the URL, however it is written, is no name that is resolved."""

    def made(info: AddressInfo) -> socket.socket:
        family, kind, protocol, _, address = info
        if not may_reach(str(address[0]), allowed):
            raise OutOfReach(str(address[0]))
        return socket.socket(family, kind, protocol)

    return made
