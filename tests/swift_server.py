"""Run as a program: one of Swift's servers with its configuration in a folder of ours, or the rings for all of them."""

import json
import os
import sys
from pathlib import Path

folder, kind = Path(sys.argv[1]), sys.argv[2]
os.environ["SWIFT_DIR"] = str(folder)

from swift.common import utils  # noqa: E402, it reads SWIFT_DIR

utils.SWIFT_CONF_FILE = str(folder / "swift.conf")

if kind == "rings":
    from swift.common.ring import RingBuilder

    for name, port in json.loads(sys.argv[3]).items():
        if name == "proxy":
            continue
        builder = RingBuilder(4, 1, 1)  # 16 partitions, one replica
        builder.add_dev(
            {"id": 0, "region": 0, "zone": 0, "weight": 1.0, "ip": "127.0.0.1", "port": port, "device": "sda"}
        )
        builder.rebalance()
        builder.get_ring().save(str(folder / f"{name}.ring.gz"))
else:
    from swift.common.wsgi import run_wsgi

    sys.exit(run_wsgi(str(folder / f"{kind}-server.conf"), f"{kind}-server"))
