"""The model folder and the engines that run it.

In: uint8 (N, S, S, 3). Out: probabilities, float32 (N, C), and each photo's distance from the training photos, (N,).
Imports `decoding`, for the preprocessing that the manifest describes.
"""
