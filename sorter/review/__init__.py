"""A person looks at sorted photos on a page, and corrects them: verdicts are recorded, carried out and taken back.

In: the history of an output, and what a browser on this machine sends. Out: pictures; where each photo is now, and a
history that says so. Imports `moving`, `history`, `inbox` (sidecars), `classifier` (the classes of the model),
`decoding` and `files`. The page needs the extra `review`; `corrections.py` does not.
"""
