"""The model folder and the engines that run it.

In: uint8 (N, S, S, 3). Out: probabilities, float32 (N, C), and the distances of the photos
from the training photos, float32 (N,).
Imports `decoding` (for the preprocessing that the manifest describes) and `files`.
"""
