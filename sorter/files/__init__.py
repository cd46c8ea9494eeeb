"""Files and folders, opened, identified, replaced, renamed and locked without losing or overwriting anything.

In: paths. Out: descriptors, identities, locks. Imports `sorter.errors` only.
"""

from typing import Final

FOLDER = ".sorter"
"""Hidden folder in the output and the inbox for the history and the locks."""
HISTORY = "history.sqlite3"
"""The history, in the output's hidden folder or in the one that `--state-dir` names."""
UNSURE: Final = "unsure"
FAILED: Final = "failed"
"""Folders in the output that no class of a model may have. What goes there has a kind of the same name."""
