"""A calculator for what a language model writes: four operations, brackets, and nothing that could be executed.

Source: paper, section 3.2. Left out on purpose: names, powers, functions; `eval` and time limits are not needed where
the grammar itself is bounded in length, depth and size.

    python calculator.py "48 / 2"        # without an expression: five, three of which it refuses"""

import operator
import re
import sys
from collections import deque

MAX_LENGTH = 100  # characters; the longest annotation in GSM8K has 76
MAX_DEPTH = 20  # nested brackets and minus signs
MAX_SIZE = 1e15  # integers up to here are exact in a float

NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"  # 12  1,200  3.5  3.  .5
TOKEN = re.compile(rf"{NUMBER}|[-+*/()%]")
OPERATORS = {"+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul), "/": (2, operator.truediv)}

def calculate(expression: str) -> str | None:
    """Evaluate arithmetic and print the result as a rationale shows it; None for anything else.
    Grammar:  sum     = product (("+" | "-") product)*
              product = factor (("*" | "/") factor)*
              factor  = "-" factor | (number | "(" sum ")") "%"*
    Never raises: division by zero, other characters, absurd length, depth or size give None."""
    if len(expression) > MAX_LENGTH or TOKEN.sub("", expression).strip():
        return None
    tokens = deque(TOKEN.findall(expression))
    try:
        value = evaluate(tokens, MAX_DEPTH)
    except (ValueError, ZeroDivisionError):
        return None
    return None if tokens else format_number(value)

def format_number(value: float) -> str:
    """Print an integer when within 1e-4 of one, else two decimals without closing zeros.
    DIFFERS: 0.29 * 100 = 28.999999999999996 prints as 29; the authors' code truncates first and prints 29.0."""
    if abs(value - round(value)) < 1e-4:
        return str(round(value))
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text

def rewrite(rationale: str) -> str:
    """Give every annotation `[ expression = result]` the result that the calculator prints: 60 for 60.00."""
    result = lambda found: f"[{found[1]}= {value}]" if (value := calculate(found[1])) is not None else found[0]
    return re.sub(r"\[([^\[\]=]*)=[^\[\]]*\]", result, rationale)

def evaluate(tokens: deque[str], depth: int, strength: int = 0) -> float:
    """Take from the left a sum, or with strength 1 a product, or with 2 a factor; return its value, or raise ValueError."""
    value = read_factor(tokens, depth)
    while tokens and OPERATORS.get(tokens[0], (0,))[0] > strength:
        stronger, apply = OPERATORS[tokens.popleft()]
        value = bounded(apply(value, evaluate(tokens, depth, stronger)))
    return value

def read_factor(tokens: deque[str], depth: int) -> float:
    first = tokens.popleft() if tokens and depth else ""
    if first == "-":
        return -read_factor(tokens, depth - 1)
    if first == "(":
        value = evaluate(tokens, depth - 1)
        if not tokens or tokens.popleft() != ")":
            raise ValueError("a bracket stays open")
    else:
        value = bounded(float(first.replace(",", "")))
    while tokens and tokens[0] == "%":
        value, _ = value / 100, tokens.popleft()
    return value

def bounded(value: float) -> float:
    if abs(value) > MAX_SIZE:
        raise ValueError("too large")
    return value

if __name__ == "__main__":
    for text in sys.argv[1:] or ["48 / 2", "(1,200 - 15%) * .5", "2 ** 9999", "1 / 0", "__import__('os')"]:
        print(f"{text} = {result}" if (result := calculate(text)) is not None else f"{text}: left to the model")
