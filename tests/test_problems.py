"""Reading and writing problems: which input is rejected and how, and which text comes back unchanged."""

import json
from dataclasses import asdict

import pytest

from calculator import calculate
from data.problems import (
    Problem,
    check_data,
    check_leakage,
    describe,
    join_gold,
    load_problems,
    read_jsonl,
    same_answer,
    write_jsonl,
)
from tests.conftest import ROOT
from tokenizer import Tokenizer

TINY = Tokenizer(ROOT / "data" / "tiny")
GOOD = {
    "question": "Tom has 2 bags of 3 apples. How many?",
    "rationale": "2*3 = <<2*3=6>>6 apples\n#### 6",
    "answer": 6,
}


def load_text(tmp_path, *lines):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(
        b"\n".join(
            line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
            for line in lines
        )
    )
    return load_problems(path)


def broken_lines():
    """Yield more than two hundred broken versions of one good line."""
    good = json.dumps(GOOD)
    yield from (
        good[:end].encode() for end in range(1, len(good), 2)
    )  # cut short, as by an interrupted download
    yield from (
        good.encode()[:12] + bytes([byte]) + good.encode()[13:] for byte in range(0x80, 0x100, 3)
    )  # not UTF-8
    yield from (
        b"null",
        b"3",
        b'"text"',
        b"[]",
        b"[1, 2]",
        b"true",
        b"{}",
        b"{} {}",
        b"question,answer",
        b"NaN",
        b"\x00",
    )
    yield from (
        opening * depth for opening in (b"[", b'{"a":', b'{"question":[') for depth in (1, 100_000)
    )
    yield from (
        b"[" * 100_000 + b"]" * 100_000,
        b'{"question": "?", "answer": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    )
    for question in (
        None,
        "",
        "  \n",
        5,
        True,
        [],
        ["How many?"],
        {"text": "How many?"},
        "half a pair \ud800",
    ):
        yield json.dumps({**GOOD, "question": question}).encode()
    for number in (
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "9" * 400,
        "-" + "9" * 400,
        "9" * 5000,
        "true",
        "false",
        "null",
        "[6]",
        '{"value": 6}',
        "6.",
        "06",
        "0x6",
        "6,0",
        "",
    ):
        yield f'{{"question": "How many?", "answer": {number}}}'.encode()
        yield (
            f'{{"question": "How many?", "rationale": "#### 6", "answer": {number}}}'.encode()
            if number != "null"
            else b"null"
        )
    for text in (
        "",
        "6",
        "six",
        "#### ",
        "####",
        "#### six",
        "## 6",
        "#### 6 apples",
        "#### 6\nand more",
        "#### 6 6",
        "#### -",
        "#### nan",
        "#### inf",
        "#### 1e3",
        "#### .",
        "#### ,",
        "#### 6 ####",
        "#### " + "9" * 400,
        "#### 7",
        "#### 6.00011",
        "#### -6",
        "#### ٦",
        "half a pair \udfff #### 6",
    ):
        yield json.dumps({**GOOD, "rationale": text}).encode()
    for text in (
        "####",
        "#### ",
        "#### 6 apples",
        "#### 6\nand more",
        "#### -",
        "#### .",
        "#### ,",
        "#### 6 ####",
    ):
        yield json.dumps({"question": "How many?", "answer": text}).encode()
    for rationale in (5, True, [], ["#### 6"], {"text": "#### 6"}):
        yield json.dumps({**GOOD, "rationale": rationale}).encode()
    yield json.dumps({**GOOD, "answer": "also a rationale #### 6"}).encode()
    yield json.dumps({"question": "How many?"}).encode()


def test_every_broken_line_is_refused_in_one_sentence_naming_file_and_line(tmp_path):
    """A user's file can be wrong in unforeseen ways. Every fault must raise one ValueError that says where to
    look; a line silently accepted or skipped would change the training set."""
    lines = list(broken_lines())
    assert len(lines) > 200
    for line in lines:
        with pytest.raises(ValueError) as refused:
            load_text(tmp_path, json.dumps(GOOD), "", line, json.dumps(GOOD))
            pytest.fail(f"accepted: {line[:80]!r}")
        message = str(refused.value)
        assert message.startswith(f"{tmp_path / 'problems.jsonl'}, line 3: "), (line[:80], message)
        assert "\n" not in message and len(message) < len(str(tmp_path)) + 200, (line[:80], message)


def test_a_file_of_another_kind_is_told_what_is_wanted(tmp_path):
    """The most common wrong file is a table; JSON's own "Expecting value" does not say what kind of value."""
    with pytest.raises(
        ValueError, match=r"line 1: each line must be a JSON object \(Expecting value\)"
    ):
        load_text(tmp_path, "question,answer", "How many?,6")


def test_both_spellings_give_the_same_problem(tmp_path):
    """Our format and GSM8K's hold the same facts, so they must give equal problems."""
    rationale = "1,000+800 = <<1000+800=1800>>1800\n#### 1,800"
    ours = {"question": "How many?", "answer": 1800, "rationale": rationale}
    gsm8k = {"question": "How many?", "answer": rationale}
    problems = load_text(tmp_path, json.dumps(ours), json.dumps(gsm8k))
    assert problems == [Problem("How many?", 1800.0, rationale)] * 2


def test_the_answer_may_be_left_to_the_rationale(tmp_path):
    """If the answer had to be given twice, the two could disagree."""
    assert load_text(tmp_path, '{"question": "How many?", "rationale": "2+4\\n#### 6"}') == [
        Problem("How many?", 6.0, "2+4\n#### 6")
    ]


def test_a_problem_without_rationale_is_a_question_and_a_number(tmp_path):
    """Unlabeled problems and test sets have no rationale; an empty string instead of None would be
    trained on."""
    assert load_text(
        tmp_path, '{"question": "How many?", "answer": 6.0, "source": "elsewhere"}'
    ) == [Problem("How many?", 6.0)]


@pytest.mark.parametrize(
    "text, value",
    [
        ("#### 18", 18),
        ("#### 18.0", 18),
        ("####18", 18),
        ("#### 1,800 ", 1800),
        ("#### -5", -5),
        ("#### .5", 0.5),
        ("so #### 3 no, #### 4", 4),
        ("#### 12,345,678.25\n", 12345678.25),
    ],
)
def test_the_number_after_the_last_mark_is_the_answer(tmp_path, text, value):
    """GSM8K uses commas, signs and spaces inconsistently; every spelling must give the same number."""
    assert (
        load_text(tmp_path, json.dumps({"question": "How many?", "answer": text}))[0].answer
        == value
    )


@pytest.mark.parametrize(
    "text, value",
    [
        ("yes", "yes"),
        ("  (no) ".strip(" ()"), "no"),
        ("B", "B"),
        ("Ana Maria.", "Ana Maria."),
        ("24", 24.0),
    ],
)
def test_an_answer_may_be_a_short_text(tmp_path, text, value):
    """Other reasoning tasks end in yes, a letter or a name, in the answer field or after the #### mark."""
    for row in (
        {"answer": text},
        {"answer": f"Therefore.\n#### {text}"},
        {"answer": text.upper(), "rationale": f"So. #### {text}"},
    ):
        (problem,) = load_text(tmp_path, json.dumps({"question": "Is it?", **row}))
        assert same_answer(problem.answer, value)


@pytest.mark.parametrize("answer", ["6 apples", "?", "", "x" * 41, "yes\nno", "_", "9" * 400])
def test_what_is_neither_a_number_nor_a_short_text_is_refused(tmp_path, answer):
    """`6 apples` is a number followed by a slip; read as text, it would make every correct rationale wrong."""
    for row in ({"answer": answer}, {"answer": f"So.\n#### {answer}"}):
        with pytest.raises(ValueError, match="line 1"):
            load_text(tmp_path, json.dumps({"question": "Is it?", **row}))


def test_blank_lines_byte_order_marks_and_windows_line_ends_are_harmless(tmp_path):
    """Editors add them. A line separator inside a string is text and must not end the line."""
    row = {"question": "How many\u2028 apples?\u0085", "answer": 6}
    text = "\ufeff" + json.dumps(row, ensure_ascii=False) + "\r"
    assert load_text(tmp_path, text, "\r", "   ", text[1:]) == [Problem(row["question"], 6.0)] * 2


@pytest.mark.parametrize("answer", ["Rs. 18", "Rs.18", "USD5", "x = 5", "Answer: 12", "approx -3"])
def test_a_number_with_a_label_is_not_a_word(tmp_path, answer):
    """Taken for a word it could never be right: models write the number alone. B2 and H2O are words."""
    with pytest.raises(ValueError, match="line 1.*write the number alone"):
        load_text(tmp_path, json.dumps({"question": "How much?", "answer": answer}))
    for word in ("B2", "H2O", "yes"):
        load_text(tmp_path, json.dumps({"question": "Which?", "answer": word}))


@pytest.mark.parametrize("answer", ["123456789012345678", "-1e16", '"#### 9999999999999999"'])
def test_numbers_that_a_float_cannot_hold_are_refused(tmp_path, answer):
    """123456789012345678 and ...677 are the same float: a wrong rationale would count as right."""
    with pytest.raises(ValueError, match="line 1.*up to 1e15"):
        load_text(tmp_path, f'{{"question": "How many?", "answer": {answer}}}')


@pytest.mark.parametrize(
    "line, words",
    [
        (r'{"question": "q", "answer": 5, "answer": 6}', "occurs twice"),
        (r'{"question": "What is \frac{1}{2}?", "answer": 5}'.replace("\\\\", "\\"), "backslash with two"),
        (r'{"query": "How many?", "response": "#### 6"}', "no question, but only query, response"),
        (r'{"instruction": "How many?", "input": "", "output": "6"}', "instruction, input, output"),
    ],
)  # fmt: skip
def test_silent_conveniences_of_json_are_refused(tmp_path, line, words):
    """The last of two answers would win, "\\frac" would be a form feed, and other field names would only give
    "the question must be text"."""
    with pytest.raises(ValueError, match=f"line 1.*{words}"):
        load_text(tmp_path, line)


def test_fields_that_are_not_used_are_named_once(tmp_path, capsys):
    """`choices` and `body` hold half of the question in some datasets; the model would never see them."""
    row = {"question": "Which?", "answer": "B", "choices": ["A", "B"], "body": "A story."}
    load_text(tmp_path, json.dumps(row), json.dumps(row))
    assert capsys.readouterr().out.count("these fields are not used: body, choices") == 1


def test_the_same_question_in_the_vocabularys_eyes(vocabulary):
    """A zero-width space or a full-width digit changes the string but not the ids: such a question in training and
    test is leakage, and such a question in L and U is the same one."""
    tokenizer = Tokenizer(vocabulary)
    ours, theirs = (
        Problem("Zoë has\u200b 3 pens?", 3.0, "#### 3"),
        Problem("Zoe\u0308 has ３ pens?", 3.0),
    )
    assert tokenizer.encode(ours.question) == tokenizer.encode(theirs.question)
    with pytest.raises(ValueError, match="training data"):
        check_leakage([ours], {"test": [theirs]}, tokenizer)
    assert join_gold([theirs], [ours], tokenizer) == [ours]


def test_a_question_that_is_in_u_twice_is_used_once():
    """Its samples depend on seed and text, so both would draw the same ones, and pairs and labels would double."""
    u = [Problem("How many?", 3.0), Problem("How  many?", 3.0), Problem("How few?", 3.0)]
    assert join_gold(u, [], TINY) == [u[0], u[2]]


def test_two_answers_to_one_question_are_refused():
    """One of them can never be right."""
    one, two = Problem("How many?", 3.0), Problem("how many?", 4.0)
    for sets in (([one, two], [], {}), ([], [one, two], {}), ([], [], {"mine": [one, two]})):
        with pytest.raises(ValueError, match="twice, with the answers 3.0 and 4.0"):
            check_data(*sets, TINY, allow_leakage=True)


def test_what_the_calculator_will_never_see_or_say_is_counted():
    """Such data trains a model to read one thing and makes it write another; nothing else would show it."""
    rationales = [
        "[ 2 + 3 = 5] 5. [ 2 * 3 = 7] 7. #### 7",
        "[ two = 2] 2. #### 2",
        "It is 4. #### 4",
    ]
    problems = [Problem("q", 4.0, rationale) for rationale in rationales] + [Problem("p", "yes")]
    said = describe(problems[:3], problems, TINY, 200, 300, calculate)
    assert "3 annotations, 1 of them other than the calculator's; 1 rationales have none" in said
    assert "1 of 4 answers are words" in said


def test_missing_and_empty_files_say_what_to_do(tmp_path):
    """With zero problems, training would have no data and divide by zero far from the cause."""
    for name in ("absent.jsonl", "."):
        with pytest.raises(FileNotFoundError, match="check the path"):
            load_problems(tmp_path / name)
    for lines in ([], ["", " ", ""]):
        with pytest.raises(ValueError, match="no problem"):
            load_text(tmp_path, *lines)


def test_saved_problems_come_back_equal_and_the_bytes_repeat(tmp_path):
    """Resuming a run compares files byte by byte; line breaks and accents inside a text must survive."""
    problems = [
        Problem("¿Cuántas? 5 × 3\u2028", 15.0, "5 × 3 = <<5*3=15>>15\r\n#### 15"),
        Problem('a "b" \\ \t', -0.125),
        Problem("?", 1e15),
    ]
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    write_jsonl(map(asdict, problems), first)
    write_jsonl(map(asdict, load_problems(first)), second)
    assert load_problems(second) == problems
    assert (
        first.read_bytes() == second.read_bytes()
        and first.read_bytes().count(b"\n") == 3
        and b"\r" not in first.read_bytes()
    )


def test_rows_come_back_equal(tmp_path):
    """Samples and preference pairs are rows with their own fields, and a round may have none."""
    for rows in (
        [{"question": "¿?", "samples": ["a\nb", "c"], "correct": [True, False], "none": None}],
        [],
    ):
        write_jsonl(rows, tmp_path / "rows.jsonl")
        assert read_jsonl(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize("text", ["0,5", "12,00", "1,2345", ",5", "1,200,3"])
def test_a_comma_that_parts_no_thousands_is_refused(tmp_path, text):
    """Many people write one half as `0,5`, which was once read as 5."""
    for row in ({"answer": text}, {"answer": f"So.\n#### {text}"}):
        with pytest.raises(ValueError, match="line 1.*1,200.5"):
            load_text(tmp_path, json.dumps({"question": "How many?", **row}))


def test_answers_in_two_forms_of_unicode_are_the_same():
    """Before a model reads a text, SentencePiece normalises full-width letters and letters typed with a separate
    accent. Compared as typed, no rationale could be correct."""
    assert (
        same_answer("Zo\u00eb", "Zoe\u0308")
        and same_answer("\uff22", "B")
        and not same_answer("Zoe", "Zo\u00eb")
    )


def test_questions_that_are_trained_on_and_tested_on_are_found():
    """Testing on training questions shows nothing. Case and spaces are ignored."""
    asked, other = Problem("How  many\nnuts?", 5.0), Problem("How many pens?", 5.0)
    check_leakage([asked, other], {"test": [Problem("How many cups?", 5.0)]}, TINY)
    for trained in ([asked], [other, asked]):
        with pytest.raises(ValueError, match="mine: 1 questions.*training data.*--allow-leakage"):
            check_leakage(trained, {"mine": [Problem("how many NUTS?", 5.0)]}, TINY)


@pytest.mark.parametrize(
    "name, rows, labeled",
    [
        ("gsm8k/train", 6705, True),
        ("gsm8k/dev", 768, True),
        ("gsm8k/test", 1319, True),
        ("multiarith/test", 600, False),
        ("asdiv/test", 2096, False),
        ("svamp/test", 1000, False),
    ],
)
def test_the_public_files_are_read_whole(public_sets, name, rows, labeled):
    """The checks must not reject anything that the paper uses."""
    problems = load_problems(public_sets / f"{name}.jsonl")
    assert len(problems) == rows and all((p.rationale is not None) == labeled for p in problems)
