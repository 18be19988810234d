"""Text to ids, ids to text, and GSM8K's spelling to T5's. The ids are compared with the public tokenizer's."""

import json
import re
import unicodedata

import pytest

from decode import RowState, Sample
from tests.conftest import ROOT
from tokenizer import EOS_ID, PAD_ID, UNKNOWN_ID, Tokenizer, format_rationale, pad_batch

EXAMPLE = (
    "She sold 48/2 = <<48/2=24>>24 clips.\n#### 24",
    "She sold 48 / 2 = [ 48 / 2 = 24] 24 clips. #### 24",
)


@pytest.fixture(scope="module")
def tokenizer(vocabulary) -> Tokenizer:
    return Tokenizer(vocabulary)


@pytest.fixture(scope="module")
def public(shared):
    """The public tokenizer, loaded by the `tokenizers` library."""
    return pytest.importorskip("tokenizers").Tokenizer.from_file(
        str(shared / "flan-t5" / "tokenizer.json")
    )


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def raw(datasets) -> list[str]:
    """GSM8K's 6,705 training answers as published."""
    return [row["answer"] for row in rows(datasets / "gsm8k/train.jsonl")]


@pytest.fixture(scope="module")
def formatted(raw) -> list[str]:
    return [format_rationale(text) for text in raw]


# ------------------------------------------------------------------------------------------------------------- ids


def test_ids_equal_the_public_tokenizers_on_every_dataset(datasets, tokenizer, public):
    """Flan-T5 learned its embeddings for these ids; one shifted id per text would cost accuracy without an error."""
    texts = []
    for part in ("train", "dev", "test"):
        for row in rows(datasets / f"gsm8k/{part}.jsonl"):
            texts += [row["question"], row["answer"], format_rationale(row["answer"])]
    for name in ("multiarith", "asdiv", "svamp"):
        texts += [row["question"] for row in rows(datasets / f"{name}/test.jsonl")]
    texts = list(dict.fromkeys(texts))
    expected = [encoding.ids for encoding in public.encode_batch(texts)]
    different = [text for text, ids in zip(texts, expected) if tokenizer.encode(text) != ids]
    assert len(texts) > 29_000 and not different, different[:3]


def test_decoding_undoes_encoding(tokenizer, formatted):
    """Answers are extracted from decoded text, so only unknown characters and repeated spaces may be lost."""
    known = [text for text in formatted if UNKNOWN_ID not in tokenizer.encode(text)]
    for text in known:
        expected = re.sub(" +", " ", unicodedata.normalize("NFKC", text)).strip()
        assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_decoding_skips_padding_end_and_ids_without_a_piece(tokenizer):
    """Flan-T5's embedding has 32,128 rows for 32,100 ids: sampling can draw the other 28, and SentencePiece would raise."""
    ids = tokenizer.encode("two words")[:-1]
    assert tokenizer.decode([]) == tokenizer.decode([PAD_ID, EOS_ID, 32100, 32127]) == ""
    assert tokenizer.decode([PAD_ID, *ids, EOS_ID, PAD_ID, PAD_ID]) == "two words"
    assert tokenizer.decode([32127, *ids, 32100]) == "two words"
    assert (
        tokenizer.decode([32000, *ids, 32099]) == "two words"
    )  # T5's sentinels, <extra_id_99> and <extra_id_0>
    assert tokenizer.vocab_size == 32100 and tokenizer.decode(tokenizer.encode("")) == ""


def test_a_cut_text_still_ends(tokenizer):
    """Truncating after appending EOS would leave a target without an end, and the model would learn to ramble."""
    whole = tokenizer.encode("one two three four five six")
    for length in range(1, len(whole) + 3):
        cut = tokenizer.encode("one two three four five six", max_length=length)
        assert (
            len(cut) == min(length, len(whole))
            and cut[-1] == EOS_ID
            and cut[:-1] == whole[: len(cut) - 1]
        )


def test_pieces_put_together_are_the_text(tokenizer, formatted):
    """The calculator reads rationales piece by piece, so the pieces must contain every character, including spaces."""
    for text in formatted[:500]:
        ids = tokenizer.encode(text)
        if UNKNOWN_ID not in ids:
            assert "".join(tokenizer.piece(i) for i in ids).strip() == tokenizer.decode(ids)
    assert [tokenizer.piece(i) for i in (PAD_ID, EOS_ID, UNKNOWN_ID, 32000, 32127)] == [""] * 5


