"""Ask a store whether it keeps the conditions that a safe move needs, with tiny objects, before anything is moved.

In: a store and a prefix. Out: how to copy there. Servers that lack a condition mostly ignore it, and overwrite.
"""

from sorter.cluster.stores import Mode, Store


def probe(store: Store, prefix: str) -> Mode:
    """Find out how a store copies to a free name only.

    Writes and deletes objects below `<prefix>.sorter/probe-<token>/` and nothing else.

    Args:
        store: the bucket that photos go to and, unless it is another one, come from.
        prefix: of the output, empty or with a slash at its end.

    Raises:
        UnsafeStoreError: a condition is ignored or refused; the message names it.
        StoreError: the store does not answer.
    """
    raise NotImplementedError
