"""Intervals of whole numbers."""


def union(intervals):
    """Intervals (first, last), both counted, as few as possible and in order."""
    joined = []
    for first, last in sorted(intervals):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return joined
