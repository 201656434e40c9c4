"""Trained tokens: byte-pair encoding by the `tokenizers` library, GPT-2's files, and padding.

`tokenizers` does the work; here it gets the interface of `Characters` and `Bytes`, and every byte a way back.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["BytePair", "pad"]

END = "<|endoftext|>"


class BytePair:
    """A byte-pair vocabulary: 256 bytes, and the frequent neighbors that training merged. Any text, any bytes.

        tokens = BytePair.train(text("english"), 1024)
        tokens.decode(tokens.encode("naïve"))  # "naïve"

    `BytePair.train`, `BytePair.gpt2` and `BytePair.load` make one. The token `END` ("<|endoftext|>"), where the
    vocabulary has it, stands for the end of a document wherever a text contains these characters.
    Source: "Neural Machine Translation of Rare Words with Subword Units", 2016; over bytes: GPT-2, 2019.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        known = tokenizer.get_vocab()
        if missing := [byte for byte, sign in enumerate(_signs()) if sign not in known]:
            raise ValueError(f"not a vocabulary over bytes: {len(missing)} of 256 have no token, first {missing[0]}")
        if sorted(known.values()) != list(range(len(known))):
            raise ValueError(f"the ids of {len(known)} tokens must be 0 to {len(known) - 1}, each once")
        back = {sign: bytes([byte]) for byte, sign in enumerate(_signs())}
        in_order = sorted(known, key=known.get)
        self._bytes = [b"".join(back.get(sign, sign.encode()) for sign in token) for token in in_order]
        self._of_byte = [known[sign] for sign in _signs()]

    @classmethod
    def train(cls, text: str | Iterable[str], size: int = 1024) -> BytePair:
        """Merge the most frequent neighbors of a text (or several) until there are `size` tokens, END among them.

        The same text gives the same tokens. A short text may have fewer pairs to merge than asked for. ValueError
        unless size is at least 257.
        """
        from tokenizers import models, pre_tokenizers, trainers

        if size < 257:
            raise ValueError(f"size must be at least 257 (all bytes and the end token), got {size}")
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
        )
        tokenizer = _over_bytes(models.BPE())
        tokenizer.train_from_iterator([text] if isinstance(text, str) else text, trainer)
        return cls(tokenizer)

    @classmethod
    def gpt2(cls, vocabulary: str | Path, merges: str | Path) -> BytePair:
        """The tokenizer of GPT-2, from its published `vocab.json` and `merges.txt`."""
        from tokenizers import models

        for path in (vocabulary, merges):
            if not Path(path).is_file():
                raise FileNotFoundError(f"no file {path}")
        try:
            tokenizer = _over_bytes(models.BPE.from_file(str(vocabulary), str(merges)))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{vocabulary} and {merges} are no tokenizer: {error}") from error
        if END in tokenizer.get_vocab():
            tokenizer.add_special_tokens([END])
        return cls(tokenizer)

    def save(self, path: str | Path) -> None:
        """Write the vocabulary in the format of the `tokenizers` library (`tokenizer.json`)."""
        self.tokenizer.save(str(path))

    @classmethod
    def load(cls, path: str | Path) -> BytePair:
        """Read what `save` wrote."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_str(Path(path).read_text(encoding="utf-8")))

    def __len__(self) -> int:
        return len(self._bytes)

    @property
    def end(self) -> int | None:
        """The id of the end token, None where the vocabulary has none."""
        return self.tokenizer.token_to_id(END)

    def encode(self, text: str | bytes) -> Int[Tensor, "n"]:
        """Token ids of a text; bytes that are not UTF-8 become one token each."""
        if isinstance(text, bytes):
            text = text.decode(errors="surrogateescape")
        ids: list[int] = []
        for piece in re.split("([\udc80-\udcff]+)", text):
            if re.match("[\udc80-\udcff]", piece):
                ids += [self._of_byte[ord(sign) - 0xDC00] for sign in piece]
            else:
                ids += self.tokenizer.encode(piece, add_special_tokens=False).ids
        return torch.tensor(ids, dtype=torch.long)

    def decode(self, ids) -> str:
        """The text of token ids; bytes that are not UTF-8 become \ufffd."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids) -> bytes:
        """The bytes of token ids. ValueError for an id that is no token."""
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < len(self)]:
            raise ValueError(f"token id {wrong[0]} is outside the vocabulary of {len(self)} tokens")
        return b"".join(self._bytes[i] for i in ids)

    def pieces(self, text: str | bytes) -> list[str]:
        """The tokens of a text as strings, to look at."""
        return [self.decode([i]) for i in self.encode(text)]


def _over_bytes(model):
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@functools.cache
def _signs() -> list[str]:
    """GPT-2's printable sign for each of the 256 bytes: itself where it is visible, else the next from 256 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    other = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(other)) for byte in range(256)]


def pad(sequences: Sequence, value: int = 0, side: str = "right") -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Sequences of token ids side by side, as long as the longest: ids (b, n), and True at real tokens (b, n).

    side   "right" for training; "left" for prompts that are to be continued
    """
    if side not in ("right", "left") or not len(sequences):
        raise ValueError(f"pad needs a sequence and a side 'right' or 'left', got {len(sequences)} and {side!r}")
    rows = [torch.as_tensor(row, dtype=torch.long) for row in sequences]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)  # (b, n)
    place = torch.arange(ids.shape[1])
    real = place < lengths[:, None] if side == "right" else place >= ids.shape[1] - lengths[:, None]  # (b, n)
    return ids, real
