"""`sorter check`: check everything that could be wrong before a run, and print what the run would do."""

from sorter.classifier.manifest import Manifest
from sorter.cli import entries, preflight
from sorter.errors import ExitCode
from sorter.settings import Settings


def check(settings: Settings) -> ExitCode:
    """Load the model, let it answer once, and print what a run would use.

    Raises:
        ConfigurationError, ModelError, NotNowError: a sentence about what is wrong and what to do.
    """
    settings, model, _ = preflight.check(settings)
    preflight.check_folders(settings, model)
    engine = preflight.open_engine(settings, model)
    rows = {
        "inbox": f"{settings.inbox.absolute()}" + (" and its subfolders" if settings.recursive else ""),
        "output": f"{settings.output_folder.absolute()}",
        "folders": ", ".join(f"{folder}/" for folder in preflight.destinations(model)),
        "model": f"{model.name}, {model.architecture} at {model.input.size} px",
        "accuracy": _accuracy(model),
        "unsure": _unsure(settings),
        "engine": f"{engine.name} on {engine.device}, {engine.precision}, batches of {settings.batch_size}",
    }
    if engine.unused_gpu:
        rows["note"] = engine.unused_gpu
    for name, value in rows.items():
        print(f"{name:<9} {entries.printable(value)}")
    print("Everything is fine.")
    return ExitCode.DONE


def _accuracy(model: Manifest) -> str:
    if model.accuracy is None:
        return "not measured"
    return f"{model.accuracy:.2%} on photos that it was not trained on"


def _unsure(settings: Settings) -> str:
    kinds = [f"photos with a confidence below {settings.min_confidence:g}"] if settings.min_confidence else []
    kinds += ["photos that look like none of the classes"] if settings.catch_neither else []
    return ", ".join(kinds) or "nothing; every photo is sorted"
