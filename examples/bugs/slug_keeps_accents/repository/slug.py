"""Titles as parts of addresses."""

import re
import unicodedata


def slug(title):
    """Lower-case letters, digits and single hyphens; accents are dropped."""
    plain = unicodedata.normalize("NFC", title).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")
