"""The worked examples in the docstrings of the eight files give what they say."""

import doctest
import importlib

import pytest

from tests.conftest import ROOT

# Functions whose docstring must show an input and its output.
EXAMPLES = {
    "model": ["relative_position_bucket", "public_name"],
    "tokenizer": ["format_rationale"],
    "sft": ["learning_rate", "micro_batches"],
    "dpo": ["dpo_loss"],
    "selftrain": ["extract_answer", "jaccard", "deduplicate", "pass_at_k", "join_rounds"],
    "calculator": ["calculate", "format_number"],
    "decode": ["RowState.watch"],
    "run": [],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples_give_what_they_say(name, monkeypatch):
    """A student types them in; one that has gone stale teaches something false."""
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(name)
    found = [
        test.name.removeprefix(f"{name}.")
        for test in doctest.DocTestFinder().find(module)
        if test.examples
    ]
    assert set(EXAMPLES[name]) <= set(found)
    assert doctest.testmod(module).failed == 0
