"""A slow line to a server: `delayed.py SECONDS BYTES_PER_SECOND PROGRAM`.

What goes to the program is late by so many seconds, and what it answers comes at so many bytes a second (0: at once).
Messages that are sent together are late together, so it is the round trips that cost.
"""

import os
import queue
import subprocess
import sys
import threading
import time

_BLOCK_BYTES = 1 << 14


def main() -> None:
    """Pass standard input on, and back what the program answers."""
    delay_seconds, bytes_per_second, program = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    to_program, answers = process.stdin, process.stdout
    waiting: queue.Queue[tuple[float, bytes]] = queue.Queue()

    def pass_on() -> None:
        while True:
            due, block = waiting.get()
            time.sleep(max(0.0, due - time.monotonic()))
            if not block:
                to_program.close()
                return
            to_program.write(block)
            to_program.flush()

    def pass_back() -> None:
        while block := os.read(answers.fileno(), _BLOCK_BYTES):
            if bytes_per_second:
                time.sleep(len(block) / bytes_per_second)
            while block:
                block = block[os.write(1, block) :]

    for work in (pass_on, pass_back):
        threading.Thread(target=work, daemon=True).start()
    while block := os.read(0, 1 << 16):
        waiting.put((time.monotonic() + delay_seconds, block))
    waiting.put((time.monotonic(), b""))
    sys.exit(process.wait())


main()
