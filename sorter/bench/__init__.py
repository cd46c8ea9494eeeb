"""`sorter bench`: how fast this machine sorts, how fast each part is alone, and how fast a plain loop is.

In: photos to copy, or none, in which case some are generated. Out: a `Report` of medians. Everything is measured
several times in turn, so that other load on the machine affects all measurements alike. May import everything but
`sorter.cli`.
"""
