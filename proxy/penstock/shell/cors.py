"""Which web pages may call: cross-origin resource sharing, and no door for any page where there are no keys."""

from ipaddress import ip_address
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from penstock.access_settings import Cors
from penstock.core.errors import CallerError

_METHODS = "GET, POST, DELETE"
_EXPOSED = (
    "X-Stream-Id, X-Stream-Schema, X-Stream-Resume-Seconds, Retry-After, x-ratelimit-limit-requests, "
    "x-ratelimit-remaining-requests, x-ratelimit-reset-requests, x-ratelimit-limit-tokens, "
    "x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)


class WebPages:
    """What a browser's `Origin` header means here."""

    def __init__(self, settings: Cors, *, only_loopback: bool) -> None:
        self._settings = settings
        self._origins = frozenset(settings.origins)
        self._only_loopback = only_loopback

    def preflight(self, http: web.Request) -> web.Response | None:
        """The answer to a browser that asks whether it may; it comes without credentials, so before the gate."""
        if http.method != hdrs.METH_OPTIONS or not self._is_allowed(http):
            return None
        headers = {
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: _METHODS,
            hdrs.ACCESS_CONTROL_MAX_AGE: str(self._settings.max_age_seconds),
        }
        if asked := http.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS):
            headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = asked
        return web.Response(status=204, headers=headers)

    async def mark(self, http: web.Request, response: web.StreamResponse) -> None:
        """aiohttp's signal before an answer's head goes out, that of a stream too."""
        if not self._origins:
            return
        response.headers.add(hdrs.VARY, hdrs.ORIGIN)
        if self._is_allowed(http):
            # The page's own origin and not `*`, so that nothing is cached for another page. No cookies are ever read.
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = http.headers[hdrs.ORIGIN]
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED

    def refuse_strangers(self, http: web.Request) -> None:
        """Where nobody needs a key, any page that its user has open could call; it must not. Raises `CallerError`.

        A page may send a POST to another origin without asking, and by DNS rebinding make a name of its own lead to
        loopback. So its origin must be named in the settings, or be this server's own; on loopback, by a name of it.
        """
        origin = http.headers.get(hdrs.ORIGIN)
        if origin is None or self._is_allowed(http):
            return
        if not self._is_own(origin, http.host):
            message = f"web pages of {origin!a} may not call here; name it in listen.cors.origins, or require keys"
            raise CallerError("origin_not_allowed", message, status=403)

    def _is_own(self, origin: str, host: str) -> bool:
        try:
            parts = urlsplit(origin)
        except ValueError:  # brackets that are no address
            return False
        return parts.netloc == host and (not self._only_loopback or _is_loopback(parts.hostname or ""))

    def _is_allowed(self, http: web.Request) -> bool:
        origin = http.headers.get(hdrs.ORIGIN)
        return origin is not None and ("*" in self._origins or origin in self._origins)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
