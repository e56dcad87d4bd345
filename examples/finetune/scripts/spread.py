"""Takes a part of a list, the same one every time."""


def spread(count: int, total: int) -> list[int]:
    """`count` of the numbers below `total`, at even distances; all of them where there are no more."""
    count = min(count, total)
    return [number * total // count for number in range(count)]
