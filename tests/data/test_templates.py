from fedspeed.data.rows import Row
from fedspeed.data.templates import prompt

WITH_INPUT = Row("Sum {x}", "1 2", "3", "")
WITHOUT = Row("Greet", "", "hello", "")


def test_alpaca():
    assert prompt(WITH_INPUT, "alpaca") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nSum {x}\n\n### Input:\n1 2\n\n### "
        "Response:"
    )
    assert prompt(WITHOUT, "alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n"
        "### Instruction:\nGreet\n\n### Response:"
    )


def test_plain():
    assert prompt(WITH_INPUT, "plain") == "Sum {x} 1 2 "
    assert prompt(WITHOUT, "plain") == "Greet "
