"""What went where and why, in SQLite: written before a photo moves, read by `history`, `status` and `undo`.

In: moves, first as intents, then as done. Out: the intents that a crash left unfinished, and entries. Imports `files`
and `errors` only.
"""
