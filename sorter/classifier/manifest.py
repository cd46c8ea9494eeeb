"""The model folder: a model's description, beside its weights.

    manifest.json         all that the sorter needs: classes and folders, preprocessing, measurements, digests
    weights.safetensors   the network's state dict in torchvision's names, fp16
    openvino.xml, .bin    the same network for OpenVINO, with 8 bits if it was accurate enough
    openvino-fp16.xml, .bin   otherwise
    neither.safetensors   the outlier detector, if there is one
    guard.safetensors     features of the calibration photos, for the trainer
    README.md             the model card, for people

`read` verifies version and digests before anything is used, `write` makes a folder that `read` accepts. Nothing is ever
unpickled, and nothing here imports torch.
"""

import errno
import hashlib
import io
import itertools
import os
import re
import stat
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from sorter.decoding.images import Preprocessing
from sorter.errors import ModelError
from sorter.files import FAILED, UNSURE
from sorter.files.replaced import replaced

FORMAT_VERSION = 3
"""Format 1 had one table of error rates, of OpenVINO without `--catch-neither`, and one temperature. Formats 1 and 2
had at most one low-resolution pass, and a detector that was fitted on photos of the classes alone."""
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
OPENVINO_INT8 = ("openvino.xml", "openvino.bin")
OPENVINO_FP16 = ("openvino-fp16.xml", "openvino-fp16.bin")
NEITHER = "neither.safetensors"
_RESERVED_FOLDERS = frozenset({UNSURE, FAILED})
MAX_MANIFEST_BYTES = 10_000_000
_MAX_NAME_BYTES = 255  # of a folder, on the usual file systems


def _printable(text: str) -> str:
    # It appears in logs, on terminals and in one-line messages.
    if not text.isprintable():
        raise ValueError(f"{ascii(text)[:60]} contains characters that cannot be shown")
    return text


Printable = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable)]
Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
EngineName = Literal["openvino", "torch"]
Channels = tuple[float, float, float]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Class(_Part):
    """One of the network's classes, and the folder for its photos."""

    label: Printable
    folder: str


class Input(_Part):
    """How a photo becomes the network's input; mean and standard deviation refer to pixels from 0 to 1."""

    size: int = Field(ge=16, le=1024)
    crop: Literal["squash", "center"]
    resize: int = Field(default=0, ge=0, le=2048)
    interpolation: Literal["bilinear"] = "bilinear"
    mean: Channels
    std: tuple[Positive, Positive, Positive]

    @property
    def preprocessing(self) -> Preprocessing:
        """The part that decoding needs."""
        return Preprocessing(self.size, self.crop, self.resize)


class Evaluation(_Part):
    """The model's measurements on one set of photos, and what that set was used for."""

    data: str
    role: Literal["calibration", "test"]
    photos: int = Field(gt=0)
    right: int = Field(ge=0)
    accuracy: Probability
    accuracy_interval_95: tuple[Probability, Probability]
    log_loss: float = Field(ge=0)
    calibration_error: Probability | None = None
    confusion: tuple[tuple[int, ...], ...] = ()


class Coverage(_Part):
    """The share of photos that can be sorted at some error rate.

    Photos like the calibration photos whose confidence reaches the threshold are wrong at most at that rate, as a 95 %
    upper confidence bound.
    """

    error_rate: Probability
    threshold: Probability
    coverage: Probability


class ErrorRates(_Part):
    """The thresholds for one way of running the model; another way gives other confidences, and so needs its own.

    Attributes:
        catch_neither: whether photos that the outlier detector catches are left out.
        rates: none if the photos support no rate.
    """

    engine: EngineName
    catch_neither: bool
    rates: tuple[Coverage, ...]


class Int8(_Part):
    """How often the 8-bit and the 32-bit network agree, on the calibration photos.

    Attributes:
        log_loss_increase: of the 8-bit network over the 32-bit one, each with its own temperature.
    """

    photos: int = Field(gt=0)
    agreement: Probability
    log_loss_increase: float | None = None


