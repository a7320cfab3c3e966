"""HTTPS: a real handshake, client certificates, and files that change while Penstock runs."""

import asyncio
import datetime
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from penstock.access_settings import Tls
from penstock.settings import SettingsError, load_settings
from penstock.shell import tls
from penstock.shell.auth import OPEN_ROUTES, hash_key
from penstock.shell.replay import serving
from penstock.shell.tls import TlsFiles
from support import chunks
from support.http_client import chat
from support.sidecar import sidecar
from support.sockets import until
from support.upstreams import engine_app, saying

KEY = "alices-key-0123456789"


@dataclass
class Authority:
    """A root, and the certificates that it signs."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"root {self.folder.name}")])
        root = self._builder(self._name, self._key).add_extension(x509.BasicConstraints(True, None), True)
        self.root = self._write("root", root.sign(self._key, hashes.SHA256()), self._key)[0]

    def issue(self, name: str, *alternatives: x509.GeneralName) -> tuple[Path, Path]:
        """Certificate and key, in two files."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key)
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), False)
        return self._write(name, builder.sign(self._key, hashes.SHA256()), key)

    def _builder(self, name: x509.Name, key: Any) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(self._name).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(1))
        return builder.not_valid_after(now + datetime.timedelta(1))

    def _write(self, name: str, certificate: x509.Certificate, key: Any) -> tuple[Path, Path]:
        paths = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        plain = serialization.NoEncryption()
        paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
        return paths


LOCALHOST = x509.DNSName("localhost")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@asynccontextmanager
async def secured(tls: dict[str, str], **flags: Any) -> AsyncIterator[str]:
    """Penstock over HTTPS; yields its URL by a name that its certificate has."""
    app, _ = engine_app(saying(*chunks.answer_of(["Hello"])))
    async with serving(app) as engine_url, sidecar(engine_url, listen__tls=tls, **flags) as running:
        assert running.url.startswith("https://127.0.0.1:")
        yield running.url.replace("127.0.0.1", "localhost")


def files(certificate: tuple[Path, Path], **more: Path) -> dict[str, str]:
    return {"cert_file": str(certificate[0]), "key_file": str(certificate[1]), **{k: str(v) for k, v in more.items()}}


def trusting(root: Path, certificate: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=root)
    if certificate is not None:
        context.load_cert_chain(*certificate)
    return context


async def ask(url: str, path: str, context: ssl.SSLContext, **headers: str) -> tuple[int, bytes]:
    """A request on a connection of its own; POST for streams."""
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        method, body = ("POST", chat()) if path == "/v1/streams" else ("GET", None)
        async with session.request(method, url + path, json=body, ssl=context, headers=headers) as response:
            return response.status, await response.read()


async def test_a_stream_over_https(authority: Authority) -> None:
    async with secured(files(authority.issue("server", LOCALHOST))) as url:
        status, body = await ask(url, "/v1/streams", trusting(authority.root))
        assert (status, b"Hello" in body, b"stream.end" in body) == (200, True, True)


