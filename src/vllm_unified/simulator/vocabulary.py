"""The fixed vocabulary: special tokens, every byte, pairs of letters, words and punctuation.

Nothing is downloaded. Ids never change between versions of one release line, so that recorded
token ids stay valid.
"""

from __future__ import annotations

from string import ascii_lowercase

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Special tokens, in the order of their ids, which start at 0."""
END_OF_TEXT, IM_START, IM_END = range(3)
FIRST_BYTE = len(SPECIAL)
"""Id of the byte 0x00; the byte ``b`` has the id ``FIRST_BYTE + b``."""

WORDS = tuple(
    """the a of and to in is that it was for on with as be at by this have from or one had not but
    what all were when we there can an your which their said if do will each about how up out them
    then she many some so these would other into has more her two like him see time could no make
    than first been its who now people my made over did down only way find use may water long
    little very after words called just where most know get through back much before go good new
    write our used me man too any day same right look think also around another came come work
    three must because does part even place well such here take why help put different away again
    off went old number great tell men say small every found still between name should home big
    give air line set own under read last never us left end along while might next sound below saw
    something thought both few those always looked show large often together asked house world
    going want school important until form food keep children feet land side without boy once
    animal life enough took sometimes four head above kind began almost live page got earth need
    far hand high year mother light country father let night picture being study second soon story
    since white ever paper hard near sentence better best across during today however sure knew try
    told young sun thing whole hear example heard several change answer room sea against top turned
    learn point city play toward five himself usually money seen car morning long-term system model
    token server request response stream user assistant system hello capital France Paris question
    I You The A It We They He She This That In What How Why Yes No Once Here There""".split()
)
PUNCTUATION = (". ", ", ", "; ", ": ", "! ", "? ", "\n", "\n\n", " - ", ".", ",", '"', "'s")
CHARACTERS = tuple("你好世界語日本한국éüßñøλπЖ😀🚀🌍🎉🙂👍")
"""Characters that the model likes to say and that take two to four byte tokens each."""


def _pieces() -> tuple[bytes, ...]:
    words = dict.fromkeys(WORDS)
    pieces = [name.encode() for name in SPECIAL]
    pieces += [bytes([value]) for value in range(256)]
    pieces += [(a + b).encode() for a in ascii_lowercase for b in ascii_lowercase]
    pieces += [f" {letter}".encode() for letter in ascii_lowercase]
    pieces += [f" {word}".encode() for word in words]
    pieces += [word.encode() for word in words]
    pieces += [mark.encode() for mark in PUNCTUATION]
    unique: dict[bytes, None] = {}
    for index, piece in enumerate(pieces):
        # A special token may never be spelt by text pieces, so only those are kept by position.
        if index < FIRST_BYTE or piece not in unique:
            unique[piece] = None
    return tuple(unique)


PIECES = _pieces()
"""Bytes of every token, by id."""
IDS = {piece: index for index, piece in enumerate(PIECES)}
"""Id of every piece."""
SIZE = len(PIECES)
"""Number of tokens."""
LONGEST = max(map(len, PIECES))
"""Bytes of the longest token."""
EOS = IM_END
"""The token that ends an answer."""
