"""The harness of `make bench`: rows declared as values, measured in interleaved rounds, judged, and written down.

A row names what is measured, its floor, its peers and its goals (`values`); the modules in `rows` declare them. In each
round every contestant of a row is measured once (`rounds`), so that a machine whose speed drifts is as slow for all.
What came of it is a document (`report`, `schema.json`) and a Markdown table. To add a row: declare it in a module of
`rows`, and name that module in `rows/__init__.py`.
"""
