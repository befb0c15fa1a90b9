"""A document's identity, and what follows from it alone: its side of the split, its rank, its place.

Everything about a document is read off a hash of (seed, text). So the same text always lands on the same
side of the train/validation split, and neither file order, worker count nor a restart can change a sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

from conf.models import pretrain_tokens
from conf.schema import Config
from data.chats import is_chat

TRAIN, VALIDATION = "train", "validation"
SIDES = (TRAIN, VALIDATION)
LONGEST = 200_000  # characters; a longer text is cut into several documents of the same side
MOST_HELD_OUT = 0.5


def train_tokens(config: Config) -> int:
    """The budget in whole sequences: data.tokens, else data.fraction of the model's pretraining tokens."""
    tokens = config.data.tokens or config.data.fraction * pretrain_tokens(config)
    return whole_sequences(tokens, config.data.sequence_length)


def whole_sequences(tokens: float, length: int) -> int:
    return -int(-tokens // length) * length


@dataclass(frozen=True)
class Split:
    """Which documents are held out: those whose hash falls into the last `held_out` of its range."""

    seed: int
    held_out: float

    @classmethod
    def of(cls, config: Config) -> "Split":
        """Twice what validation needs of a corpus that just fits, since few documents make an uneven draw.

        At least 1 %, so that held-out text is found without reading far.
        """
        wanted, budget = config.data.validation_tokens, train_tokens(config)
        return cls(config.data.seed, min(MOST_HELD_OUT, max(0.01, 2 * wanted / (wanted + budget))))

    def key(self, text: str) -> bytes:
        """16 bytes: the first half ranks documents for selection, the second orders those selected."""
        return blake2b(text.encode("utf-8", "replace"), digest_size=16, key=str(self.seed).encode()).digest()

    def place(self, key: bytes) -> tuple[str, float]:
        """Side, and rank in [0, 1) within that side: the lowest ranks are taken first."""
        position, edge = unit(key), 1 - self.held_out
        if position < edge:
            return TRAIN, position / edge
        return VALIDATION, (position - edge) / self.held_out


def unit(key: bytes) -> float:
    """The first 8 bytes of a hash as a number in [0, 1)."""
    return (int.from_bytes(key[:8], "big") >> 11) / 2**53


def name_rank(seed: int, name: str) -> bytes:
    """Sort key of files: a shuffle that depends on seed and name alone."""
    return blake2b(name.encode(), digest_size=16, key=str(seed).encode()).digest()


def pieces(key: bytes, text: str) -> Iterator[tuple[bytes, str]]:
    """A text with its key; a very long one in pieces cut at line ends, which share rank and side. Chats stay whole."""
    start, number = 0, 0
    while len(text) - start > LONGEST and not is_chat(text):
        end = text.rfind("\n", start + LONGEST // 2, start + LONGEST) + 1 or start + LONGEST
        yield piece_key(key, number), text[start:end]
        start, number = end, number + 1
    yield (piece_key(key, number) if number else key), text[start:]


def piece_key(key: bytes, number: int) -> bytes:
    return key[:8] + blake2b(key[8:] + number.to_bytes(8, "big"), digest_size=8).digest()


def shuffled_key(key: bytes) -> bytes:
    """Order of packing: independent of the rank, or small shares of large corpora would all come first."""
    return key[8:] + key[:8]