def test_a_batch_is_padded_on_the_right_with_a_mask():
    """Left padding would shift the decoder's first position; a mask computed from the ids would hide a real id 0."""
    ids, mask = pad_batch([[5, 6, 7], [0], [8, 9]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 0], [8, 9, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert pad_batch([[5], [5, 6]], padding=-100)[0].tolist() == [[5, -100], [5, 6]]


def test_a_missing_or_foreign_vocabulary_is_one_sentence(vocabulary, tmp_path):
    """The user sees these messages; SentencePiece itself gives a C++ trace or different ids."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="spiece.model") as missing:
        Tokenizer(folder)
    messages = [missing.value]
    data = (vocabulary / "spiece.model").read_bytes()
    for broken in (b"", b"not a model", data[: len(data) // 2], bytes(1000)):
        (folder / "spiece.model").write_bytes(broken)
        with pytest.raises(ValueError, match="spiece.model") as refused:
            Tokenizer(folder)
        messages.append(refused.value)
    import sentencepiece

    (tmp_path / "corpus.txt").write_text("one two three four five\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=16,
        minloglevel=2,
    )  # SentencePiece's default ids: unknown 0, begin 1, end 2, no padding
    with pytest.raises(ValueError, match="padding") as refused:
        Tokenizer(folder)
    assert all(str(message) and "\n" not in str(message) for message in [*messages, refused.value])


# ------------------------------------------------------------------------------------------------------- rationales


def test_the_example_of_the_facts_is_met_to_the_letter():
    """The authors' code formats this rationale in the same way."""
    assert format_rationale(EXAMPLE[0]) == EXAMPLE[1]


@pytest.mark.parametrize(
    "rule, before, after",
    [
        ("an annotation", "<<1+2=3>>3.", "[ 1 + 2 = 3] 3."),
        ("a restated number", "He has <<24=24>>24.", "He has 24."),
        ("a restated number is the same number", "<<24=2>>2.", "[ 24 = 2] 2."),
        ("a space after $", "$5 and $ 6.", "$ 5 and $ 6."),
        ("squeezed signs", "1+2-3*4/5=6.", "1 + 2 - 3 * 4 / 5 = 6."),
        ("a chain of digits, as in the authors' text", "2+3+4.", "2 + 3+4."),
        ("a chain of longer numbers", "20+30+40.", "20 + 30 + 40."),
        ("spaced signs stay", "1 + 2 - 3 * 4 / 5 = 6.", "1 + 2 - 3 * 4 / 5 = 6."),
        ("half-spaced signs stay", "1 +2 and -3 = 4= 4.", "1 +2 and -3 = 4= 4."),
        ("signs in words too", "a two-step walk.", "a two - step walk."),
        ("a colon before a digit", "Total:5.", "Total: 5."),
        ("a colon before a letter", "Total:x.", "Total:x."),
        ("a time of day", "at 5:30.", "at 5:30."),
        ("full stops", "One\nTwo.\nThree", "One. Two. Three."),
        ("the answer line stays last", "One.\n#### 1,200", "One. #### 1,200"),
        ("times", "2×3 = 6.", "2 * 3 = 6."),
        ("divided by", "6÷3 = 2.", "6 / 3 = 2."),
        ("minus", "6−3 = 3.", "6 - 3 = 3."),
        ("in an annotation", "6 − 3 = <<6−3=3>>3.", "6 - 3 = [ 6 - 3 = 3] 3."),
    ],
)
def test_each_rule_alone(rule, before, after):
    """Each case tests one rule of the authors' code, or one sign that we replace because T5 does not know it."""
    assert format_rationale(before) == after, rule


def by_the_rules(raw: str) -> str:
    """The rules of the authors' code, applied character by character, without our replacement of unknown signs."""
    lines = []
    for line in raw.split("\n"):
        text, *annotated = line.split("<<")
        for part in annotated:
            note, after = part.split(">>", 1)
            left, right = note.split("=", 1) if "=" in note else (note, "")
            text += after if left == right and left.isdigit() else f"[ {note}] {after}"
        for sign in ":$+-*/=":
            spaced, free = (
                "",
                0,
            )  # the character after a spaced sign cannot also be the one before the next
            for at, (before, char, after) in enumerate(zip(" " + text, text, text[1:] + " ")):
                squeezed = char == sign and not after.isspace() and (at > free or sign in ":$")
                if squeezed and sign == ":":
                    spaced += ": " if after.isdigit() and not before.isdigit() else ":"
                elif squeezed and sign == "$":
                    spaced += "$ "
                elif squeezed and not before.isspace():
                    spaced, free = f"{spaced} {sign} ", at + 2
                else:
                    spaced += char
            text = spaced
        lines.append(text if text.endswith(".") or text.startswith("####") else text + ".")
    return " ".join(lines)


def test_gsm8k_follows_the_rules_but_for_mapped_signs(raw, formatted):
    """The rules alone give at least 98 % of the real rationales; the others have a sign that T5 does not know, or a
    negative number after `=`."""
    mapped = [text for text, ours in zip(raw, formatted) if ours != by_the_rules(text)]
    assert len(mapped) <= 0.02 * len(raw)
    departures = "[×÷−½¼¾`]|=-"
    assert all(re.search(departures, text) for text in mapped), [
        t for t in mapped if not re.search(departures, t)
    ][:2]


def test_line_ends_of_windows_change_nothing():
    """Text typed on Windows ends each line with two characters; the first is not part of the step."""
    text = "2*3 = <<2*3=6>>6 apples.\n6+1 = <<6+1=7>>7\n#### 7"
    assert format_rationale(text.replace("\n", "\r\n")) == format_rationale(text)


def test_gsm8k_keeps_its_words_and_numbers(raw, formatted):
    """Formatting changes only spaces and signs: every step and the answer line keep their letters and digits in order."""
    for before, after in zip(raw, formatted):
        kept = re.sub(r"<<(\d+)=\1>>", "", before)
        kept = kept.replace("½", "12").replace("¼", "14").replace("¾", "34")
        assert re.findall(r"\w", after) == re.findall(r"\w", kept)
        assert after.rsplit("#### ", 1)[1] == before.rsplit("#### ", 1)[1]


def test_hardly_any_rationale_holds_an_unknown_id(tokenizer, formatted):
    """A model cannot recover an unknown character; 6,630 of the 6,705 raw answers have one because of `<<` alone."""
    unknown = [text for text in formatted if UNKNOWN_ID in tokenizer.encode(text)]
    assert 0 < len(unknown) <= 20


def test_gsm8k_markers_survive_the_vocabulary(tokenizer, formatted):
    """`[`, `=`, `]` control the calculator and `####` answer extraction: none may become unknown or disappear."""
    for text in formatted[:500]:
        back = tokenizer.decode(tokenizer.encode(text))
        for marker in ("[ ", "] ", " = ", "#### "):
            assert back.count(marker) == re.sub(" +", " ", text).count(marker), (marker, text)


def test_formatting_twice_changes_nothing(formatted):
    """Users' data may have either spelling, one step per line; a second pass must not add more spaces."""
    # Excluded: `5$` at the end of a line (the full stop is added after the rule for $), digit chains such as 2 + 3+4.
    settled = [
        text for text in formatted if "$." not in text and not re.search(r"\S[-+*/=]\S", text)
    ]
    assert len(settled) > 0.9 * len(formatted)
    assert all(format_rationale(text.replace(" ####", "\n####")) == text for text in settled)


@pytest.mark.parametrize(
    "raw, formatted",
    [
        ("384-402=<<384-402=-18>>-18", "384 - 402 = [ 384 - 402 = -18] -18."),
        ("5*(-3)=<<5*(-3)=-15>>-15", "5 * ( - 3) = [ 5 * ( - 3) = -15] -15."),
    ],
)
def test_what_is_read_after_the_equals_sign_is_what_the_calculator_writes(raw, formatted):
    """Invariant: the ids after `=` in a training text are those that the calculator forces. The authors' pattern
    puts a space into negative results, so that the model is trained to read other ids than it is made to write."""
    assert format_rationale(raw) == formatted
    assert forced_ids_are_read(formatted, Tokenizer(ROOT / "data" / "tiny")) == (1, 1)


def forced_ids_are_read(text: str, tokenizer: Tokenizer) -> tuple[int, int]:
    """Assert that wherever the calculator agrees with a text, it would force the text's own ids; count these places,
    and those with a negative result."""
    ids = tokenizer.encode(text)[:-1]
    state = RowState(tokenizer, True, Sample(), [0.0] * len(ids))
    n = n_negative = 0
    for at, i in enumerate(ids, start=1):
        state.queue.clear()
        state.take(i)
        forced = list(state.queue)
        result = tokenizer.decode(forced)
        if forced and tokenizer.decode(ids[at:]).startswith(result):
            assert ids[at : at + len(forced)] == forced, text
            n += 1
            n_negative += "-" in result
    return n, n_negative


def test_the_ids_after_every_equals_sign_of_gsm8k_are_the_calculators(formatted, tokenizer):
    """The same on real text: wherever the annotation is the calculator's text, the ids are the calculator's."""
    counts = [forced_ids_are_read(text, tokenizer) for text in formatted]
    n, n_negative = map(sum, zip(*counts))
    assert n > 20_000 and n_negative >= 3


def test_only_line_ends_end_a_line():
    """U+2028 and a form feed inside a sentence would otherwise put a full stop into it; Windows' line ends would
    leave a sign behind."""
    assert format_rationale("It is\u2028 5\x0b nuts\n#### 5") == "It is\u2028 5\x0b nuts. #### 5"
    assert format_rationale("It is 5\r\n#### 5\r\n") == "It is 5. #### 5"
