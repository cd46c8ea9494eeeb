"""What is checked before a photo is touched: settings that depend on the model, the folders and their permissions.

In: the settings. Out: the settings with the threshold resolved, the manifest, the inbox to scan, the loaded engine.
Nothing is changed: for a folder that does not exist yet, the permissions of the one it will be created in are checked.
"""

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sorter import extras
from sorter.classifier import manifest as manifests
from sorter.classifier.manifest import Coverage, Manifest
from sorter.errors import ConfigurationError, NotNowError
from sorter.files import FAILED, HISTORY, UNSURE
from sorter.files.state import state_folder
from sorter.history.reader import HistoryReader
from sorter.inbox.scan import Inbox
from sorter.inbox.selection import Selection
from sorter.inbox.sidecars import PHOTO_EXTENSIONS
from sorter.service import hook
from sorter.settings import Settings

if TYPE_CHECKING:
    from sorter.classifier.engine import Engine


# What asking for a folder fails with while it is not mounted, or its server does not answer.
_AWAY = (
    errno.ENOENT,
    errno.EIO,
    errno.ESTALE,
    errno.ENODEV,
    errno.ENXIO,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
)


def check(settings: Settings) -> tuple[Settings, Manifest, list[str] | None]:
    """Check everything that can be wrong and is known before the model is loaded, except for the folders.

    Returns:
        The settings with the threshold resolved, the model's manifest, and the words of `--on-sorted`.

    Raises:
        ConfigurationError, ModelError: a sentence about what is wrong and what to do.
    """
    if str(settings.inbox).startswith("s3:/"):
        raise ConfigurationError(f"{settings.inbox} is in an object store: use sorter cluster run")
    if settings.link and (folder := sorted_again(settings)) is not None:
        raise ConfigurationError(
            f"photos in {folder}/ are sorted again by moving them, which --link does not do: drop --link"
        )
    check_sidecar_suffixes(settings)
    settings, model = read_model(settings)
    if settings.metrics_port:
        extras.require("prometheus_client", "metrics", "--metrics-port")
    return settings, model, None if settings.on_sorted is None else hook.split(settings.on_sorted)


def check_sidecar_suffixes(settings: Settings) -> None:
    """Make sure that no photo is taken for a sidecar, which would move without being classified.

    Raises:
        ConfigurationError: one would be.
    """
    for suffix in sorted(suffix.lower() for suffix in settings.sidecar_suffixes):
        if suffix.endswith(PHOTO_EXTENSIONS) or any(extension.endswith(suffix) for extension in PHOTO_EXTENSIONS):
            raise ConfigurationError(f"--sidecar-suffixes {suffix}: such files are photos; name endings of other files")


def read_model(settings: Settings) -> tuple[Settings, Manifest]:
    """Read and verify the model folder, and resolve the settings that depend on the model.

    Returns:
        The settings, with the folder itself where `--model` is a link, and with the threshold; the manifest.

    Raises:
        ConfigurationError, ModelError: a sentence about what is wrong and what to do.
    """
    # Followed once: the link may be replaced before the weights are opened, and they must be those of the manifest.
    real = os.path.realpath(settings.model)
    if real != os.path.abspath(settings.model):
        settings = settings.model_copy(update={"model": Path(real)})
    manifest = manifests.read(settings.model)
    return decided(settings, manifest), manifest


def destinations(manifest: Manifest) -> list[str]:
    """The folders that photos are sorted into, in the manifest's order, then `unsure` and `failed`."""
    return [*(c.folder for c in manifest.classes), UNSURE, FAILED]


def watched(settings: Settings, manifest: Manifest) -> Inbox:
    """The inbox to scan, without the folders that photos are sorted into."""
    return Inbox(
        settings.inbox,
        recursive=settings.recursive,
        excluded=excluded(settings, manifest),
        settle_seconds=settings.settle_seconds,
        selection=selection(settings),
    )


def selection(settings: Settings) -> Selection:
    """Which names in the inbox are sorted, by the settings."""
    return Selection(
        include=settings.include,
        exclude=settings.exclude,
        ignored_folders=settings.ignored_folders,
        temporary_names=settings.temporary_names,
        sidecar_suffixes=settings.sidecar_suffixes,
    )


def sorted_again(settings: Settings) -> str | None:
    """The folder of the output that is the inbox, where that is `unsure` or `failed`."""
    inbox = settings.inbox.resolve()
    return next((name for name in (UNSURE, FAILED) if inbox == (settings.output_folder / name).resolve()), None)


