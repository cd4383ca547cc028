"""Lists in pieces."""


def chunks(items, size):
    """The items in lists of `size`; the last one may be shorter."""
    if size < 1:
        raise ValueError("size must be at least 1")
    return [items[start : start + size] for start in range(0, len(items) - size + 1, size)]
