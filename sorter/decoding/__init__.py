"""From a file to pixels, in processes of their own.

In: a settled `Photo`. Out: a `Decoded`: uint8 (S, S, 3) in shared memory, or the reason why there are no pixels.
Imports `files`.
"""