class LowResolutionPass(_Part):
    """A pass of the cascade on a CPU; photos that it is confident about get no other pass.

    Attributes:
        size: side of the network's input, pixels.
        temperature: for this size; the network is less confident about smaller pictures.
        threshold: the confidence from which the answer is final.
        neither_threshold: with `--catch-neither` the answer is final only up to this distance, at this size; None if
            the pass is left out then.
        photos: the calibration photos, on which temperature and thresholds were chosen.
        enough: the share of them for which this pass was final.
        agreement: the share of them that get the same label as at full size, from this pass and those before it.
    """

    size: int = Field(ge=16, le=1024)
    temperature: float = Field(gt=0)
    threshold: Probability
    neither_threshold: float | None = None
    photos: int = Field(gt=0)
    enough: Probability
    agreement: Probability


class Neither(_Part):
    """The outlier detector's threshold; its tensors are in `neither.safetensors`, see `classifier.outliers`.

    Attributes:
        score: how the distance is measured: `learned` from photos of other things, or `mahalanobis`.
        threshold: the distance above which a photo counts as showing none of the classes.
        photos: how many photos of the classes it was chosen on; the detector was fitted on others.
        caught: the share of them that exceeds it, by mistake.
        others: how many photos of other things, which nothing was fitted on, were measured; 0 for none.
        others_caught: the share of those that exceeds the threshold.
    """

    score: Literal["learned", "mahalanobis"] = "mahalanobis"
    threshold: float
    photos: int = Field(gt=0)
    caught: Probability
    others: int = Field(default=0, ge=0)
    others_caught: Probability = 0.0


