"""Requests: what a body may be and how large; from its bytes to the rows that it holds."""

import io
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from typing import Any

import torch
from PIL import Image
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from cluster.data.sources.pixels import decode_image, formats
from cluster.inference.serving.served import ROWS, Rows, Served

BODY = "body"
FORMS = "multipart/form-data"
MOST_PIXELS = 1 << 25  # of an uploaded picture, before it is made smaller: a small file can hold very many


@dataclass(frozen=True)
class Limits:
    """What one request may hold."""

    body_bytes: int = 16 << 20
    rows: int = 1024
    body_s: float = 30.0  # until all of it has come


class RefusedError(Exception):
    """A request that is refused, with the status to answer: 4xx where the sender must change something."""

    def __init__(self, status: int, path: str, message: str, fix: str | None = None) -> None:
        super().__init__(status, path, message, fix)
        self.status, self.path, self.message, self.fix = status, path, message, fix


async def body_of(request: Request, limits: Limits) -> bytes:
    """All of it. Raises RefusedError for one that is too large, before it is in memory."""
    told = request.headers.get("content-length", "0")
    if not told.isdecimal() or int(told) > limits.body_bytes:
        raise _too_large(limits)
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > limits.body_bytes:
            raise _too_large(limits)
    return bytes(content)


async def rows_in(content: bytes, content_type: str, served: Served, limits: Limits) -> Rows:
    """The rows that a body holds, checked. Raises RefusedError and UserError."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/json":
        rows = _of_json(content, limits)
    elif kind == FORMS:
        rows = _of_images(await _files(content, content_type, limits), served)
    elif kind.startswith("image/") or (kind == "application/octet-stream" and served.takes_images):
        rows = _of_images({"the picture": content}, served)
    elif kind == "text/plain":
        rows = [_of_text(content, content_type, served)]
    else:
        kinds = ["application/json", *["image/* or multipart/form-data"] * served.takes_images]
        kinds += ["text/plain"] * served.takes_texts
        raise RefusedError(415, "content-type", f"{kind or 'none'}", f"send {', or '.join(kinds)}")
    return served.checked(rows)


def json_of(content: bytes) -> Any:
    """What a body says in JSON. Raises RefusedError."""
    try:
        return from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise RefusedError(400, BODY, f"no JSON ({error})", 'send {"rows": [...]}') from None


def _too_large(limits: Limits) -> RefusedError:
    return RefusedError(413, BODY, f"more than {limits.body_bytes:,} bytes", "send fewer rows at once")


def _of_json(content: bytes, limits: Limits) -> Any:
    told = json_of(content)
    if not isinstance(told, dict) or set(told) != {ROWS}:
        what = f"an object of {', '.join(map(repr, told)) or 'nothing'}" if isinstance(told, dict) else "no object"
        raise RefusedError(422, BODY, what[:200], 'send {"rows": [...]}')
    if isinstance(told[ROWS], list) and len(told[ROWS]) > limits.rows:
        raise RefusedError(413, ROWS, f"{len(told[ROWS]):,} rows", f"send at most {limits.rows:,} at once")
    return told[ROWS]


def _of_text(content: bytes, content_type: str, served: Served) -> str:
    if not served.takes_texts:
        raise RefusedError(415, "content-type", "a text, which the model does not read", "see GET /model")
    header = Message()
    header["content-type"] = content_type
    try:
        return content.decode(str(header.get_content_charset("utf-8")))
    except (LookupError, UnicodeDecodeError):
        raise RefusedError(400, BODY, "no text of its charset", "send UTF-8") from None


async def _files(content: bytes, content_type: str, limits: Limits) -> dict[str, bytes]:
    """The files of a form, by their names."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", content_type.encode("latin-1"))]}
    try:
        async with Request(scope, receive).form(max_files=limits.rows, max_fields=limits.rows) as form:
            parts = [(name, part) for name, part in form.multi_items() if isinstance(part, UploadFile)]
            files = {f"{place}: {part.filename or name}": await part.read() for place, (name, part) in enumerate(parts)}
    except (MultiPartException, KeyError, ValueError, AssertionError) as error:
        message = getattr(error, "message", "") or "its parts cannot be told from each other"
        raise RefusedError(400, BODY, f"no form ({message})", "send it as curl -F image=@picture.png does") from None
    if not files:
        raise RefusedError(422, BODY, "a form without files", "send it as curl -F image=@picture.png does")
    return files


def _of_images(files: Mapping[str, bytes], served: Served) -> torch.Tensor:
    """Encoded pictures as pixels, (files, channels, height, width)."""
    if not served.takes_images:
        raise RefusedError(415, "content-type", "a picture, which the model does not read", "see GET /model")
    channels, height, width = served.column.row_shape
    return torch.stack([_image(content, name, channels, (height, width)) for name, content in files.items()])


def _image(content: bytes, name: str, channels: int, size: tuple[int, int]) -> torch.Tensor:
    width = height = 0
    with suppress(Exception), Image.open(io.BytesIO(content), formats=formats()) as image:  # its head alone
        width, height = image.size  # of what is none `decode_image` says why
    if width * height > MOST_PIXELS:
        raise RefusedError(413, name, f"{width:,} x {height:,} pixels", f"send at most {MOST_PIXELS:,}")
    return torch.from_numpy(decode_image(content, name=name, channels=channels, size=size).copy())
