"""Text to ids and back: SentencePiece, and the spelling of rationales, as in the authors' code.

Questions are used unchanged. Left out: special tokens that are spelled in a text, such as
`<extra_id_0>`, and Unicode normalisation, which SentencePiece does by itself.

    python tokenizer.py        # a rationale in GSM8K's spelling, in T5's, and in pieces
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.checkpoints import read_vocabulary

PAD_ID = 0
EOS_ID = 1
UNKNOWN_ID = 2
N_SENTINELS = 100  # ids after the pieces, used in pre-training only
MAX_QUESTION = 200  # authors' code: longer questions are cut (tokens)
MAX_RATIONALE = 300  # authors' code: longer rationales are cut in training (tokens)


class Tokenizer:
    """T5's tokenizer: the pieces of a spiece.model.

    Flan-T5's 32,128 ids are 32,000 pieces, 100 sentinels and 28 unused ids; the first three
    pieces are padding, end and unknown.
    DIFFERS: text never turns into sentinels, nor sentinels into text; only pre-training uses them.
    """

    def __init__(self, path: str | Path):
        """path: a spiece.model, or the checkpoint folder that holds one.

        Raises FileNotFoundError, or ValueError for a file that is not a T5 vocabulary.
        """
        self.sentencepiece = read_vocabulary(Path(path))
        self.n_pieces = self.sentencepiece.get_piece_size()
        self.vocab_size = self.n_pieces + N_SENTINELS  # models round it up to a multiple of 128

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Turn text into ids that end in EOS; no more than max_length ids, EOS included."""
        ids = self.sentencepiece.encode(text)
        if max_length is not None:
            ids = ids[: max_length - 1]
        return ids + [EOS_ID]

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text. Special ids, including the unknown one, are left out."""
        return self.sentencepiece.decode([i for i in ids if UNKNOWN_ID < i < self.n_pieces])

    def piece(self, i: int) -> str:
        """The text of one piece as it appears in a sentence, leading space included."""
        if UNKNOWN_ID < i < self.n_pieces:
            return self.sentencepiece.id_to_piece(i).replace("▁", " ")
        return ""

    def piece_set(self, text: str) -> frozenset[str]:
        """The distinct pieces of a text; selftrain.jaccard compares these."""
        return frozenset(self.sentencepiece.encode(text, out_type=str))


def pad_batch(
    rows: Sequence[Sequence[int]], device: torch.device | str = "cpu", padding: int = PAD_ID
) -> tuple[Tensor, Tensor]:
    """Stack rows of ids, padded on the right, to (B, longest) int64; and a mask, 1 on real ids."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), padding)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


# Characters that T5's vocabulary lacks, respelled.
# DIFFERS: the authors let them become <unk>; here the arithmetic stays readable.
KNOWN_SIGNS = str.maketrans(
    {"×": "*", "÷": "/", "−": "-", "½": "1/2", "¼": "1/4", "¾": "3/4", "`": "'"}
)


def format_rationale(text: str) -> str:
    r"""Spell a GSM8K rationale in T5's vocabulary, which has neither `<` nor line breaks.

    Source: authors' code, data_module.py.

    >>> format_rationale("She sold 48/2 = <<48/2=24>>24 clips.\n#### 24")
    'She sold 48 / 2 = [ 48 / 2 = 24] 24 clips. #### 24'
    """
    text = re.sub(r"(?<=\d)[½¼¾]", r" \g<0>", text)  # 2½ is not 21/2
    text = text.translate(KNOWN_SIGNS)
    text = re.sub(r"<<(\d+)=\1>>", "", text)  # an annotation that only restates a number
    text = re.sub(r"(?<=\D):(?=\d)", ": ", text)  # but not in 5:30
    text = text.replace("<<", "[ ").replace(">>", "] ")
    text = re.sub("#### ?", "#### ", text)  # at least one space after the mark
    text = re.sub(r"\$(?=\S)", "$ ", text)
    # A match consumes both neighbours, so 2+3+4 becomes 2 + 3+4, as in the authors' training text.
    # DIFFERS: =-18 becomes = -18, as the calculator writes it; the authors make it = - 18.
    for sign in "+-*/=":
        text = re.sub(rf"([^\s=])\{sign}(\S)", rf"\1 {sign} \2", text)
    lines = []
    for line in text.replace("\r\n", "\n").strip("\n").split("\n"):
        if not line.startswith("##") and not line.endswith("."):
            line += "."
        lines.append(line)
    return " ".join(lines)


def main() -> None:
    raw = "Tom sold 48/2 = <<48/2=24>>24 cards.\nHe has 90-24 = <<90-24=66>>66 left.\n#### 66"
    formatted = format_rationale(raw)
    tokenizer = Tokenizer(Path(__file__).parent / "data" / "tiny")
    pieces = [repr(tokenizer.piece(i) or "</s>") for i in tokenizer.encode(formatted)]
    print(f"raw:       {raw!r}")
    print(f"formatted: {formatted!r}")
    print(f"pieces:    {' '.join(pieces)}")


if __name__ == "__main__":
    main()
