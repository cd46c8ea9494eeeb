"""Runs a program with each message on its way to it delayed: `delayed.py SECONDS PROGRAM`, a long line to a server.

What arrives together is delayed together, so the bandwidth stays and only the round trips cost.
"""

import os
import queue
import subprocess
import sys
import threading
import time


def main() -> None:
    """Pass standard input on, late, and standard output at once."""
    delay_seconds, program = float(sys.argv[1]), sys.argv[2:]
    process = subprocess.Popen(program, stdin=subprocess.PIPE)
    assert process.stdin is not None
    waiting: queue.Queue[tuple[float, bytes]] = queue.Queue()

    def pass_on() -> None:
        assert process.stdin is not None
        while True:
            due, block = waiting.get()
            time.sleep(max(0.0, due - time.monotonic()))
            if not block:
                process.stdin.close()
                return
            process.stdin.write(block)
            process.stdin.flush()

    threading.Thread(target=pass_on, daemon=True).start()
    while block := os.read(0, 1 << 16):
        waiting.put((time.monotonic() + delay_seconds, block))
    waiting.put((time.monotonic(), b""))
    sys.exit(process.wait())


main()
