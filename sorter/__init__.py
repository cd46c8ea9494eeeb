"""Sorts the photos in a folder into cats and dogs."""

import sys

__version__ = "0.1.0"

# OpenVINO and NNCF send telemetry through this package. It cannot be imported, so nothing leaves this machine.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
