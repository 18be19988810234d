"""Text to ids and back: SentencePiece, and the spelling of rationales (paper, section 4.1).

Left out: special tokens written out in text, as `<extra_id_0>`, and normalisation (SentencePiece brings its own).

    python tokenizer.py        # a rationale in GSM8K's spelling, in T5's, and in pieces"""

import re
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2
MAX_QUESTION, MAX_RATIONALE = 200, 300  # authors' code: longer texts are cut (tokens)

class Tokenizer:
    """T5's tokenizer: the pieces of spiece.model, and 100 sentinels for pre-training.  DIFFERS: no text means or shows them."""
    def __init__(self, path: str | Path):
        """path: a spiece.model, or the checkpoint folder that holds one. Raises FileNotFoundError or ValueError."""
        path = Path(path) / "spiece.model" if Path(path).is_dir() else Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: a checkpoint folder needs its spiece.model")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError:
            raise ValueError(f"{path} is not a SentencePiece model: fetch it again") from None
        if (found := (self.pieces.pad_id(), self.pieces.eos_id(), self.pieces.unk_id())) != (PAD_ID, EOS_ID, UNKNOWN_ID):
            raise ValueError(f"{path} has padding, end and unknown ids {found}; T5 needs {PAD_ID, EOS_ID, UNKNOWN_ID}")
        self.n_pieces = self.pieces.get_piece_size()
        self.vocab_size = self.n_pieces + 100  # sentinels

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Turn text into ids that end in EOS, at most max_length of them (the EOS stays when text is cut)."""
        return self.pieces.encode(text)[: max_length - 1 if max_length else None] + [EOS_ID]

    def decode(self, ids: list[int]) -> str:
        """Turn ids into text. Padding, EOS, sentinels and ids without a piece (the model's table is larger) vanish."""
        return self.pieces.decode([i for i in ids if EOS_ID < i < self.n_pieces])

    def piece(self, i: int) -> str:
        """The text of one id as it appears inside a sentence (a leading space where the piece has one), or ''."""
        return self.pieces.id_to_piece(i).replace("▁", " ") if UNKNOWN_ID < i < self.n_pieces else ""

    def piece_set(self, text: str) -> frozenset[str]:
        """The distinct pieces of a text, by which similarity is measured."""
        return frozenset(self.pieces.encode(text, out_type=str))

def pad_batch(rows: list[list[int]], padding: int = PAD_ID) -> tuple[Tensor, Tensor]:
    """Stack rows of ids to the right-padded (B, longest) int64, with a mask of the same shape: 1 on real ids."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])

# Signs that T5's vocabulary lacks.  DIFFERS: the authors let them become <unk>; here the arithmetic stays readable.
KNOWN_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "½": "1/2", "¼": "1/4", "¾": "3/4", "`": "'"})

def format_rationale(text: str) -> str:
    """Respell a GSM8K rationale in T5's vocabulary, which has neither `<<` nor line breaks. Source: authors' code, data_module.py.
    `She sold 48/2 = <<48/2=24>>24 clips.\\n#### 24` -> `She sold 48 / 2 = [ 48 / 2 = 24] 24 clips. #### 24`."""
    text = re.sub(r"<<(\d+)=\1>>", "", text.translate(KNOWN_SIGNS))  # an annotation that only restates a number
    text = re.sub(r"(?<=\D):(?=\d)", ": ", text)  # but 5:30 is a time of day
    text = text.replace("<<", "[ ").replace(">>", "] ").replace("####", "#### ").replace("####  ", "#### ")
    text = re.sub(r"\$(?=\S)", "$ ", text)
    # A match uses up both neighbours, so 2+3+4 becomes 2 + 3+4: kept, because the authors' training text has it so.
    for sign in "+-*/=":
        text = re.sub(rf"(\S)\{sign}(\S)", rf"\1 {sign} \2", text)
    return " ".join(line if line.startswith("##") or line.endswith(".") else line + "." for line in text.split("\n"))

if __name__ == "__main__":
    raw = "Tom sold 48/2 = <<48/2=24>>24 cards.\nHe has 90-24 = <<90-24=66>>66 left.\n#### 66"
    tokenizer = Tokenizer(Path(__file__).parent / "data" / "tiny")
    pieces = " ".join(repr(tokenizer.piece(i)) for i in tokenizer.encode(format_rationale(raw)))
    print(f"raw:       {raw!r}\nformatted: {format_rationale(raw)!r}\npieces:    {pieces}")
