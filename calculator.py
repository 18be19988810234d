"""A calculator for what a language model writes: four operations, and nothing that could run.

Source: paper, section 3.2. Left out on purpose: names, powers, functions. Neither `eval` nor a time
limit is needed, because the grammar itself is bounded in length, depth and size.

    python calculator.py "48 / 2"        # without an expression: five examples
"""

import re
import sys
from collections import deque

MAX_LENGTH = 100  # characters; the longest annotation in GSM8K has 76
MAX_DEPTH = 20  # nested brackets and signs
MAX_SIZE = 1e15  # integers up to here are exact in a float

NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"  # 12  1,200  3.5  3.  .5
TOKEN = re.compile(rf"{NUMBER}|[-+*/()%]")


def calculate(expression: str) -> str | None:
    """Evaluate arithmetic and print the result as a rationale shows it; None for anything else.

        sum     = product (("+" | "-") product)*
        product = factor (("*" | "/") factor)*
        factor  = ("-" | "+") factor  |  (number | "(" sum ")") "%"*

    `2 + 3 * 4` is a sum of two products, 2 and 3 * 4: it gives "14". Never raises: division by
    zero, other characters, absurd length, depth or size give None.
    DIFFERS: percentages and thousands, 50% and 1,200, are read, too; the authors' code is `eval`.
    """
    if len(expression) > MAX_LENGTH or TOKEN.sub("", expression).strip():
        return None
    tokens = deque(TOKEN.findall(expression))
    try:
        value = read_sum(tokens, MAX_DEPTH)
    except (ValueError, ZeroDivisionError):
        return None
    if tokens:  # `2 3`, or a bracket too many
        return None
    return format_number(value)


def format_number(value: float) -> str:
    """Print an integer when within 1e-4 of one, else two decimals without closing zeros.

    DIFFERS: 0.29 * 100 = 28.999999999999996 prints as 29; the authors' code, which cuts
    the decimals off before it compares, prints 29.0.
    """
    if abs(value - round(value)) < 1e-4:
        return str(round(value))
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    if text == "-0":
        return "0"
    return text


# Each reader takes from the left of `tokens` what belongs to it, and returns its value. `depth` is
# how many brackets and signs may still be nested. Each raises ValueError for what the grammar does
# not know.


def read_sum(tokens: deque[str], depth: int) -> float:
    value = read_product(tokens, depth)
    while tokens and tokens[0] in "+-":
        if tokens.popleft() == "+":
            value = bounded(value + read_product(tokens, depth))
        else:
            value = bounded(value - read_product(tokens, depth))
    return value


def read_product(tokens: deque[str], depth: int) -> float:
    value = read_factor(tokens, depth)
    while tokens and tokens[0] in "*/":
        if tokens.popleft() == "*":
            value = bounded(value * read_factor(tokens, depth))
        else:
            value = bounded(value / read_factor(tokens, depth))
    return value


def read_factor(tokens: deque[str], depth: int) -> float:
    if not tokens or depth == 0:
        raise ValueError("nothing to read, or nested too deeply")
    first = tokens.popleft()
    if first == "-":
        return -read_factor(tokens, depth - 1)
    if first == "+":
        return read_factor(tokens, depth - 1)
    if first == "(":
        value = read_sum(tokens, depth - 1)
        if not tokens or tokens.popleft() != ")":
            raise ValueError("a bracket stays open")
    else:
        value = bounded(float(first.replace(",", "")))  # raises ValueError for a sign such as `)`
    while tokens and tokens[0] == "%":
        tokens.popleft()
        value = value / 100
    return value


def bounded(value: float) -> float:
    if abs(value) > MAX_SIZE:
        raise ValueError("too large")
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
