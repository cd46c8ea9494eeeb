"""What arrives: which files are photos that have stopped changing, and when to look for them.

In: a folder. Out: settled `Photo`s and their sidecar files. Imports `files` and `decoding` (the list of
extensions).
"""
