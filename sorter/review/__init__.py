"""A person's verdicts on sorted photos: recorded, carried out by moving photos inside the output, and taken back.

In: verdicts. Out: where each photo is now, and a history that says so. Imports `moving`, `history`, `inbox` (sidecars),
`classifier` (the classes of the model) and `files`.
"""
