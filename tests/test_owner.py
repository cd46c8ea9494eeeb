"""The photos' owner works in the inbox while it is sorted, and the sorter is killed now and then: nothing is lost.

A Hypothesis state machine on real files, with the real mover, history and recovery in processes that are really killed.
"""

import contextlib
import itertools
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

sys.path.insert(0, str(Path(__file__).parent / "torture"))
import owner
from owner import Effect, Owner

NAMES = ("a.jpg", "b.jpg", "deep/a.jpg", "deep/b.jpg")
TRAP = {"a.jpg": "c: outside", "b.jpg": "d: outside"}

CHANGES = ("append", "delete", "chmod", "link", "fifo")

names = st.sampled_from(NAMES)
folders = st.sampled_from(("cats", "dogs"))


class Machine(RuleBasedStateMachine):
    """What the owner had is where he put it or where it was sorted to, once; what he overwrote or deleted need not be.

    Attributes:
        driver: the process that forks the runs.
        parents: where inboxes and outputs are made.
        figures: what was done so far, over all examples.
    """

    driver: ClassVar[subprocess.Popen[str]]
    parents: ClassVar[tuple[Path, Path]]
    figures: ClassVar[Counter[str]]

    @initialize(across=st.booleans(), link=st.booleans())
    def begin(self, across: bool, link: bool) -> None:
        self.figures["examples"] += 1
        self.across, self.link = across, link
        # The output is in memory in either case: there the history is synced fast.
        parents = (self.parents[across], self.parents[0])
        self.folders = [Path(tempfile.mkdtemp(prefix="sorter-owner-", dir=parent)) for parent in parents]
        self.inbox, self.output, self.outside = self.folders[0] / "in", self.folders[1] / "out", self.folders[0] / "own"
        (self.outside / "trap").mkdir(parents=True)
        for name, content in TRAP.items():
            (self.outside / "trap" / name).write_text(content)
        (self.inbox / "deep").mkdir(parents=True)
        self.owner = Owner(self.inbox, self.output, self.outside)
        self.numbers = itertools.count(10)
        self.there: set[str] = set()  # has to exist
        self.gone: set[str] = set()  # was overwritten or deleted by the owner
        self.twice: set[str] = set()  # had perhaps been copied when the sorter was killed, and its owner moved it then
        self.slipped_in: set[str] = set()  # was put there in the middle of a run that was killed
        self.judged: set[str] = set()
        self.placed: dict[str, str] = {}
        self.is_cut_short = False  # by a kill, and not started again since

    def teardown(self) -> None:
        if not hasattr(self, "folders"):
            return
        try:
            if (self.inbox / "deep").is_symlink():
                self.take(self.owner.act("swap"))
            for _ in range(2):  # what was not the judged file any more the first time
                self.sort([], None)
            self.check_after()
        finally:
            for folder in self.folders:
                shutil.rmtree(folder)

    # --- what happens ----------------------------------------------------------------------------------------------

    def content(self, folder: str) -> str:
        return folder[0] * (8 * next(self.numbers) + next(self.numbers) % 2)

    def take(self, effect: Effect) -> None:
        self.figures["actions"] += bool(effect.made or effect.gone or effect.moved)
        self.there = (self.there | set(effect.made)) - set(effect.gone)
        self.gone |= set(effect.gone)
        self.placed |= effect.placed
        # Between a kill and the next start nobody looks where a photo goes that was copied already.
        if self.is_cut_short and (self.link or self.across):
            self.twice |= set(effect.moved)
        self.twice |= {content + "+" for content in self.twice} & set(effect.made)  # both names of one file

    def sort(self, actions: list[tuple[int, tuple[str, ...]]], kill: int | None) -> None:
        request = {
            **{place: str(getattr(self, place)) for place in ("inbox", "output", "outside")},
            "link": self.link,
            "actions": [[moment, *action] for moment, action in actions],
            "kill": kill,
        }
        assert self.driver.stdin is not None
        assert self.driver.stdout is not None
        self.driver.stdin.write(json.dumps(request) + "\n")
        self.driver.stdin.flush()
        reply: dict[str, Any] = json.loads(self.driver.stdout.readline())
        killed = reply["code"] == -9
        assert killed or reply["code"] in (0, 3), reply
        self.judged |= set(reply["judged"])
        self.is_cut_short = self.is_cut_short or killed
        for each in reply["effects"]:
            effect = Effect(**each)
            self.figures["interruptions"] += bool(effect.made or effect.gone or effect.moved)
            self.take(effect)
            self.slipped_in |= set(effect.made) if killed else set()
        self.is_cut_short = killed
        self.figures["runs"] += 1
        self.figures["kills"] += killed
        self.check_now()

    @rule(name=names, folder=folders)
    def drop(self, name: str, folder: str) -> None:
        self.take(self.owner.act("drop", name, self.content(folder)))

    @rule(data=st.data())
    def act(self, data: st.DataObject) -> None:
        self.take(self.owner.act(*data.draw(self.what_the_owner_does())))

    @rule(data=st.data(), photos=st.lists(st.tuples(names, folders), min_size=1, max_size=3))
    def sort_interrupted(self, data: st.DataObject, photos: list[tuple[str, str]]) -> None:
        self.sort(data.draw(self.interruptions(photos, min_size=1)), None)

    @rule(data=st.data(), photos=st.lists(st.tuples(names, folders), min_size=1, max_size=3))
    def sort_killed(self, data: st.DataObject, photos: list[tuple[str, str]]) -> None:
        actions = data.draw(self.interruptions(photos, min_size=0))
        self.sort(actions, data.draw(self.moments()))

    def interruptions(
        self, photos: list[tuple[str, str]], min_size: int
    ) -> st.SearchStrategy[list[tuple[int, tuple[str, ...]]]]:
        """Photos for the run that follows, and what the owner does in the middle of it."""
        for name, folder in photos:
            self.drop(name, folder)
        return st.lists(st.tuples(self.moments(), self.what_the_owner_does()), min_size=min_size, max_size=3)

    def moments(self) -> st.SearchStrategy[int]:
        inbox = [path for path in self.inbox.rglob("*") if path.is_file()]
        return st.integers(1, 150 + len(inbox) * (200 if self.across else 130))

    def what_the_owner_does(self) -> st.SearchStrategy[tuple[str, ...]]:
        contents = folders.map(self.content)
        there = [name for name in NAMES if (self.inbox / name).is_file()]
        theirs = st.sampled_from(there or NAMES)
        return st.one_of(
            st.tuples(st.just("drop"), theirs, contents),
            st.tuples(st.sampled_from(CHANGES), theirs),
            st.tuples(st.just("rename"), theirs, names),
            st.just(("swap",)),
            st.tuples(st.just("place"), st.sampled_from(("cats/a.jpg", "cats/a-1.jpg", "dogs/b.jpg")), contents),
        )

    # --- what is true ----------------------------------------------------------------------------------------------

    def files(self) -> dict[Path, str]:
        """Every regular file but the sorter's own and the trap's."""
        roots = (self.inbox, self.output, self.outside)
        paths = [path for root in roots for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
        kept = [path for path in paths if ".sorter" not in path.parts and "trap" not in path.parts]
        return {path: path.read_text() for path in kept}

    def check_now(self) -> None:
        """At every instant."""
        found = self.files()
        assert self.there <= set(found.values()), f"lost: {self.there - set(found.values())}, found: {found}"
        visible = {
            content for path, content in found.items() if not path.name.endswith((".sorter-part", ".sorter-away"))
        }
        assert visible <= self.there | self.gone, "something half is under a name that people see"
        assert {path.name: path.read_text() for path in (self.outside / "trap").iterdir()} == TRAP
        assert all((self.output / name).read_text() == content for name, content in self.placed.items())

    def check_after(self) -> None:
        """When everything that was cut short has been finished."""
        found = self.files()
        counts = Counter(found.values())
        hidden = [content for path, content in found.items() if path.name.startswith(".")]
        assert set(hidden) <= self.twice, "something hidden is left"
        assert all(counts[content] == 1 for content in self.there - self.twice), "something is there twice"
        assert all(counts[content] <= 1 for content in self.gone - self.twice), "something is there twice"
        left = [path for path in found if path.is_relative_to(self.inbox) and not path.name.startswith(".")]
        assert not left, "a photo was left behind"
        sorted_ = {
            str(path.relative_to(self.output)): content
            for path, content in found.items()
            if path.is_relative_to(self.output)
        }
        for name in self.placed:
            del sorted_[name]
        with contextlib.closing(sqlite3.connect(self.output / ".sorter/history.sqlite3")) as history:
            rows = history.execute("SELECT folder, name, done FROM moves").fetchall()
        assert all(done is not None for _, _, done in rows), "an intent for ever"
        told = [f"{folder}/{os.fsdecode(name)}" for folder, name, _ in rows]
        assert len(set(told)) == len(told)
        assert set(told) <= set(sorted_), "the history tells something else"
        # What its owner overwrote between two kills, or put in a photo's place in the instant before one, is intact
        # under a name that nothing may be known of.
        untold = {content for name, content in sorted_.items() if name not in told}
        assert untold <= self.gone | self.slipped_in, "a photo is missing from the history"
        for name in told:
            content = sorted_[name]
            assert content in self.judged, f"{name} was never judged"
            assert content[0] == name[0], f"{name} went to the other's folder"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[type[Machine]]:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm on a file system of its own")
    command = [sys.executable, str(Path(owner.__file__).with_name("interrupted.py"))]
    with (
        (tmp_path / "errors").open("wb") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as driver,
    ):
        Machine.driver, Machine.parents, Machine.figures = driver, (memory, tmp_path), Counter()
        yield Machine
        assert driver.stdin is not None
        driver.stdin.close()


def prove(machine: type[Machine], examples: int, steps: int) -> Counter[str]:
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),  # shrinking takes minutes, with processes
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)
    return machine.figures


@pytest.mark.parametrize("examples", [12, pytest.param(60, marks=pytest.mark.long)])
def test_whatever_the_owner_does_meanwhile_nothing_is_lost_or_doubled(machine: type[Machine], examples: int) -> None:
    figures = prove(machine, examples, 12)
    assert min(figures["kills"], figures["interruptions"]) > examples / 3


@pytest.mark.torture
@pytest.mark.timeout(1200)
def test_a_long_time_with_the_owner_loses_and_doubles_nothing(
    machine: type[Machine], proved: Callable[[str], None]
) -> None:
    figures = prove(machine, 400, 20)
    proved(
        f"{figures['examples']:,} simulated owners, {figures['actions']:,} actions and "
        f"{figures['interruptions']:,} more in the middle of a move, {figures['runs']:,} runs, {figures['kills']:,} of "
        "them killed: zero lost, zero twice"
    )
