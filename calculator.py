"""A calculator for what a language model writes: four operations, brackets, and nothing that could be executed.

Source: paper, section 3.2. What is left out on purpose: names, powers, functions, comparison; `eval` and time limits
are not needed where the grammar itself is bounded in length, depth and size.

    python calculator.py "48 / 2"
"""

import re
import sys

MAX_LENGTH = 100  # characters; the longest annotation in GSM8K has 76
MAX_DEPTH = 20  # nested brackets and minus signs
MAX_SIZE = 1e15  # integers up to here are exact in a float

NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"  # 12  1,200  3.5  3.  .5
TOKEN = re.compile(rf"\s*({NUMBER}|[-+*/()%])")


class Refused(Exception):
    """The text is not an expression this calculator evaluates."""


def calculate(expression: str) -> str | None:
    """Evaluate arithmetic and print the result as a rationale shows it; None for anything else.

    Grammar:  sum    = product (("+" | "-") product)*
              product = factor (("*" | "/") factor)*
              factor  = "-" factor | (number | "(" sum ")") "%"*
    Never raises: division by zero, other characters, absurd length, depth or size give None.
    """
    try:
        value, rest = read_sum(split(expression), MAX_DEPTH)
    except (Refused, ZeroDivisionError, IndexError):  # IndexError: the text ends too early
        return None
    return None if rest else format_number(value)


def format_number(value: float) -> str:
    """Print an integer when within 1e-4 of one, else two decimals without closing zeros.

    DIFFERS: 0.29 * 100 = 28.999999999999996 prints as 29; the authors' code truncates first and prints 29.0.
    """
    if abs(value - round(value)) < 1e-4:
        return str(round(value))
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def split(expression: str) -> list[str]:
    """Cut the text into numbers and signs."""
    if len(expression) > MAX_LENGTH:
        raise Refused
    expression, tokens, position = expression.rstrip(), [], 0
    while position < len(expression):
        match = TOKEN.match(expression, position)
        if not match:
            raise Refused
        tokens.append(match[1])
        position = match.end()
    return tokens


# Each reader takes the tokens and the depth left; it returns a value and the tokens it did not use.


def read_sum(tokens: list[str], depth: int) -> tuple[float, list[str]]:
    value, tokens = read_product(tokens, depth)
    while tokens and tokens[0] in "+-":
        right, rest = read_product(tokens[1:], depth)
        value, tokens = bounded(value + right if tokens[0] == "+" else value - right), rest
    return value, tokens


def read_product(tokens: list[str], depth: int) -> tuple[float, list[str]]:
    value, tokens = read_factor(tokens, depth)
    while tokens and tokens[0] in "*/":
        right, rest = read_factor(tokens[1:], depth)
        value, tokens = bounded(value * right if tokens[0] == "*" else value / right), rest
    return value, tokens


def read_factor(tokens: list[str], depth: int) -> tuple[float, list[str]]:
    if depth == 0:
        raise Refused
    first, tokens = tokens[0], tokens[1:]
    if first == "-":
        value, tokens = read_factor(tokens, depth - 1)
        return -value, tokens
    if first == "(":
        value, tokens = read_sum(tokens, depth - 1)
        if tokens[0] != ")":
            raise Refused
        tokens = tokens[1:]
    elif first[0] in "0123456789.":
        value = bounded(float(first.replace(",", "")))
    else:
        raise Refused
    while tokens and tokens[0] == "%":
        value, tokens = value / 100, tokens[1:]
    return value, tokens


def bounded(value: float) -> float:
    if abs(value) > MAX_SIZE:
        raise Refused
    return value


if __name__ == "__main__":
    for text in sys.argv[1:] or ["48 / 2", "(1,200 - 15%) * .5", "2 ** 9999", "1 / 0", "__import__('os')"]:
        result = calculate(text)
        print(f"{text} = {result}" if result is not None else f"{text}: left to the model")
