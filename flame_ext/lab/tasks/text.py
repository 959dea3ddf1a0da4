"""A slice of plain text, to see what an objective costs or gains in modelling language."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from flame_ext.errors import ConfigError
from flame_ext.lab.tasks.task import FIRST_WORD, Array, Task

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Text(Task):
    """Pieces of documents, a token a byte, with EOS after each piece. Training and held-out pieces are of different documents.

    Nothing is generated: the figures are the held-out loss and the share of tokens that the model finds likeliest.
    """

    evaluation: ClassVar[Literal["exact", "creative", "none"]] = "none"

    documents: str = ""
    """A folder whose files ``*.txt`` are documents, every tenth of them held out. Empty: the sources of Python's standard library."""

    piece: int = 128
    """Bytes of a piece."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require({"piece": 2})

    def words(self) -> list[str]:
        """The character by which tokenizers of bytes name each byte."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        names = bytes_to_unicode()
        return [names[byte] for byte in range(256)]

    @property
    def prompt(self) -> int:
        return 0

    @property
    def length(self) -> int:
        return self.piece + 1

    def rows(self) -> tuple[Array, Array]:
        import numpy as np

        train, test = self._documents()
        rng = np.random.default_rng(self.seed)
        held_out = self._pieces(test, self.test, rng, set())
        return self._pieces(train, self.train, rng, {row.tobytes() for row in held_out}), held_out

    def _documents(self) -> tuple[Iterable[str], Iterable[str]]:
        if not self.documents:
            from flame_ext.data.python_stdlib import read_stdlib

            return chain(read_stdlib("pretrain"), read_stdlib("train")), read_stdlib("validation")
        files = sorted(Path(self.documents).rglob("*.txt"))
        if len(files) < 2:
            raise ConfigError(f"documents {self.documents!r}: found {len(files)} files *.txt, expected at least 2")
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        return [text for i, text in enumerate(texts) if i % 10], texts[::10]

    def _pieces(self, texts: Iterable[str], count: int, rng: np.random.Generator, without: set[bytes]) -> Array:
        """(count, length) whole pieces, drawn from all that are not in ``without``; ConfigError if there are fewer."""
        import numpy as np

        found: dict[bytes, Array] = {}
        for text in texts:
            data = np.frombuffer(text.encode(), np.uint8).astype(np.int64) + FIRST_WORD
            whole = data[: len(data) // self.piece * self.piece].reshape(-1, self.piece)
            for row in np.pad(whole, ((0, 0), (0, 1))):
                found.setdefault(row.tobytes(), row)
        kept = [row for key, row in found.items() if key not in without]
        if len(kept) < count:
            raise ConfigError(
                f"Text: {count} pieces of {self.piece} bytes wanted, {len(kept)} found; ask for fewer or shorter ones"
            )
        return np.stack([kept[i] for i in rng.permutation(len(kept))[:count]])
