"""A calculator for arithmetic written by a language model; it never executes code.

Source: paper, section 3.2. A small parser replaces `eval`; it needs no time limit, because the
length of an expression is bounded. Left out on purpose: names, powers, functions.

    python calculator.py "48 / 2"        # without an expression: five examples
"""

import re
import sys
from collections import deque

MAX_LENGTH = 100  # characters; bounds nesting and time. GSM8K's longest annotation has 76
MAX_RESULT = 1e15  # below 2^53, so that a float holds every integer

NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"  # 12  1,200  3.5  3.  .5
TOKEN = re.compile(rf"{NUMBER}|[-+*/()%]")


def calculate(expression: str) -> str | None:
    """Evaluate arithmetic and print the result as a rationale shows it; None for anything else.

        sum     = product (("+" | "-") product)*
        product = factor (("*" | "/") factor)*
        factor  = ("-" | "+") factor  |  (number | "(" sum ")") "%"*

    Never raises: division by zero, other characters, and too long or too large input give None.
    DIFFERS: the authors use `eval`; here 50% and 1,200 are read, too, but 2 ** 3 is not.

    >>> calculate("2 + 3 * 4")  # a sum of two products, 2 and 3 * 4
    '14'
    >>> calculate("2 ** 9999") is None
    True
    """
    if len(expression) > MAX_LENGTH or TOKEN.sub("", expression).strip():
        return None
    tokens = deque(TOKEN.findall(expression))
    try:
        value = read_sum(tokens)
    except (ValueError, ZeroDivisionError):
        return None
    if tokens or abs(value) > MAX_RESULT:  # tokens are left after `2 3`, or an extra bracket
        return None
    return format_number(value)


def format_number(value: float) -> str:
    """Print an integer when within 1e-4 of one, else two decimals without trailing zeros.

    DIFFERS: 0.29 * 100 = 28.999999999999996 prints as 29; the authors' code, which truncates
    before it compares, prints 29.0.

    >>> [format_number(value) for value in (24.0, 0.29 * 100, 2.5, 1 / 3)]
    ['24', '29', '2.5', '0.33']
    """
    if abs(value - round(value)) < 1e-4:
        return str(round(value))
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


# Each reader removes its part of the expression from the left of `tokens` and returns its value.
# Input outside the grammar raises ValueError.


def read_sum(tokens: deque[str]) -> float:
    value = read_product(tokens)
    while tokens and tokens[0] in "+-":
        if tokens.popleft() == "+":
            value = value + read_product(tokens)
        else:
            value = value - read_product(tokens)
    return value


def read_product(tokens: deque[str]) -> float:
    value = read_factor(tokens)
    while tokens and tokens[0] in "*/":
        if tokens.popleft() == "*":
            value = value * read_factor(tokens)
        else:
            value = value / read_factor(tokens)
    return value


def read_factor(tokens: deque[str]) -> float:
    if not tokens:
        raise ValueError("the expression is incomplete")
    first = tokens.popleft()
    if first == "-":
        return -read_factor(tokens)
    if first == "+":
        return read_factor(tokens)
    if first == "(":
        value = read_sum(tokens)
        if not tokens or tokens.popleft() != ")":
            raise ValueError("unclosed bracket")
    else:
        value = float(first.replace(",", ""))  # raises ValueError for a sign such as `)`
    while tokens and tokens[0] == "%":
        tokens.popleft()
        value = value / 100
    return value


def main() -> None:
    examples = ["48 / 2", "15% * 1,200 - .5", "2 ** 9999", "1 / 0", "__import__('os')"]
    for expression in sys.argv[1:] or examples:
        result = calculate(expression)
        if result is None:
            print(f"{expression}: left to the model")
        else:
            print(f"{expression} = {result}")


if __name__ == "__main__":
    main()
