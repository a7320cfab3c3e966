"""HTTPS, and client certificates. The files are read again when they change, for the connections from then on."""

import asyncio
import logging
import ssl
import time
from pathlib import Path
from typing import Any

from aiohttp import web

from penstock.access_settings import Tls
from penstock.settings import SettingsError
from penstock.shell.watched import fingerprint

_log = logging.getLogger("penstock")


class TlsFiles:
    """`context` is for the listening socket, for ever: each handshake goes on with the newest files."""

    def __init__(self, settings: Tls) -> None:
        self._settings = settings
        self._seen = self._fingerprints()
        self._newest = _context(settings)
        self._roots = _read(settings.client_ca_file)
        self._roots_since = 0.0
        self.context = _context(settings)
        self.context.sni_callback = self._choose

    @classmethod
    def load(cls, settings: Tls) -> "TlsFiles":
        """Raises `SettingsError` naming the file. Blocks."""
        return cls(settings)

    async def reload(self) -> None:
        """Takes changed files over if they are right; wrong ones change nothing."""
        seen = await asyncio.to_thread(self._fingerprints)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            newest = await asyncio.to_thread(_context, self._settings)
            roots = await asyncio.to_thread(_read, self._settings.client_ca_file)
        except (SettingsError, OSError) as error:
            _log.error("the certificate in use stays as it was: %s", error)
            return
        if roots != self._roots:
            self._roots, self._roots_since = roots, time.time()
        self._newest = newest
        _log.info("the certificate was read again from %s", self._settings.cert_file)

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _first: ssl.SSLContext) -> int | None:
        """OpenSSL asks here in every handshake, whether the client named a host or not.

        A session of TLS 1.2 that is taken up again brings the certificate that it began with, which nobody checks
        anew. One from before the roots changed is refused; its client forgets it and makes a whole handshake.
        """
        if self._roots is not None and connection.session_reused:
            session = connection.session
            if session is None or session.time <= self._roots_since:
                return ssl.ALERT_DESCRIPTION_HANDSHAKE_FAILURE
        connection.context = self._newest
        return None

    def _fingerprints(self) -> list[Any]:
        settings = self._settings
        return [fingerprint(path) for path in (settings.cert_file, settings.key_file, settings.client_ca_file)]


def _context(settings: Tls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _tried("cert_file", settings.cert_file, lambda: settings.cert_file.read_bytes())
    _tried("key_file", settings.key_file, lambda: settings.key_file.read_bytes())
    _tried("cert_file", settings.cert_file, lambda: context.load_cert_chain(settings.cert_file, settings.key_file))
    if (roots := settings.client_ca_file) is not None:
        # Asked for and not required: probes of health come without one. The gate refuses them everywhere else.
        context.verify_mode = ssl.CERT_OPTIONAL
        # A ticket brings its certificate, too, and a new ticket with it, for ever: so there are none.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
        _tried("client_ca_file", roots, lambda: context.load_verify_locations(roots))
    return context


def _tried(name: str, path: Path, load: Any) -> None:
    try:
        load()
    except ssl.SSLError as error:
        remedy = "it must be PEM, and the key that of the certificate, without a password"
        raise SettingsError(f"listen.tls.{name}: {path}: {error.reason or error}; {remedy}") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"listen.tls.{name}: {path} cannot be read: {error}") from None


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


def certificate_name(http: web.Request) -> str | None:
    """Whose client certificate this connection has: its first URI or DNS name, otherwise its common name.

    None where there is none, or where it has expired since the connection or its session began.
    """
    certificate = http.transport.get_extra_info("peercert") if http.transport is not None else None
    if not certificate or ssl.cert_time_to_seconds(certificate["notAfter"]) < time.time():
        return None
    names = [value for kind, value in certificate.get("subjectAltName", ()) if kind in ("URI", "DNS")]
    common = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    return next(iter([*names, *common]), None)
