"""What is checked before a photo is touched: settings that depend on the model, the folders and their permissions.

In: the settings. Out: the settings with the threshold resolved, the manifest, the inbox to scan, the loaded engine.
Nothing is changed: for a folder that does not exist yet, the permissions of the one it will be created in are checked.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from sorter.classifier import manifest as manifests
from sorter.classifier.manifest import RESERVED_FOLDERS, Coverage, Manifest
from sorter.cli import extras
from sorter.errors import ConfigurationError
from sorter.inbox.scan import Inbox
from sorter.service import hook
from sorter.settings import Settings

if TYPE_CHECKING:
    from sorter.classifier.engine import Engine


def check(settings: Settings) -> tuple[Settings, Manifest, list[str] | None]:
    """Check everything that can be wrong and is known before the model is loaded.

    Returns:
        The settings with the threshold resolved, the model's manifest, and the words of `--on-sorted`.

    Raises:
        ConfigurationError, ModelError: a sentence about what is wrong and what to do.
    """
    model = manifests.read(settings.model)
    settings = decided(settings, model)
    check_folders(settings, model)
    if settings.metrics_port:
        extras.require("prometheus_client", "metrics", "--metrics-port")
    return settings, model, None if settings.on_sorted is None else hook.split(settings.on_sorted)


def destinations(manifest: Manifest) -> list[str]:
    """The folders that photos are sorted into, in the manifest's order, then `unsure` and `failed`."""
    return [*(c.folder for c in manifest.classes), *sorted(RESERVED_FOLDERS, reverse=True)]


def watched(settings: Settings, manifest: Manifest) -> Inbox:
    """The inbox to scan, without the folders that photos are sorted into."""
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
    """The settings with the confidence threshold that keeps the requested error rate.

    Raises:
        ConfigurationError: the model cannot keep the rate or has no outlier detector, or a threshold is set as well.
    """
    if settings.catch_neither and manifest.neither is None:
        raise ConfigurationError(
            f"the model {manifest.name} has no out-of-distribution detector: omit --catch-neither, or recreate the "
            "model folder with trainer export"
        )
    rate = settings.max_error_rate
    if rate is None:
        return settings
    if settings.min_confidence:
        raise ConfigurationError("--max-error-rate and --min-confidence both set the threshold: use only one of them")
    rates = _measured_rates(settings, manifest)
    kept = [entry for entry in rates if entry.error_rate <= rate]
    if not kept:
        best = min((entry.error_rate for entry in rates), default=None)
        problem = "was shown to keep no error rate" if best is None else f"keeps an error rate of {best:g} at best"
        raise ConfigurationError(f"the model {manifest.name} {problem}: raise or omit --max-error-rate {rate:g}")
    chosen = max(kept, key=lambda entry: entry.coverage)
    return settings.model_copy(update={"min_confidence": chosen.threshold})


def _measured_rates(settings: Settings, manifest: Manifest) -> tuple[Coverage, ...]:
    """The thresholds for the way the model will run.

    Raises:
        ConfigurationError: they were not measured.
    """
    from sorter.classifier import engine  # imports libraries that take a while

    chosen = engine.choose(settings.model, manifest, settings.engine, settings.device)
    rates = manifest.rates_of(chosen, catch_neither=settings.catch_neither)
    if rates is not None:
        return rates
    way = "PyTorch" if chosen == "torch" else "OpenVINO"
    remedies = ["omit --max-error-rate"]
    if settings.catch_neither:
        way += " and --catch-neither"
        if manifest.rates_of(chosen, catch_neither=False) is not None:
            remedies.insert(0, "drop --catch-neither")
    if chosen == "torch" and manifest.rates_of("openvino", catch_neither=settings.catch_neither) is not None:
        remedies.insert(0, "use --engine openvino --device cpu")
    raise ConfigurationError(
        f"the error rates of the model {manifest.name} were not measured with {way}: {', '.join(remedies)}, or "
        "recreate the model folder with trainer export"
    )


def open_engine(settings: Settings, manifest: Manifest) -> "Engine":
    """Load the model, and let it answer once.

    Raises:
        ConfigurationError, ModelError: the device does not exist, or the weights cannot be used.
    """
    from sorter.classifier import engine  # imports libraries that take a while

    return engine.open_engine(
        settings.model,
        manifest,
        settings.engine,
        settings.device,
        settings.batch_size,
        settings.min_confidence,
        catch_neither=settings.catch_neither,
    )


def check_folders(settings: Settings, manifest: Manifest) -> None:
    """Make sure that the inbox can be read and the output written.

    Raises:
        ConfigurationError: a sentence about which folder is wrong and what to do.
    """
    try:
        _check_folders(settings, manifest)
    except OSError as error:
        raise ConfigurationError(
            f"cannot access {error.filename} ({error.strerror}): check its permissions, or use another folder"
        ) from None


def _check_folders(settings: Settings, manifest: Manifest) -> None:
    inbox = settings.inbox
    if not inbox.exists():
        raise ConfigurationError(f"there is no inbox {inbox}: create it, or use another folder with --inbox")
    if not inbox.is_dir():
        raise ConfigurationError(f"the inbox {inbox} is not a folder: use a folder with --inbox")
    needed = os.R_OK | os.X_OK | (0 if settings.dry_run else os.W_OK)
    if not os.access(inbox, needed):
        wanted = "read" if settings.dry_run else "read and write"
        raise ConfigurationError(f"this user may not {wanted} the inbox {inbox}: change its permissions")
    output = settings.output_folder
    for folder in destinations(manifest):
        target = output / folder
        if inbox.resolve() == target.resolve():
            raise ConfigurationError(f"the inbox {inbox} is a folder that photos are sorted into: use another --output")
        if target.is_symlink():
            raise ConfigurationError(f"{target} is a symbolic link: use the real folder with --output")
        if target.exists() and not target.is_dir():
            raise ConfigurationError(f"{target} exists and is not a folder: move it away, or use another --output")
        if not settings.dry_run:
            _check_writable(target)


def _check_writable(target: Path) -> None:
    nearest = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise ConfigurationError(f"{nearest} is not a folder, so {target} cannot be created: use another --output")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"this user may not write to {nearest}: change its permissions, or use another --output"
        )
