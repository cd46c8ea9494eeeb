"""Makes the model folders that the sorter runs."""

import sys

# OpenVINO and NNCF report home through this package unless it cannot be imported: nothing leaves this machine.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