async def test_what_is_older_than_tls_1_2_is_refused(authority: Authority) -> None:
    old = trusting(authority.root)
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with pytest.warns(DeprecationWarning, match="TLSv1_1 is deprecated"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    async with secured(files(authority.issue("server", LOCALHOST))) as url:
        with pytest.raises(aiohttp.ClientConnectorError):
            await ask(url, "/healthz", old)


async def test_a_client_certificate_is_a_caller(authority: Authority, tmp_path: Path) -> None:
    """Needed on every route but the open ones, which probes call; one of another root ends the handshake."""
    tls = files(authority.issue("server", LOCALHOST), client_ca_file=authority.root)
    batch = authority.issue("batch")
    named = authority.issue("named", x509.DNSName("svc.example"), x509.UniformResourceIdentifier("spiffe://x/y"))
    stranger = Authority(tmp_path / "other").issue("batch")
    usage = tmp_path / "usage.jsonl"
    async with secured(tls, usage__file={"path": str(usage)}) as url:
        for path in OPEN_ROUTES:
            assert (await ask(url, path, trusting(authority.root)))[0] == 200
        status, body = await ask(url, "/v1/streams", trusting(authority.root))
        assert (status, b"client_certificate_required" in body) == (401, True)
        assert (await ask(url, "/v1/streams", trusting(authority.root, batch)))[0] == 200
        assert (await ask(url, "/v1/streams", trusting(authority.root, named)))[0] == 200
        with pytest.raises(aiohttp.ClientError):
            await ask(url, "/v1/models", trusting(authority.root, stranger))
    assert '"principal":"cert:batch"' in usage.read_text().splitlines()[0]
    assert '"principal":"cert:svc.example"' in usage.read_text().splitlines()[1]


async def test_with_keys_too_a_caller_needs_both(authority: Authority) -> None:
    tls = files(authority.issue("server", LOCALHOST), client_ca_file=authority.root)
    client = trusting(authority.root, authority.issue("batch"))
    async with secured(tls, auth__keys={"alice": hash_key(KEY)}) as url:
        assert (await ask(url, "/v1/models", client))[0] == 401
        assert (await ask(url, "/v1/models", trusting(authority.root), Authorization=f"Bearer {KEY}"))[0] == 401
        assert (await ask(url, "/v1/models", client, Authorization=f"Bearer {KEY}"))[0] == 200


async def test_changed_files_count_for_new_connections(authority: Authority, tmp_path: Path) -> None:
    """Certificate, key and roots of clients alike; a file that is wrong changes nothing."""
    live = [tmp_path / name for name in ("live.crt", "live.key", "live-ca.crt")]

    def put(server: tuple[Path, Path], roots: Path) -> None:
        for path, source in zip(live, (*server, roots), strict=True):
            path.write_bytes(source.read_bytes())

    put(authority.issue("server", LOCALHOST), authority.root)
    old_client, new = authority.issue("batch"), Authority(tmp_path / "new")
    new_client, new_server = new.issue("batch"), new.issue("server", LOCALHOST)
    tls = {"cert_file": str(live[0]), "key_file": str(live[1]), "client_ca_file": str(live[2])}
    async with secured(tls, auth__reload_seconds=0.02) as url:
        assert (await ask(url, "/v1/models", trusting(authority.root, old_client)))[0] == 200
        await asyncio.to_thread(live[0].write_text, "nonsense")
        await asyncio.sleep(0.2)
        assert (await ask(url, "/v1/models", trusting(authority.root, old_client)))[0] == 200
        await asyncio.to_thread(put, new_server, new.root)

        async def is_new() -> bool:
            try:
                return (await ask(url, "/v1/models", trusting(new.root, new_client)))[0] == 200
            except aiohttp.ClientError:
                return False

        await until(is_new)
        with pytest.raises(aiohttp.ClientError):
            await ask(url, "/v1/models", trusting(new.root, old_client))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_session_does_not_outlive_the_root_of_its_certificate(
    authority: Authority, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    """Taken up again, a session shows the certificate that it began with and nobody checks it."""
    roots, new = tmp_path / "roots.pem", Authority(tmp_path / "new")
    roots.write_bytes(authority.root.read_bytes())
    server = authority.issue("server", LOCALHOST)
    client, new_client = (trusting(authority.root, issuer.issue("batch")) for issuer in (authority, new))
    client.maximum_version = new_client.maximum_version = version
    async with secured(files(server, client_ca_file=roots), auth__reload_seconds=0.02) as url:
        port = int(url.rpartition(":")[2])
        status, session = await asyncio.to_thread(taken_up, port, client, None)
        assert status == b"200"
        assert (await asyncio.to_thread(taken_up, port, client, session))[0] == b"200"
        await asyncio.to_thread(roots.write_bytes, new.root.read_bytes())

        async def is_new() -> bool:
            return (await asyncio.to_thread(taken_up, port, new_client, None))[0] == b"200"

        await until(is_new)
        for _ in range(2):
            assert (await asyncio.to_thread(taken_up, port, client, session))[0] == b"refused"
        # Who has a good certificate goes on; a session of the very second of the change is made anew first.
        session = (await asyncio.to_thread(taken_up, port, new_client, None))[1]
        answers = [(await asyncio.to_thread(taken_up, port, new_client, session))[0] for _ in range(2)]
        assert answers[-1] == b"200"


def taken_up(port: int, context: ssl.SSLContext, session: ssl.SSLSession | None) -> tuple[bytes, ssl.SSLSession | None]:
    """The status of a request on a connection that takes a session up, and the session that it leaves."""
    request = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("localhost", port)) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="localhost", session=session) as secure:
                secure.sendall(request)
                answer = secure.recv(65536)
                return answer[9:12] or b"refused", secure.session
        except ssl.SSLError:
            return b"refused", None


async def test_a_certificate_that_expires_lets_nobody_in_any_more(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on a connection, either, that began while it was good."""
    server, client = authority.issue("server", LOCALHOST), authority.issue("batch")
    connector = aiohttp.TCPConnector(ssl=trusting(authority.root, client), limit=1)
    async with (
        secured(files(server, client_ca_file=authority.root)) as url,
        aiohttp.ClientSession(connector=connector) as session,
    ):
        for expected, days in ((200, 0), (401, 2)):
            now = time.time() + days * 86400
            monkeypatch.setattr(tls, "time", SimpleNamespace(time=lambda now=now: now))
            async with session.get(f"{url}/v1/models") as response:
                assert response.status == expected


def test_files_that_are_wrong_are_named(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("server")
    other = authority.issue("other")[1]
    nonsense = tmp_path / "nonsense"
    nonsense.write_text("nonsense")
    mismatch = r"listen\.tls\.cert_file: .*: KEY_VALUES_MISMATCH; it must be PEM"
    for settings, sentence in (
        (Tls(cert_file=tmp_path / "none", key_file=key), r"listen\.tls\.cert_file: .*none cannot be read"),
        (Tls(cert_file=certificate, key_file=tmp_path / "none"), r"listen\.tls\.key_file: .*none cannot be read"),
        (Tls(cert_file=certificate, key_file=other), mismatch),
        (Tls(cert_file=nonsense, key_file=key), r"listen\.tls\.cert_file: .*nonsense"),
        (Tls(cert_file=certificate, key_file=key, client_ca_file=nonsense), r"listen\.tls\.client_ca_file"),
    ):
        with pytest.raises(SettingsError, match=sentence):
            TlsFiles.load(settings)


def test_client_certificates_are_no_open_relay() -> None:
    tls = {"cert_file": "c", "key_file": "k", "client_ca_file": "r"}
    flags: dict[str, Any] = {"upstreams": [{"url": "http://vllm:8000"}], "listen.host": "0.0.0.0"}
    assert load_settings(environment={}, flags={**flags, "listen.tls": tls}).listen.tls is not None
    del tls["client_ca_file"]
    with pytest.raises(SettingsError, match=r"auth\.jwt or listen\.tls\.client_ca_file"):
        load_settings(environment={}, flags={**flags, "listen.tls": tls})
