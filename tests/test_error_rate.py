"""`--max-error-rate`: the threshold comes from the table in the model's manifest."""

from pathlib import Path
from typing import Any

import pytest

from sorter.classifier.manifest import Coverage, Manifest
from sorter.cli import preflight
from sorter.cli.main import main
from sorter.errors import ConfigurationError
from sorter.settings import Settings, load

TABLE = (
    Coverage(error_rate=0.01, threshold=0.99, coverage=0.6),
    Coverage(error_rate=0.02, threshold=0.9, coverage=0.8),
    Coverage(error_rate=0.05, threshold=0.6, coverage=1.0),
)


def threshold(manifest: Manifest, **settings: Any) -> float:
    measured = manifest.model_copy(update={"risk_coverage": TABLE})
    return preflight.decided(Settings(**settings), measured).min_confidence


@pytest.mark.parametrize(("rate", "expected"), [(0.01, 0.99), (0.015, 0.99), (0.02, 0.9), (0.5, 0.6)])
def test_as_many_photos_are_sorted_as_the_rate_allows(rate: float, expected: float, manifest: Manifest) -> None:
    assert threshold(manifest, max_error_rate=rate) == expected


def test_without_a_rate_the_threshold_is_min_confidence(manifest: Manifest) -> None:
    assert threshold(manifest, min_confidence=0.7) == 0.7
    assert threshold(manifest) == 0.0


def test_a_rate_that_the_model_cannot_keep_is_refused_with_the_lowest_it_can(manifest: Manifest) -> None:
    with pytest.raises(
        ConfigurationError, match=r"keeps an error rate of 0\.01 at best: raise or omit --max-error-rate 0\.005"
    ):
        threshold(manifest, max_error_rate=0.005)
    with pytest.raises(ConfigurationError, match="has no measured error rates"):
        preflight.decided(Settings(max_error_rate=0.1), manifest)


def test_a_rate_and_a_threshold_together_are_refused(manifest: Manifest) -> None:
    with pytest.raises(ConfigurationError, match="use only one of them"):
        threshold(manifest, max_error_rate=0.02, min_confidence=0.9)


def test_a_value_that_is_not_a_rate_is_refused() -> None:
    for rate in ("0", "1", "-1", "nan", "much"):
        with pytest.raises(ConfigurationError, match="--max-error-rate: should be"):
            load({"max_error_rate": rate})


def test_the_check_says_what_goes_to_unsure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--max-error-rate", "0.05", "--inbox", str(tmp_path)]) == 0
    assert "photos with a confidence below 0.5" in capsys.readouterr().out
    assert main(["check", "--inbox", str(tmp_path)]) == 0
    assert "nothing; every photo is sorted" in capsys.readouterr().out
