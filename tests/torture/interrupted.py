"""Runs of the driver in forked children, so that no interpreter starts; the owner or a kill interrupts each in between.

    python interrupted.py < requests > replies      one JSON object a line

A moment is counted in calls and returns of the modules that move and record: everything between two steps of theirs.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import driver
import structlog
from owner import Owner

from sorter.decisions import Decision
from sorter.decoding.decoded import Decoded
from sorter.errors import SorterError
from sorter.files import atomic
from sorter.files.photo import Identity, Photo, open_file
from sorter.history import store as history
from sorter.moving import batch_mover, copies, linker, mover, recovery

MODULES = {module.__file__ for module in (atomic, batch_mover, copies, history, linker, mover, recovery)}


class Interrupted:
    """One run in this process, which may end it."""

    def __init__(self, request: dict[str, Any], report: int) -> None:
        self._owner = Owner(*(Path(request[place]) for place in ("inbox", "output", "outside")))
        self._actions = {moment: action for moment, *action in request["actions"]}
        self._kill, self._report, self._moment = request["kill"], report, 0
        self._waiting: list[str] | None = None
        if request["link"]:
            # No file system here lacks renameat2's flag, so its absence is played.
            atomic._rename_function = None

    def run(self) -> int:
        sys.setprofile(self._step)
        try:
            return driver.sort(self._owner.inbox, self._owner.output, self._decide)
        except SorterError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        finally:
            sys.setprofile(None)
            if self._waiting is not None:
                self._act(self._waiting)
            self._tell({"moments": self._moment})

    def _step(self, frame: FrameType, _event: str, _argument: object) -> None:
        if frame.f_code.co_filename not in MODULES:
            return
        self._moment += 1
        action = self._waiting or self._actions.get(self._moment)
        if action is not None:
            sys.setprofile(None)
            self._act(action)
            sys.setprofile(self._step)
        if self._moment == self._kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def _act(self, action: list[str]) -> None:
        """Let the owner act, or wait for the end of a lease, as another process would."""
        self._waiting = None
        try:
            effect = self._owner.act(*action)
        except BlockingIOError:
            self._waiting = action
        else:
            self._tell({"effect": dataclasses.asdict(effect)})

    def _decide(self, photo: Photo, run: history.Run) -> Decision | None:
        try:
            descriptor = open_file(photo)
        except OSError:
            return None
        with open(descriptor) as file:
            identity = Identity.of(os.fstat(descriptor))
            if not identity.is_same_file(photo.identity):
                return None
            content = file.read()
        folder = "cats" if content.startswith("c") else "dogs"
        self._tell({"judged": content})
        return Decision(Decoded(dataclasses.replace(photo, identity=identity), "pixels"), "sorted", folder, run=run)

    def _tell(self, line: dict[str, Any]) -> None:
        os.write(self._report, json.dumps(line).encode() + b"\n")


def main() -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    for line in sys.stdin:
        receive, report = os.pipe()
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.close(receive)
                code = Interrupted(json.loads(line), report).run()
            except BaseException as error:
                sys.excepthook(type(error), error, error.__traceback__)
            finally:
                os._exit(code)
        os.close(report)
        with open(receive) as file:
            told = [json.loads(each) for each in file]
        _, status = os.waitpid(child, 0)
        reply = {
            "code": os.waitstatus_to_exitcode(status),
            "effects": [each["effect"] for each in told if "effect" in each],
            "judged": [each["judged"] for each in told if "judged" in each],
            "moments": next((each["moments"] for each in told if "moments" in each), None),
        }
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
