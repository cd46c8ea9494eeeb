"""The only package that changes the user's files: moving, recovering after a crash, undoing, correcting.

In: `Decision`s. Out: `Outcome`s, and a history that says the same as the disk. Imports `files`, `inbox` (sidecars),
`history` and `decisions`.
"""
