"""The decoder against the event stream format of the HTML standard, section 9.2.6."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_unified.errors import ResponseTooLargeError
from vllm_unified.wire.sse import ServerSentEvent, SSEDecoder

LIMIT = 2**23


def standard(stream: str) -> list[tuple[str, str]]:
    """The standard's algorithm, step by step, on the whole decoded stream: (type, data) pairs."""
    lines, line, at = [], "", 0
    stream = stream.removeprefix("\ufeff")
    while at < len(stream):
        character = stream[at]
        if character == "\r" and stream[at + 1 : at + 2] == "\n":
            at += 1
        if character in "\r\n":
            lines.append(line)
            line = ""
        else:
            line += character
        at += 1
    # What follows the last line end is an incomplete line, and never processed.
    dispatched = []
    data, kind = "", ""
    for line in lines:
        if line == "":
            if data != "":
                dispatched.append((kind or "message", data.removesuffix("\n")))
            data, kind = "", ""
        elif line.startswith(":"):
            continue
        else:
            name, colon, value = line.partition(":")
            if colon and value.startswith(" "):
                value = value[1:]
            if name == "event":
                kind = value
            elif name == "data":
                data += value + "\n"
    return dispatched


def decode(*packets: bytes, limit: int = LIMIT) -> list[ServerSentEvent]:
    decoder = SSEDecoder(max_event_bytes=limit)
    return [event for packet in packets for event in decoder.feed(packet)]


def as_pairs(events: list[ServerSentEvent]) -> list[tuple[str, str]]:
    return [(event.event, event.data.decode()) for event in events]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


line_ends = st.sampled_from(["\n", "\r", "\r\n"])
pieces = st.one_of(
    line_ends,
    st.sampled_from(
        [
            "data",
            "data:",
            "data: ",
            "data:  ",
            "event: ping",
            "event:",
            "id: 7",
            "retry: 9",
            ":",
            ": keep-alive",
            "\ufeff",
            "\u2028",
            "\x85",
            "\x0b",
            "\x0c",
            "\x1c",
            "\0",
            "é",
            "🐉",
            "dat",
            "Data: x",
            " data: x",
            "event",
            "data: [DONE]",
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
streams = st.lists(pieces, max_size=40).map("".join)


@given(streams, st.lists(st.integers(0, 2000), max_size=12))
@example("\ufeffdata: a\r\n\r\ndata: b\n\n", [1, 2, 13])
@example("\r\n\r\ndata:x\r\r", [1, 2, 3])
def test_any_split_gives_what_the_standard_says(stream: str, places: list[int]) -> None:
    assert as_pairs(decode(*cut(stream.encode(), places))) == standard(stream)


@given(streams)
def test_byte_by_byte_gives_what_the_standard_says(stream: str) -> None:
    packets = [bytes([byte]) for byte in stream.encode()]

    assert as_pairs(decode(*packets)) == standard(stream)


@given(st.lists(st.text(), min_size=1, max_size=6), st.data())
def test_json_comes_through_whatever_the_line_ends_and_packets(
    texts: list[str], data: st.DataObject
) -> None:
    """The characters that split lines of text, U+2028 and others, are ordinary here."""
    stream = b""
    for text in texts:
        end = data.draw(line_ends).encode()
        payload = json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "surrogatepass")
        stream += b"data: " + payload + end + end
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))

    events = decode(*cut(stream, places))

    assert [event.data for event in events] == [
        json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "surrogatepass")
        for text in texts
    ]


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=6))
def test_bytes_that_are_no_text_raise_nothing_and_the_split_does_not_matter(
    stream: bytes, places: list[int]
) -> None:
    assert decode(*cut(stream, places)) == decode(stream)


@pytest.mark.parametrize(
    ("stream", "data"),
    [
        (b"data: a\ndata: b\ndata\n\n", [b"a\nb\n"]),
        (b"data:\n\n", [b""]),
        (b"data\n\n", [b""]),
        (b"data:  two spaces\n\n", [b" two spaces"]),
        (b"data: a: b\n\n", [b"a: b"]),
        (b"event: only a type\n\n", []),
        (b": keep-alive\n\n: keep-alive\n\n", []),
        (b"data: the end is missing\n", []),
        (b"data: a\n\n\n\n\ndata: b\n\n", [b"a", b"b"]),
    ],
)
def test_examples(stream: bytes, data: list[bytes]) -> None:
    assert [event.data for event in decode(stream)] == data


def test_an_event_type_lasts_for_one_event() -> None:
    events = decode(b"event: error\ndata: 1\n\ndata: 2\n\n")

    assert [event.event for event in events] == ["error", "message"]


@pytest.mark.parametrize("at", [1, 2])
def test_a_byte_order_mark_may_be_cut(at: int) -> None:
    stream = b"\xef\xbb\xbfdata: a\n\n"

    assert [event.data for event in decode(stream[:at], stream[at:])] == [b"a"]


def test_a_line_of_4_mb_in_small_packets_takes_linear_time() -> None:
    line = b"data: " + b"x" * 4 * 2**20 + b"\n\n"
    packets = [line[at : at + 512] for at in range(0, len(line), 512)]
    started = time.process_time()

    events = decode(*packets)

    # 8,193 packets: a decoder that scans or copies from the start each time moves 17 GB.
    assert time.process_time() - started < 1
    assert len(events[0].data) == 4 * 2**20


@pytest.mark.parametrize(
    "stream",
    [
        b"data: " + b"x" * 100,
        b"data: " + b"x" * 60 + b"\ndata: " + b"x" * 60,
        b":" + b"x" * 100,
        b"data\n" * 200,
    ],
    ids=["a line", "many lines", "a comment", "empty lines of data"],
)
def test_what_is_too_large_raises_before_it_is_complete(stream: bytes) -> None:
    packets = [stream[at : at + 7] for at in range(0, len(stream), 7)]

    with pytest.raises(ResponseTooLargeError):
        decode(*packets, b"\n", limit=100)


def test_the_limit_is_for_one_event_and_not_for_the_stream() -> None:
    assert len(decode(b"data: 0123456789\n\n" * 50, limit=20)) == 50
