"""A caller, however it proved who it is, and what it is told that did not."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

import orjson

from penstock.access_settings import Plan
from penstock.core.errors import CallerError


@dataclass(frozen=True, slots=True)
class Caller:
    """A principal: `name` owns streams, is billed and limited; several keys may lead to one name."""

    name: str
    plan: Plan

    def may_ask(self, model: str) -> bool:
        return any(fnmatchcase(model, pattern) for pattern in self.plan.models)

    def check_model(self, model: str) -> None:
        """Raises `CallerError` where this caller may not ask for it."""
        if not self.may_ask(model):
            allowed = ", ".join(self.plan.models)
            message = f"the key of {self.name} is not for the model {model!r}; it may ask for {allowed}"
            raise CallerError("model_not_allowed", message, status=403, param="model")

    def models_in(self, listed: bytes) -> bytes:
        """A list of models without those that this caller may not ask for; the same bytes where it may all."""
        if "*" in self.plan.models:
            return listed
        try:
            answer = orjson.loads(listed)
            answer["data"] = [model for model in answer["data"] if self.may_ask(str(model["id"]))]
        except (ValueError, KeyError, TypeError):  # an error page, or no list at all
            return listed
        return orjson.dumps(answer)


def challenged(code: str, message: str, error: str | None = None, *, status: int = 401) -> CallerError:
    """A refusal with the challenge that RFC 9110 asks for; `error` is RFC 6750's word for a token that was given."""
    parts = ['Bearer realm="penstock"', *([f'error="{error}"'] if error else [])]
    return CallerError(code, message, status=status, headers={"WWW-Authenticate": ", ".join(parts)})
