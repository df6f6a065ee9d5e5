"""What clients may send to Cog's server, what it is told of it, and how its answers are read."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, StringConstraints, ValidationError
from pydantic_core import from_json, to_json

ID = "[A-Za-z0-9_-]{1,64}"
MOST_TEXT = 500  # characters of a message
MOST_CONTEXT = 1 << 16  # bytes; Cog loses a slot for good by 8 MB, which it would take as an input


class Refused(Exception):
    """A request that is answered with an error. `content`: the answer's JSON."""

    def __init__(self, status: int, content: object, retry_after: int | None = None) -> None:
        super().__init__(status, content)
        self.status, self.content, self.retry_after = status, content, retry_after

    @classmethod
    def failed(cls, status: int, error: str, retry_after: int | None = None) -> Refused:
        """An error in the form of Cog's own."""
        return cls(status, {"error": error[:MOST_TEXT], "status": "failed"}, retry_after)

    @classmethod
    def field(cls, loc: list[str | int], message: str) -> Refused:
        return cls(422, {"detail": [{"loc": loc, "msg": message[:MOST_TEXT], "type": "value_error"}]})


def _webhook(url: str) -> str:
    parts = urlsplit(url)  # raises ValueError, which pydantic reports
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected an http or https address")
    return url


def _context(context: dict[str, Any]) -> dict[str, Any]:
    if len(to_json(context)) > MOST_CONTEXT:
        raise ValueError(f"expected at most {MOST_CONTEXT} bytes")
    return context


class Prediction(BaseModel, strict=True):
    """The body of a request: all that Cog understands, and nothing else."""

    id: Annotated[str, StringConstraints(pattern=rf"^{ID}\z")] | None = None
    input: dict[str, Any] = {}
    context: Annotated[dict[str, Any], AfterValidator(_context)] | None = None
    webhook: Annotated[str, StringConstraints(max_length=2000), AfterValidator(_webhook)] | None = None
    webhook_events_filter: list[Literal["start", "output", "logs", "completed"]] | None = None

    @classmethod
    def read(cls, body: bytes) -> Prediction:
        """Parses a body.

        Raises:
            Refused: 400 if it is no JSON, else 422 with the field.
        """
        try:
            return cls.model_validate(from_json(body.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            raise Refused.field(["body", *first["loc"]], first["msg"]) from error
        except ValueError as error:
            raise Refused.failed(400, f"the body is no JSON: {error}") from error

    def write(self) -> bytes:
        """The body as JSON without nulls, at the top and among the inputs: Cog does not take them for unset."""
        content = self.model_dump(exclude_none=True)
        content["input"] = {name: value for name, value in self.input.items() if value is not None}
        return to_json(content)


def understood(body: bytes) -> tuple[bytes, str | None]:
    """A request's body in the form that Cog gets, and its id. Raises `Refused`."""
    prediction = Prediction.read(body)
    return prediction.write(), prediction.id


def spoken(content: bytes) -> dict[str, Any] | None:
    """Cog's answer as a JSON object; None if it is none."""
    try:
        value = json.loads(content)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def cut(said: dict[str, Any]) -> dict[str, Any]:
    """Shortens Cog's message on a wrong input, which quotes the input in full before the reason."""
    detail = said.get("detail")
    if not isinstance(detail, list):
        return said

    def short(text: str) -> str:
        half = MOST_TEXT // 2
        return text if len(text) <= MOST_TEXT else f"{text[: half - 1]} … {text[2 - half :]}"

    return said | {"detail": [one | {"msg": short(str(one.get("msg")))} for one in detail if isinstance(one, dict)]}
