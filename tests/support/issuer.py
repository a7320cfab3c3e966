"""An issuer of tokens with real keys, over HTTP: it rotates them, and can be gone."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from penstock.shell.replay import serving

ISSUER, AUDIENCE = "https://login.example/", "penstock"


# Making one takes half a second, so issuers share these; `rotate` says which of them comes next.
_RSA_KEYS = [rsa.generate_private_key(65537, 2048) for _ in range(2)]


class Issuer:
    def __init__(self, key: int = 0) -> None:
        self._next_key = key
        self.url = ""
        self.is_gone = False
        self.asked = 0
        self._keys: dict[str, Any] = {}
        self.published: list[dict[str, Any]] = []
        self.rotate("rsa-1")

    def rotate(self, key_id: str, *, elliptic: bool = False) -> None:
        """Signs with a new key and publishes that alone."""
        if elliptic:
            private: Any = ec.generate_private_key(ec.SECP256R1())
            public = ECAlgorithm.to_jwk(private.public_key(), as_dict=True)
        else:
            private = _RSA_KEYS[self._next_key % len(_RSA_KEYS)]
            self._next_key += 1
            public = RSAAlgorithm.to_jwk(private.public_key(), as_dict=True)
        self._keys[key_id] = private
        self.published = [{**public, "kid": key_id, "use": "sig", "alg": "ES256" if elliptic else "RS256"}]

    def token(
        self,
        subject: Any = "carol",
        *,
        key_id: str = "rsa-1",
        algorithm: str = "RS256",
        key: Any = None,
        head: dict[str, Any] | None = None,
        **claims: Any,
    ) -> str:
        """A good one, unless told otherwise; a claim of None is left out."""
        now = int(time.time())
        said = {"sub": subject, "iss": ISSUER, "aud": AUDIENCE, "iat": now, "exp": now + 60, **claims}
        kept = {name: value for name, value in said.items() if value is not None}
        headers = {name: value for name, value in {"kid": key_id, **(head or {})}.items() if value is not None}
        return jwt.encode(kept, self._keys[key_id] if key is None else key, algorithm, headers)

    async def publish(self, _: web.Request) -> web.Response:
        self.asked += 1
        if self.is_gone:
            raise web.HTTPServiceUnavailable
        return web.json_response({"keys": self.published})

    def settings(self, **more: Any) -> dict[str, Any]:
        return {"issuer": ISSUER, "audience": AUDIENCE, "jwks_url": f"{self.url}/keys", **more}


@asynccontextmanager
async def issuing() -> AsyncIterator[Issuer]:
    issuer = Issuer()
    app = web.Application()
    app.router.add_get("/keys", issuer.publish)
    async with serving(app) as url:
        issuer.url = url
        yield issuer
