"""Text to token numbers and back: bytes (nothing to install), or a byte-level BPE trained here on the training text.

Both are exact: `decode(encode(text)) == text` for every text they accept. A tokenizer's `record()` is plain JSON, so
that a checkpoint carries it whole; `tokenizer_from_record` rebuilds it. Token numbers are uint16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

MAX_VOCAB = 65_535
BYTE_VALUES = 256
INSTALL_TOKENIZERS = "pip install 'tokenizers>=0.23'"


class TokenizerError(ValueError):
    """Text or a vocabulary that a tokenizer cannot serve."""


class Tokenizer(Protocol):
    """What a corpus asks of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def token_bytes(self) -> np.ndarray:
        """int32 (vocab_size,): how many bytes of text each token stands for; for bits per byte."""

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Each text on its own -> uint16 (tokens,)."""

    def decode(self, tokens: np.ndarray | Sequence[int]) -> bytes: ...

    def record(self) -> dict[str, Any]:
        """Plain JSON from which `tokenizer_from_record` makes the same tokenizer."""


class ByteTokenizer:
    """Token number = byte value. Takes any bytes."""

    vocab_size = BYTE_VALUES

    @cached_property
    def token_bytes(self) -> np.ndarray:
        return np.ones(BYTE_VALUES, dtype=np.int32)

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, dtype=np.uint8).astype(np.uint16) for text in texts]

    def decode(self, tokens: np.ndarray | Sequence[int]) -> bytes:
        return np.asarray(tokens).astype(np.uint8).tobytes()

    def record(self) -> dict[str, Any]:
        return {"kind": "bytes"}


class BpeTokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016 over GPT-2's byte alphabet); takes UTF-8 text.

    `json_text` is the file form of the `tokenizers` package, which does the work and is imported only here.
    """

    def __init__(self, json_text: str) -> None:
        self._json = json_text
        self._inner = _tokenizers().Tokenizer.from_str(json_text)
        self.vocab_size: int = self._inner.get_vocab_size()
        if self.vocab_size > MAX_VOCAB:
            raise TokenizerError(f"this tokenizer has {self.vocab_size} tokens; at most {MAX_VOCAB} fit 16 bits")

    @classmethod
    def train(cls, texts: Sequence[bytes], vocab_size: int) -> BpeTokenizer:
        """Learn `vocab_size` tokens from `texts` (UTF-8): the 256 bytes, and the merges that occur most."""
        lib = _tokenizers()
        inner = lib.Tokenizer(lib.models.BPE())
        inner.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        inner.decoder = lib.decoders.ByteLevel()
        trainer = lib.trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(lib.pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
            show_progress=False,
        )
        inner.train_from_iterator((_utf8(text) for text in texts), trainer=trainer, length=len(texts))
        found = inner.get_vocab_size()
        if found < vocab_size:
            raise TokenizerError(
                f"the training text has merges for {found} tokens only, vocab_size={vocab_size} was asked: "
                f"set vocab_size={found} or less, or give more text"
            )
        return cls(inner.to_str())

    @cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes behind each token number."""
        value = {char: byte for byte, char in _byte_alphabet().items()}
        return [bytes(value[c] for c in self._inner.id_to_token(i)) for i in range(self.vocab_size)]

    @cached_property
    def token_bytes(self) -> np.ndarray:
        return np.array([len(piece) for piece in self._pieces], dtype=np.int32)

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        encodings = self._inner.encode_batch_fast([_utf8(text) for text in texts], add_special_tokens=False)
        return [np.array(e.ids, dtype=np.uint16) for e in encodings]

    def decode(self, tokens: np.ndarray | Sequence[int]) -> bytes:
        """Also for cuts through the middle of a character, which a decoder to text could not give back."""
        return b"".join(self._pieces[int(i)] for i in tokens)

    def record(self) -> dict[str, Any]:
        return {"kind": "bpe", "json": self._json}


def tokenizer_from_record(record: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that wrote `record`. Raises `TokenizerError` for a kind that is not known here."""
    kind = record.get("kind")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        return BpeTokenizer(record["json"])
    raise TokenizerError(f"tokenizer kind {kind!r} is not known here; known: bytes, bpe")


def _utf8(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"byte {error.start} (0x{text[error.start]:02x}) is not UTF-8, which bpe needs: "
            "convert the text to UTF-8, or use tokenizer=bytes, which takes any encoding"
        ) from error


def _byte_alphabet() -> dict[int, str]:
    """Byte -> printable character, as GPT-2's vocabulary files write bytes (Radford et al. 2019, `encoder.py`).

    Printable Latin-1 characters stand for themselves; the other 68 bytes get the characters from 256 on, in order.
    """
    keep = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    rest = iter(range(BYTE_VALUES, 2 * BYTE_VALUES))
    return {byte: chr(byte) if byte in keep else chr(next(rest)) for byte in range(BYTE_VALUES)}


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise TokenizerError(
            f"tokenizer=bpe needs the package `tokenizers`: {INSTALL_TOKENIZERS}; or use tokenizer=bytes"
        ) from error
    return tokenizers
