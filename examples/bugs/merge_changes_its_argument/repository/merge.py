"""Settings laid over each other."""


def merge(base, over):
    """`base` with `over` laid over it, dict by dict; neither is changed."""
    merged = base
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged
