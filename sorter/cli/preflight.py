"""What is checked before a photo is touched: the folders, and what the process may do in them.

Nothing is changed here: a folder that does not exist yet is judged by the one it will be made in.
"""

import importlib.util
import os
from pathlib import Path

from sorter.classifier import manifest as manifests
from sorter.classifier.manifest import RESERVED_FOLDERS, Manifest
from sorter.errors import ConfigurationError
from sorter.inbox.scan import Inbox
from sorter.service import hook
from sorter.settings import Settings


def check(settings: Settings) -> tuple[Settings, Manifest, list[str] | None]:
    """Everything that can be wrong and is known before the model is loaded.

    Returns:
        The settings as they are meant, the model's manifest, and the words of `--on-sorted`.

    Raises:
        ConfigurationError, ModelError: a sentence that says what to do.
    """
    model = manifests.read(settings.model)
    settings = decided(settings, model)
    check_folders(settings, model)
    check_metrics(settings)
    return settings, model, None if settings.on_sorted is None else hook.split(settings.on_sorted)


def destinations(manifest: Manifest) -> list[str]:
    """The folders that photos are sorted into, in the manifest's order, then `unsure` and `failed`."""
    return [*(c.folder for c in manifest.classes), *sorted(RESERVED_FOLDERS, reverse=True)]


def watched(settings: Settings, manifest: Manifest) -> Inbox:
    """The inbox as it is asked for, without the folders that photos are sorted into."""
    return Inbox(
        settings.inbox,
        recursive=settings.recursive,
        excluded=excluded(settings, manifest),
        settle_seconds=settings.settle_seconds,
    )


def excluded(settings: Settings, manifest: Manifest) -> frozenset[str]:
    """Paths that are never scanned for photos, absolute and without symbolic links."""
    output = os.path.realpath(settings.output_folder)
    return frozenset(os.path.join(output, folder) for folder in destinations(manifest))


def decided(settings: Settings, manifest: Manifest) -> Settings:
    """The settings with the threshold that an error rate asks for.

    Raises:
        ConfigurationError: the model cannot keep the rate or tell what is neither, or a threshold is given too.
    """
    if settings.catch_neither and manifest.neither is None:
        raise ConfigurationError(
            f"the model {manifest.name} cannot tell photos of neither: leave out --catch-neither, or make its folder "
            "anew with trainer export"
        )
    rate = settings.max_error_rate
    if rate is None:
        return settings
    if settings.min_confidence:
        raise ConfigurationError("--max-error-rate chooses what --min-confidence says: give one of them")
    kept = [entry for entry in manifest.risk_coverage if entry.error_rate <= rate]
    if not kept:
        best = min((entry.error_rate for entry in manifest.risk_coverage), default=None)
        can = "was never measured on enough photos" if best is None else f"can keep {best:g} at best"
        raise ConfigurationError(f"the model {manifest.name} {can}: --max-error-rate {rate:g} is out of its reach")
    chosen = max(kept, key=lambda entry: entry.coverage)
    return settings.model_copy(update={"min_confidence": chosen.threshold})


def check_metrics(settings: Settings) -> None:
    """Make sure that what is asked for is installed.

    Raises:
        ConfigurationError: the extra is missing.
    """
    if settings.metrics_port and importlib.util.find_spec("prometheus_client") is None:
        raise ConfigurationError(
            "--metrics-port needs prometheus-client: install sorter with it, pip install '.[metrics]'"
        )


def check_folders(settings: Settings, manifest: Manifest) -> None:
    """Make sure that the inbox can be read and the output written.

    Raises:
        ConfigurationError: one sentence that says which folder is wrong and what to do.
    """
    try:
        _check_folders(settings, manifest)
    except OSError as error:
        raise ConfigurationError(
            f"{error.filename} cannot be looked at ({error.strerror}): give this user permission to, or name another"
        ) from None


def _check_folders(settings: Settings, manifest: Manifest) -> None:
    inbox = settings.inbox
    if not inbox.exists():
        raise ConfigurationError(f"there is no inbox {inbox}: create it, or name another folder with --inbox")
    if not inbox.is_dir():
        raise ConfigurationError(f"the inbox {inbox} is not a folder: name one with --inbox")
    needed = os.R_OK | os.X_OK | (0 if settings.dry_run else os.W_OK)
    if not os.access(inbox, needed):
        wanted = "read" if settings.dry_run else "read and changed"
        raise ConfigurationError(f"the inbox {inbox} cannot be {wanted}: give this user permission to")
    output = settings.output_folder
    for folder in destinations(manifest):
        target = output / folder
        if inbox.resolve() == target.resolve():
            raise ConfigurationError(
                f"the inbox {inbox} is a folder that photos are sorted into: name another --output"
            )
        if target.is_symlink():
            raise ConfigurationError(f"{target} is a symbolic link: name the real folder with --output")
        if target.exists() and not target.is_dir():
            raise ConfigurationError(
                f"{target} is in the way, it is not a folder: move it away or name another --output"
            )
        if not settings.dry_run:
            _check_writable(target)


def _check_writable(target: Path) -> None:
    nearest = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise ConfigurationError(f"{nearest} is not a folder, so {target} cannot be made: name another --output")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigurationError(f"{nearest} cannot be written: give this user permission to, or name another --output")
