"""A rule as the reward for GSM8K (hub name openai/gsm8k): is the last number of the response the right one?

python remax.py --reward-function examples/gsm8k.py:reward --dataset openai/gsm8k --prompt-column question …
"""

import re

# 1,234 and 1234, each with or without decimals; or .5. The minus of 7-5 or (x)-5 is a subtraction, not a sign.
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+)")


def last_number(text: str) -> float | None:
    plain = text.replace("$", "").replace("−", "-").replace("{,}", ",").replace("\\!", "")  # 1{,}234 and 1,\!234
    numbers = NUMBER.findall(plain)
    return float(numbers[-1].replace(",", "")) if numbers else None


def reward(prompts: list[str], responses: list[str], answer: list[str], **columns: list) -> list[float]:
    """1 where the last number of the response is the number after #### in the answer column, otherwise 0."""
    right_numbers = [last_number(text.split("####")[-1]) for text in answer]
    if None in right_numbers:
        raise ValueError(f"no number in the answer {answer[right_numbers.index(None)]!r}")
    return [float(last_number(text) == right) for text, right in zip(responses, right_numbers, strict=True)]
