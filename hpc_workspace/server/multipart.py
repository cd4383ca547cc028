"""The `file` part of a multipart upload, as it arrives: Starlette's form parser would spool it in /tmp first."""

from collections.abc import AsyncIterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from hpc_workspace.server.requests import RequestError


class _FilePart:
    """Callbacks of the parser; collects what belongs to the part named `file`."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.was_found = False
        self._is_inside = False
        self._name = bytearray()
        self._value = bytearray()

    def on_part_begin(self) -> None:
        self._is_inside = False

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if bytes(self._name).lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            self._is_inside = options.get(b"name") == b"file" and not self.was_found
            self.was_found = self.was_found or self._is_inside
        self._name.clear()
        self._value.clear()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_inside:
            self.data += data[start:end]


async def file_part(content_type: str, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The bytes of the part named `file`.

    Raises:
        RequestError: 422: it is not multipart, ends too early, or has no such part.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise RequestError("the body must be multipart/form-data with a part named file")
    part = _FilePart()
    try:
        parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": part.on_part_begin,
                "on_header_field": part.on_header_field,
                "on_header_value": part.on_header_value,
                "on_header_end": part.on_header_end,
                "on_part_data": part.on_part_data,
            },
        )
        async for chunk in chunks:
            parser.write(chunk)
            if part.data:
                yield bytes(part.data)
                part.data.clear()
        parser.finalize()
    except FormParserError as error:
        raise RequestError(f"the multipart body is broken: {error}") from error
    if not part.was_found:
        raise RequestError("the multipart body has no part named file")