class Manifest(_Part):
    """A model folder's description, field by field as in `manifest.json`.

    Attributes:
        temperature: of the network that OpenVINO runs, at full size.
        torch_temperature: of the network that PyTorch runs; None for the same one.
        error_rates: one table for each way of running the model that was measured.
        cascade: the passes before the one at full size, in their order.
    """

    format_version: int = Field(ge=1)
    name: Printable
    architecture: Printable
    head_hidden: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = Field(default=(), max_length=16)
    classes: tuple[Class, ...] = Field(min_length=2, max_length=10_000)
    input: Input
    temperature: float = Field(gt=0)
    torch_temperature: float | None = Field(default=None, gt=0)
    evaluations: tuple[Evaluation, ...] = ()
    error_rates: tuple[ErrorRates, ...] = ()
    int8: Int8 | None = None
    cascade: tuple[LowResolutionPass, ...] = ()
    neither: Neither | None = None
    training: Mapping[str, str | int | float] = {}
    files: Mapping[str, str]

    @model_validator(mode="before")
    @classmethod
    def _from_older_formats(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        content = dict(content)
        if "risk_coverage" in content:
            table = {"engine": "openvino", "catch_neither": False, "rates": content.pop("risk_coverage")}
            content["error_rates"] = [table]
        if "first_look" in content:
            first = content.pop("first_look")
            content["cascade"] = [] if first is None else [first]
        return content

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        check_classes(self.classes)
        if self.input.crop == "center" and self.input.resize < self.input.size:
            raise ValueError("a center crop needs a resize of at least the input size")
        sizes = [low.size for low in self.cascade] + [self.input.size]
        if any(size >= larger for size, larger in itertools.pairwise(sizes)):
            raise ValueError("a pass of the cascade is not smaller than the next one")
        if self.neither is not None and self.neither.score == "mahalanobis" and not self.head_hidden:
            raise ValueError("this outlier detector needs a head with a hidden layer")
        return self

    def temperature_of(self, engine: EngineName) -> float:
        """What an engine divides the logits of the full-size pass by."""
        return self.torch_temperature or self.temperature if engine == "torch" else self.temperature

    def rates_of(self, engine: EngineName, *, catch_neither: bool) -> tuple[Coverage, ...] | None:
        """The thresholds for a way of running the model; None if it was not measured."""
        return next((e.rates for e in self.error_rates if (e.engine, e.catch_neither) == (engine, catch_neither)), None)

    @property
    def accuracy(self) -> float | None:
        """On the test photos, on which nothing was tuned; None if it was never measured."""
        return next((e.accuracy for e in self.evaluations if e.role == "test"), None)


def check_classes(classes: Sequence[Class]) -> None:
    """Make sure that each class has a folder of its own that the sorter can create and does not use itself.

    Raises:
        ValueError: what is wrong with them.
    """
    for folder in (c.folder for c in classes):
        plain = re.fullmatch(r"[^/.][^/]*", folder) and folder.isprintable()
        if not plain or len(os.fsencode(folder)) > _MAX_NAME_BYTES or is_reserved(folder):
            raise ValueError(f"the folder {ascii(folder)[:60]} is not a plain name, or is reserved")
    if min(len({_folded(c.folder) for c in classes}), len({c.label for c in classes})) < len(classes):
        raise ValueError("two classes have the same label or folder")


def is_reserved(folder: str) -> bool:
    """Whether the sorter keeps a folder's name for photos of no class."""
    return _folded(folder) in _RESERVED_FOLDERS


def _folded(folder: str) -> str:
    """Equal for names that are the same folder on a file system that ignores case or composes accents."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", folder).casefold())


def read(folder: Path) -> Manifest:
    """Read a model folder's manifest and verify the files beside it.

    Raises:
        ModelError: it is missing, invalid or too new, or a file differs from its digest.
    """
    path = folder / MANIFEST
    try:
        with _opened(path) as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ModelError(
            f"there is no model in {folder} ({MANIFEST}: {error.strerror}): give a model folder with --model"
        ) from None
    if len(text) > MAX_MANIFEST_BYTES:
        raise ModelError(f"{path} is too large to be a manifest: give a model folder with --model")
    version = re.search(rb'"format_version"\s*:\s*0*(\d+)', text)
    digits = version[1][:9].decode() if version else "0"  # Python refuses to parse thousands of them
    if int(digits) > FORMAT_VERSION:
        raise ModelError(
            f"the model in {folder} has format {digits}, this sorter reads up to {FORMAT_VERSION}: upgrade sorter"
        )
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "its content"
        field = field if field.isprintable() and len(field) < 100 else ascii(field)[:100]
        raise ModelError(f"{path} is not a valid manifest ({field}: {first['msg']}): export the model again") from None
    if WEIGHTS not in manifest.files:
        raise ModelError(f"{path} names no {WEIGHTS}: export the model again")
    if manifest.neither is not None and NEITHER not in manifest.files:
        raise ModelError(f"{path} names no {NEITHER}: export the model again")
    for name, digest in manifest.files.items():
        _verify(folder, name, digest)
    return manifest


def _verify(folder: Path, name: str, digest: str) -> None:
    if "/" in name or not name.isprintable() or name.startswith("."):
        raise ModelError(f"the model in {folder} lists a file outside itself ({ascii(name)[:100]}): do not use it")
    try:
        found = digest_of(folder / name)
    except OSError as error:
        raise ModelError(
            f"the model in {folder} cannot be used ({name[:100]}: {error.strerror}): copy the whole folder again"
        ) from None
    if found != digest:
        raise ModelError(
            f"the model in {folder} is damaged: {name} differs from its digest; copy the whole folder again"
        )


def digest_of(path: Path) -> str:
    """`sha256:` and the hexadecimal SHA-256 of a regular file."""
    with _opened(path) as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _opened(path: Path) -> io.BufferedReader:
    """Open a regular file, never a FIFO that has no writer or a device that has no end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(descriptor, "rb")


def write(folder: Path, manifest: Manifest, files: Mapping[str, bytes], card: str) -> Manifest:
    """Write a model folder: its files, model card, and the manifest with their digests.

    Everything is written under hidden names before anything is renamed, so an older model in the folder stays intact if
    the disk fills up. An end in the middle of the renames leaves the older model, the new one, or a folder that `read`
    refuses by its digests: the manifest is renamed last.

    Args:
        folder: created if missing.
        manifest: its `files` are replaced by the digests of the files written.
        files: contents by name; at least `weights.safetensors`.
        card: Markdown.

    Returns:
        The manifest as written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digests = {name: f"sha256:{hashlib.sha256(files[name]).hexdigest()}" for name in sorted(files)}
    written = manifest.model_copy(update={"files": digests})
    described = (written.model_dump_json(indent=2) + "\n").encode()
    with ExitStack() as renames:  # in reverse order
        for name, content in {MANIFEST: described, "README.md": card.encode(), **files}.items():
            renames.enter_context(replaced(folder / name)).write_bytes(content)
    return written
