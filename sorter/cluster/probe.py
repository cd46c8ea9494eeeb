"""Ask a store whether it keeps the conditions that a safe move needs, with tiny objects, before anything is moved.

In: a store and a prefix. Out: how to copy there. Servers that lack a condition mostly ignore it, and overwrite; so what
counts is what is there afterwards, not only what they answer.
"""

from contextlib import suppress
from dataclasses import replace
from uuid import uuid4

from sorter.cluster.stores import MARK, Mode, Store
from sorter.errors import ObjectError, StoreError, UnsafeStoreError

MODES: dict[Mode, str] = {"upload": "PutObject", "multipart": "CompleteMultipartUpload", "copy": "CopyObject"}
"""The request that has the condition. `copy` comes last: a careless store overwrites with it."""

OLD, OTHER = b"what is there", b"what another program wrote"
_WRONG_ETAG = f'"{"0" * 32}"'


def probe(store: Store, prefix: str) -> Mode:
    """Find out how a store copies to a free name only.

    Writes and deletes objects below `<prefix>.sorter/probe-<token>/` and nothing else.

    Args:
        store: the bucket that photos go to and, unless it is another one, come from.
        prefix: of the output, empty or with a slash at its end.

    Raises:
        UnsafeStoreError: a condition is ignored or refused; the message names it.
        StoreError: the store does not answer, or these credentials may not write there.
    """
    folder = f"{prefix}.sorter/probe-{uuid4().hex}/"
    try:
        return _probe(store, folder)
    except ObjectError as error:
        raise StoreError(f"{store.url} cannot be used: {error}; check the permissions of these credentials") from error
    finally:
        with suppress(StoreError, ObjectError):
            for item in store.list(folder):
                store.remove_own(item.key)


def confirm(store: Store, prefix: str, source: Store, source_prefix: str, mode: Mode) -> None:
    """Make sure that a store which fails at one object works otherwise: move another one there and back.

    Args:
        store: the bucket that objects go to.
        prefix: of the output, empty or with a slash at its end.
        source: the bucket that they come from; it may be the same.
        source_prefix: of the inbox.
        mode: what `probe` found.

    Raises:
        StoreError: it does not.
    """
    name = f".sorter/probe-{uuid4().hex}"
    key, there = f"{source_prefix}{name}", f"{prefix}{name}-moved"
    source.put_new(key, OTHER)
    try:
        item = source.head(key)
        if item is not None and source.read(key) == OTHER:
            store.copy_new(item, source, there, "0", mode)  # None also if the store did it and failed to say so
            copied = store.head(there)
            if copied is not None:
                source.delete_exact(item)
                source.copy_new(copied, store, key, "0", mode, unlike=item.etag)
                if source.head(key) is not None:
                    store.delete_exact(copied)
                    return
    except ObjectError as error:
        raise StoreError(f"{source.url} and {store.url} fail: {error}; check their state and start again") from error
    finally:
        with suppress(StoreError, ObjectError):
            source.remove_own(key)
            store.remove_own(there)
    raise StoreError(f"{store.url} does not keep what it is given: check its state and start again")


def _probe(store: Store, folder: str) -> Mode:
    taken, key = folder + "taken", folder + "source"
    if store.head(taken) is not None or not store.put_new(taken, OLD) or not store.put_new(key, OTHER):
        raise _unsafe(store, "it does not let objects be created with If-None-Match")
    if store.put_new(taken, OTHER) or store.read(taken) != OLD:
        raise _unsafe(store, "it ignores If-None-Match when an object is written (PutObject), and overwrites")
    item = store.head(key)
    if item is None:
        raise _unsafe(store, "an object that was just written is not there")
    if store.delete_exact(replace(item, etag=_WRONG_ETAG)) != "changed" or store.head(key) is None:
        raise _unsafe(store, "it ignores If-Match when an object is deleted (DeleteObject)")
    wrong: dict[Mode, str] = {}
    for mode in MODES:
        wrong[mode] = _wrong_with_copies(store, folder, mode)
    # The largest objects are copied in parts also where others are not.
    if not wrong["copy"] and not wrong["multipart"]:
        return "copy"
    if not wrong["multipart"]:
        return "multipart"
    if not wrong["upload"]:
        return "upload"
    raise _unsafe(store, wrong["upload"])


def _wrong_with_copies(store: Store, folder: str, mode: Mode) -> str:
    """Which condition of a copy the store does not keep; empty if it keeps all."""
    request = MODES[mode]
    taken, free, absent = folder + "taken", f"{folder}{mode}-free", f"{folder}{mode}-absent"
    item = store.head(folder + "source")
    assert item is not None, "it was there before"
    try:
        if store.copy_new(replace(item, etag=_WRONG_ETAG), store, absent, "0", mode) or store.head(absent):
            return "it ignores the condition on the version that is copied (x-amz-copy-source-if-match)"
        if store.copy_new(item, store, taken, "0", mode) or store.read(taken) != OLD:
            return f"it ignores If-None-Match when an object is copied ({request}), and overwrites"
        if not store.copy_new(item, store, free, "0", mode) or store.read(free) != OTHER:
            return f"it does not copy to a free key with If-None-Match ({request})"
        copied = store.head(free)
        if copied is None or (copied.metadata or {}).get(MARK) != "0":
            return f"it drops the metadata of a copy ({request}), by which an interrupted move is recognised"
        if store.delete_exact(copied) != "deleted":
            return f"it does not delete such a copy with If-Match ({request})"
        if store.copy_new(item, store, taken, "0", mode, unlike=item.etag) or store.read(taken) != OLD:
            return (
                "it ignores If-None-Match when an object is written in parts (CompleteMultipartUpload), and overwrites"
            )
        if store.copy_new(item, store, free, "0", mode, unlike=item.etag) in (None, item.etag):
            return "it gives what undo brings back the ETag that it had (CompleteMultipartUpload)"
        if store.read(free) != OTHER:
            return "it does not write an object in parts (CompleteMultipartUpload)"
    except (StoreError, ObjectError) as error:
        return f"it refuses a copy with conditions ({error})"
    return ""


def _unsafe(store: Store, why: str) -> UnsafeStoreError:
    return UnsafeStoreError(f"{store.url} cannot be sorted safely: {why}. Use a store that keeps this condition")
