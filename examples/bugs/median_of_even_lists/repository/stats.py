"""A few figures."""


def median(values):
    """The middle of the values; of an even number of them, between the two in the middle."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
