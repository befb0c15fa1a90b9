"""Opening a file of a corpus: on disk or at an address, compressed or not, in UTF-8 or with a mark of another encoding.

What a file is compressed with is read off its first bytes, its name may say otherwise or nothing. Text is UTF-8 unless
a byte order mark says UTF-16 or UTF-32. Bytes that are no UTF-8 become lone surrogates: what only passes by them can
still be read, and `valid` finds them in what is wanted.
"""

import codecs
import io
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, TextIO

import pyarrow as pa

from conf.errors import one_line

BUFFER = 1 << 20
MARKS = {  # the longer ones first: that of UTF-16 begins one of UTF-32
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
COMPRESSED = {  # how a file begins; a text may begin with BZh, and parallel zstd with a frame to be skipped
    "gzip": rb"\x1f\x8b\x08",
    "bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    "xz": rb"\xfd7zXZ\x00",
}
POINTER = b"version https://git-lfs.github.com/spec/"
READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    MemoryError,
    lzma.LZMAError,
    zlib.error,
    zipfile.BadZipFile,
    pa.ArrowException,
)


def compression(head: bytes) -> str | None:
    return next((name for name, magic in COMPRESSED.items() if re.match(magic, head)), None)


def is_compressed(path: str) -> bool:
    """Whether a file on disk is; ValueError where it may not be read."""
    try:
        with open(path, "rb") as file:
            return compression(file.read(16)) is not None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {one_line(error)}") from None


@contextmanager
def opened(file: str) -> Iterator[io.BufferedReader]:
    """The bytes of a file, decompressed as they are read; one of READ_ERRORS where they are damaged."""
    with ExitStack() as stack:
        raw = stack.enter_context(buffered(at_hand(file)))
        if raw.peek(64).startswith(POINTER):
            raise ValueError("is a pointer of Git LFS in the place of the file: fetch it with `git lfs pull`")
        kind = compression(raw.peek(16))
        plain: Any = raw
        if kind == "xz":
            plain = stack.enter_context(lzma.open(raw))
        elif kind:
            plain = stack.enter_context(pa.CompressedInputStream(raw, kind))
        yield raw if kind is None else stack.enter_context(buffered(plain))


def at_hand(file: str) -> BinaryIO:
    if os.path.exists(file):
        return open(file, "rb", buffering=0)
    import datasets
    from datasets.utils.file_utils import xopen

    # Else every opening of a file asks the hub to count it, and waits seconds where there is no network.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    stream: BinaryIO = xopen(file, "rb")
    return stream


def buffered(stream: Any) -> io.BufferedReader:
    return io.BufferedReader(stream, BUFFER)


@contextmanager
def opened_text(file: str, newline: str | None = None) -> Iterator[TextIO]:
    """The characters of a file, without a byte order mark. `newline` as of `open`."""
    with opened(file) as stream, decoded(stream, newline) as text:
        yield text


def decoded(stream: io.BufferedReader, newline: str | None = None) -> io.TextIOWrapper:
    head = stream.peek(4)
    mark = next((mark for mark in MARKS if head.startswith(mark)), b"")
    encoding = MARKS.get(mark, "utf-8")
    if encoding == "utf-8-sig":  # skipped here, for that codec is slow
        stream.read(len(mark))
        encoding = "utf-8"
    return io.TextIOWrapper(stream, encoding, "surrogateescape" if encoding == "utf-8" else "strict", newline)


def valid(text: str) -> str:
    """The text itself; ValueError where it holds what no tokenizer can be given."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        byte = f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8 there"
        what = byte if 0xDC80 <= code <= 0xDCFF else f"the lone surrogate \\u{code:04x}"
        raise ValueError(f"holds {what} (character {error.start + 1:,})") from None
    return text


def text_of(file: str) -> str:
    """A whole text file, its line ends as \\n; one of READ_ERRORS where it is no text."""
    with opened_text(file) as stream:
        return plain(stream.read())


def plain(text: str) -> str:
    """The text itself; ValueError where its bytes are something else: no UTF-8, or no text."""
    if "\0" in text:
        raise ValueError("holds NUL characters: not text, or UTF-16 without its byte order mark; store it as UTF-8")
    return valid(text)
