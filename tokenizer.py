"""Text to ids and back: SentencePiece, and the spelling of rationales (authors' code).

Left out: special tokens that are written out in text, such as `<extra_id_0>`, and normalisation,
which SentencePiece brings with its model.

    python tokenizer.py        # a rationale in GSM8K's spelling, in T5's, and in pieces
"""

import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

PAD_ID = 0
EOS_ID = 1
UNKNOWN_ID = 2
N_SENTINELS = 100  # ids behind the pieces, for pre-training
MAX_QUESTION = 200  # authors' code: longer questions are cut (tokens)
MAX_RATIONALE = 300  # authors' code: longer rationales are cut in training (tokens)


class Tokenizer:
    """T5's tokenizer: the pieces of a spiece.model.

    Flan-T5's table of 32,128 ids holds 32,000 pieces, 100 sentinels and 28 ids without any meaning.
    DIFFERS: text never turns into sentinels, nor they into text; only pre-training uses them.
    """

    def __init__(self, path: str | Path):
        """path: a spiece.model, or the checkpoint folder that holds one.

        Raises FileNotFoundError, or ValueError for a file that is no T5 vocabulary.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "spiece.model"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: a checkpoint folder needs its spiece.model"
            )
        try:
            proto = path.read_bytes()
            self.sentencepiece = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError:
            raise ValueError(f"{path} is not a SentencePiece model: fetch it again") from None
        special = (
            self.sentencepiece.pad_id(),
            self.sentencepiece.eos_id(),
            self.sentencepiece.unk_id(),
        )
        if special != (PAD_ID, EOS_ID, UNKNOWN_ID):
            raise ValueError(
                f"{path} has the ids {special} for padding, end and unknown: "
                f"T5's are {PAD_ID}, {EOS_ID}, {UNKNOWN_ID}"
            )
        self.n_pieces = self.sentencepiece.get_piece_size()
        self.vocab_size = self.n_pieces + N_SENTINELS

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Turn text into ids that end in EOS, at most max_length of them, the EOS included."""
        ids = self.sentencepiece.encode(text)
        if max_length is not None:
            ids = ids[: max_length - 1]
        return ids + [EOS_ID]

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text. Special ids, unknown ones included, are left out."""
        return self.sentencepiece.decode([i for i in ids if UNKNOWN_ID < i < self.n_pieces])

    def piece(self, i: int) -> str:
        """The text of one id as it stands in a sentence: with a leading space where it has one."""
        if UNKNOWN_ID < i < self.n_pieces:
            return self.sentencepiece.id_to_piece(i).replace("▁", " ")
        return ""

    def piece_set(self, text: str) -> frozenset[str]:
        """The distinct pieces of a text, by which similarity is measured."""
        return frozenset(self.sentencepiece.encode(text, out_type=str))


def pad_batch(
    rows: Sequence[Sequence[int]], device: torch.device | str = "cpu", padding: int = PAD_ID
) -> tuple[Tensor, Tensor]:
    """Stack rows of ids, right-padded, to (B, longest) int64, and a mask: 1 on real ids."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), padding)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


# Signs that T5's vocabulary lacks.
# DIFFERS: the authors let them become <unk>; here the arithmetic stays readable.
KNOWN_SIGNS = str.maketrans(
    {"×": "*", "÷": "/", "−": "-", "½": "1/2", "¼": "1/4", "¾": "3/4", "`": "'"}
)


def format_rationale(text: str) -> str:
    r"""Spell a GSM8K rationale in T5's vocabulary, which has neither `<` nor line breaks.

    `She sold 48/2 = <<48/2=24>>24 clips.\n#### 24` becomes
    `She sold 48 / 2 = [ 48 / 2 = 24] 24 clips. #### 24`. Source: authors' code, data_module.py.
    """
    text = re.sub(r"(?<=\d)[½¼¾]", r" \g<0>", text)  # 2½ is not 21/2
    text = text.translate(KNOWN_SIGNS)
    text = re.sub(r"<<(\d+)=\1>>", "", text)  # an annotation that only restates a number
    text = re.sub(r"(?<=\D):(?=\d)", ": ", text)  # but 5:30 is a time of day
    text = text.replace("<<", "[ ").replace(">>", "] ")
    text = re.sub("#### ?", "#### ", text)  # exactly one space behind the mark
    text = re.sub(r"\$(?=\S)", "$ ", text)
    # A match uses up both neighbours, so 2+3+4 becomes 2 + 3+4: as in the authors' training text.
    for sign in "+-*/=":
        text = re.sub(rf"(\S)\{sign}(\S)", rf"\1 {sign} \2", text)
    lines = []
    for line in text.splitlines():
        if not line.startswith("##") and not line.endswith("."):
            line += "."
        lines.append(line)
    return " ".join(lines)


def main() -> None:
    raw = "Tom sold 48/2 = <<48/2=24>>24 cards.\nHe has 90-24 = <<90-24=66>>66 left.\n#### 66"
    formatted = format_rationale(raw)
    tokenizer = Tokenizer(Path(__file__).parent / "data" / "tiny")
    pieces = [repr(tokenizer.piece(i)) for i in tokenizer.encode(formatted)]
    print(f"raw:       {raw!r}")
    print(f"formatted: {formatted!r}")
    print(f"pieces:    {' '.join(pieces)}")


if __name__ == "__main__":
    main()