def excluded(settings: Settings, manifest: Manifest) -> frozenset[str]:
    """Paths that are never scanned for photos, absolute and without symbolic links."""
    output = os.path.realpath(settings.output_folder)
    folders = {*destinations(manifest)}
    if settings.recursive and (state_folder(Path(output), settings.state_dir) / HISTORY).is_file():
        reader = HistoryReader(Path(output), settings.state_dir)
        folders |= reader.folders()  # of models that were used before
        reader.close()
    return frozenset(os.path.join(output, folder) for folder in folders)


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


def measured_engine(settings: Settings, manifest: Manifest) -> str:
    """The engine with which `--max-error-rate` became a threshold; empty if there is none to keep to."""
    if settings.max_error_rate is None:
        return ""
    from sorter.classifier import engine  # imports libraries that take a while

    return engine.choose(settings.model, manifest, settings.engine, settings.device)


def open_engine(settings: Settings, manifest: Manifest) -> "Engine":
    """Load the model, and let it answer once.

    Raises:
        ConfigurationError, ModelError: the device does not exist, or the weights cannot be used.
        NotNowError: the GPU cannot be used at present, and `--max-error-rate` was resolved for it.
    """
    from sorter.classifier import engine  # imports libraries that take a while

    opened = engine.open_engine(
        settings.model,
        manifest,
        settings.engine,
        settings.device,
        settings.batch_size,
        settings.min_confidence,
        catch_neither=settings.catch_neither,
    )
    chosen = engine.choose(settings.model, manifest, settings.engine, settings.device)
    if settings.max_error_rate is not None and opened.name != chosen:
        raise NotNowError(f"--max-error-rate stands for another threshold there: {opened.unused_gpu}")
    return opened


def check_folders(settings: Settings, manifest: Manifest) -> None:
    """Make sure that the inbox can be read and the output written.

    Raises:
        ConfigurationError: a sentence about which folder is wrong and what to do.
        NotNowError: there is no inbox.
    """
    if not inbox_exists(settings):
        raise NotNowError(
            f"the inbox folder '{settings.inbox}' does not exist: create or mount it, or use another with --inbox"
        )
    try:
        _check_folders(settings, manifest)
    except OSError as error:
        raise ConfigurationError(
            f"cannot access {error.filename} ({error.strerror}): check its permissions, or use another folder"
        ) from None


def inbox_exists(settings: Settings) -> bool:
    """Whether the inbox is there, and its server answers."""
    try:
        os.stat(settings.inbox)
    except OSError as error:
        return error.errno not in _AWAY
    return True


def _check_folders(settings: Settings, manifest: Manifest) -> None:
    inbox = settings.inbox
    if not inbox.is_dir():
        raise ConfigurationError(f"the inbox {inbox} is not a folder: use a folder with --inbox")
    needed = os.R_OK | os.X_OK | (0 if settings.dry_run else os.W_OK)
    if not os.access(inbox, needed):
        if needed & os.W_OK and _is_read_only(inbox):
            raise ConfigurationError(
                f"the inbox {inbox} is on a read-only file system: make that writable, or use another --inbox"
            )
        wanted = "read" if settings.dry_run else "read and write"
        raise ConfigurationError(f"this user may not {wanted} the inbox {inbox}: change its permissions")
    output = settings.output_folder
    for folder in destinations(manifest):
        target = output / folder
        if inbox.resolve() == target.resolve() and folder not in (UNSURE, FAILED):
            raise ConfigurationError(f"the inbox {inbox} is a folder that photos are sorted into: use another --output")
        if target.is_symlink():
            raise ConfigurationError(f"{target} is a symbolic link: replace it by a folder, or use another --output")
        if target.exists() and not target.is_dir():
            raise ConfigurationError(f"{target} exists and is not a folder: move it away, or use another --output")
        if not settings.dry_run:
            _check_writable(target, "--output")
    if settings.state_dir is not None and not settings.dry_run:
        _check_writable(settings.state_dir, "--state-dir")


def _check_writable(target: Path, flag: str) -> None:
    nearest = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise ConfigurationError(f"{nearest} is not a folder, so {target} cannot be created: use another {flag}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        if _is_read_only(nearest):
            raise ConfigurationError(
                f"{nearest} is on a read-only file system: make that writable, or use another {flag}"
            )
        raise ConfigurationError(f"this user may not write to {nearest}: change its permissions, or use another {flag}")


def _is_read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
