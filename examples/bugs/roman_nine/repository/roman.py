"""Roman numbers."""

VALUES = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}


def from_roman(text):
    """The number that a Roman one stands for."""
    total = 0
    for letter, following in zip(text, text[1:] + "I"):
        value = VALUES[letter]
        total += -value if value <= VALUES[following] else value
    return total
