"""`sorter bench`: how fast this machine sorts, what each part of it could do alone, and the loop anyone would write.

In: photos, of which copies are made, or none, and then some are generated. Out: a `Report`. Everything is measured
several times in turn, so that what else the machine does meanwhile strikes all alike, and the medians count.
"""
