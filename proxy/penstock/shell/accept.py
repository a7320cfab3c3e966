"""Which form of the events a caller likes best."""

from penstock.core.dialects import native
from penstock.core.errors import CallerError

NativeKind = type[native.NativeSse] | type[native.NativeNdjson] | type[native.NativeFolded]
_NATIVE_KINDS: dict[str, NativeKind] = {
    "text/event-stream": native.NativeSse,
    "application/x-ndjson": native.NativeNdjson,
    "application/json": native.NativeFolded,
}
_ANY = {"*/*": "text/event-stream", "text/*": "text/event-stream", "application/*": "application/json"}


def accepted(accept: str) -> NativeKind:
    """The form that the caller likes best (RFC 9110 quality values); raises `CallerError` (406) if there is none."""
    wishes: list[tuple[float, int, str]] = []
    for position, part in enumerate(accept.split(",") if accept.strip() else ["*/*"]):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        name = _ANY.get(name, name)
        if name in _NATIVE_KINDS and _number(quality) > 0:
            wishes.append((-_number(quality), position, name))
    if not wishes:
        message = f"Accept: {accept!a} is not served here; accept one of {', '.join(_NATIVE_KINDS)}"
        raise CallerError("not_acceptable", message, status=406)
    return _NATIVE_KINDS[min(wishes)[2]]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
