"""Calls that are tried again."""


def retry(call, times, errors=(Exception,)):
    """What `call` returns; after an error it is tried again, `times` more times at most."""
    for attempt in range(times):
        try:
            return call()
        except errors:
            if attempt == times - 1:
                raise
