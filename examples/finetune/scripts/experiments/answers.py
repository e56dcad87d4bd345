"""The answer in a text that a model wrote, found as LLM-Adapters finds it."""

import re


def first_answer(text: str, right: str) -> str | None:
    """The first of the answers' words in the text, or None; `right` is the text that ends with the right one."""
    kind = re.search(r"(true|false|(\w+?)\d)$", right)
    if kind is None:
        raise ValueError(f"'{right}' ends with no word that is an answer")
    found = re.search(f"{kind[2]}[1-5]" if kind[2] else "true|false", text)
    return found[0] if found else None


def is_right(text: str, right: str) -> bool:
    answer = first_answer(text, right)
    return answer is not None and right.endswith(answer)
