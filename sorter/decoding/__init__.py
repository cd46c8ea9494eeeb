"""From a file to pixels, in separate processes.

In: a settled `Photo`. Out: a `Decoded`: uint8 (S, S, 3) in shared memory, or the reason why it has no pixels.
Imports `files`, and of the single modules `errors`, `extras` and `processors`.
"""
