"""Files and folders, opened, identified, replaced, renamed and locked without losing or overwriting anything.

In: paths. Out: descriptors, identities, locks. Imports `sorter.errors` only.
"""

FOLDER = ".sorter"
"""Hidden folder in the output and the inbox for the history and the locks."""
