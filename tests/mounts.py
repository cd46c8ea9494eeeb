"""File systems that people have, mounted for a test where this machine can.

`mounted(name, base)` yields an empty, writable folder on one of `ALL`, and skips the test, with the reason, where a
program, the right to mount, or the kernel's driver is missing.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

_IMAGE_BYTES = 400 << 20
_SFTP_SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/lib/ssh/sftp-server")


class CannotMountError(Exception):
    """This file system cannot be mounted here."""


def _run(*command: str | Path, text: str = "") -> None:
    program = str(command[0])
    if shutil.which(program) is None:
        raise CannotMountError(f"{program} is not installed")
    done = subprocess.run(
        [str(part) for part in command], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        raise CannotMountError(f"{program}: {(done.stderr or done.stdout).strip()[-300:]}")


def unmount(at: Path) -> None:
    """Unmount a folder, whatever kind of mount it is."""
    commands: tuple[list[str | Path], ...] = (["umount", at], ["fusermount3", "-u", at], ["umount", "-l", at])
    for command in commands:
        if shutil.which(str(command[0])) and not subprocess.run(command, capture_output=True, check=False).returncode:
            return


def _await_mount(at: Path) -> None:
    deadline = time.monotonic() + 20
    while not os.path.ismount(at):
        if time.monotonic() > deadline:
            raise CannotMountError(f"{at} was not mounted within 20 s")
        time.sleep(0.05)


@contextlib.contextmanager
def _image(base: Path, make: Sequence[str], mount: Sequence[str] = ("mount",)) -> Iterator[Path]:
    """A file system in a file, behind a loop device."""
    image, at = base / "image", base / "at"
    at.mkdir()
    with open(image, "wb") as file:
        file.truncate(_IMAGE_BYTES)
    found = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=False)
    if found.returncode:
        raise CannotMountError(f"losetup: {found.stderr.strip()}")
    device = found.stdout.strip()
    try:
        _run(*make, device)
        _run(*mount, device, at)
        try:
            yield at
        finally:
            unmount(at)
    finally:
        subprocess.run(["losetup", "--detach", device], capture_output=True, check=False)


@contextlib.contextmanager
def _layered(base: Path, *command: str, folders: Sequence[str] = (), text: str = "") -> Iterator[Path]:
    """A file system in user space over folders of `base`: `{base}` and `{at}` in the command stand for the paths."""
    at = base / "at"
    at.mkdir()
    for folder in folders:
        (base / folder).mkdir()
    _run(*(part.format(base=base, at=at) for part in command), text=text)
    _await_mount(at)
    try:
        yield at
    finally:
        unmount(at)


@contextlib.contextmanager
def _tmpfs(base: Path) -> Iterator[Path]:
    at = base / "at"
    at.mkdir()
    _run("mount", "-t", "tmpfs", "none", at)
    try:
        yield at
    finally:
        unmount(at)


@contextlib.contextmanager
def _overlay(base: Path) -> Iterator[Path]:
    inner = base / "inner"
    inner.mkdir()
    with _tmpfs(inner) as disk, contextlib.ExitStack() as stack:
        for folder in ("lower", "upper", "work"):
            (disk / folder).mkdir()
        at = base / "at"
        at.mkdir()
        options = f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work"
        _run("mount", "-t", "overlay", "none", "-o", options, at)
        stack.callback(unmount, at)
        yield at


@contextlib.contextmanager
def _sshfs(base: Path, *, delay_seconds: float = 0.0, bytes_per_second: int = 0) -> Iterator[Path]:
    """A remote folder, whose server is started without a network in between."""
    server = next(filter(os.path.exists, _SFTP_SERVERS), None)
    if server is None:
        raise CannotMountError("OpenSSH's sftp-server is not installed")
    program = base / "ssh"
    slowed = f"{sys.executable} {Path(__file__).with_name('delayed.py')} {delay_seconds} {bytes_per_second} {server}"
    program.write_text(f"#!/bin/sh\nexec {slowed if delay_seconds or bytes_per_second else server}\n")
    program.chmod(0o755)
    with _layered(
        base, "sshfs", "-o", f"ssh_command={program}", "host:{base}/remote", "{at}", folders=["remote"]
    ) as at:
        yield at


@contextlib.contextmanager
def _rclone(base: Path, cache: str) -> Iterator[Path]:
    if shutil.which("rclone") is None:
        raise CannotMountError("rclone is not installed")
    at = base / "at"
    at.mkdir()
    (base / "remote").mkdir()
    options = ["--config", "/dev/null", "--cache-dir", str(base / "cache"), "--vfs-cache-mode", cache]
    process = subprocess.Popen(["rclone", "mount", *options, str(base / "remote"), str(at)], stderr=subprocess.DEVNULL)
    try:
        _await_mount(at)
        yield at
    finally:
        unmount(at)
        try:
            process.wait(20)  # it uploads what it has cached
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _gocryptfs(base: Path) -> Iterator[Path]:
    (base / "cipher").mkdir()
    password = ("-q", "-extpass", "echo x")
    _run("gocryptfs", *password, "-init", "-scryptn", "10", base / "cipher")
    with _layered(base, "gocryptfs", *password, "{base}/cipher", "{at}") as at:
        yield at


_OVER = "lowerdir={base}/l,upperdir={base}/u,workdir={base}/w"
_MOUNTS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Path]]] = {
    "ext4": lambda base: _image(base, ["mkfs.ext4", "-q"]),
    "ext2": lambda base: _image(base, ["mkfs.ext2", "-q"]),
    "xfs": lambda base: _image(base, ["mkfs.xfs", "-q"]),
    "btrfs": lambda base: _image(base, ["mkfs.btrfs", "-q"]),
    "tmpfs": _tmpfs,
    "overlayfs": _overlay,
    "ntfs-3g": lambda base: _image(base, ["mkfs.ntfs", "-q", "-f"], ["ntfs-3g"]),
    "bindfs": lambda base: _layered(base, "bindfs", "{base}/a", "{at}", folders="a"),
    "disorderfs": lambda base: _layered(base, "disorderfs", "-q", "--multi-user=no", "{base}/a", "{at}", folders="a"),
    "fuse-overlayfs": lambda base: _layered(base, "fuse-overlayfs", "-o", _OVER, "{at}", folders="luw"),
    "gocryptfs": _gocryptfs,
    "encfs": lambda base: _layered(
        base, "encfs", "--standard", "--stdinpass", "{base}/a", "{at}", folders="a", text="x\n"
    ),
    "sshfs": _sshfs,
    "sshfs-20ms": lambda base: _sshfs(base, delay_seconds=0.02),
    "sshfs-1mb": lambda base: _sshfs(base, bytes_per_second=1_000_000),
    "mergerfs": lambda base: _layered(base, "mergerfs", "{base}/a:{base}/b", "{at}", folders="ab"),
    "unionfs-fuse": lambda base: _layered(base, "unionfs-fuse", "{base}/a=RW", "{at}", folders="a"),
    "rclone": lambda base: _rclone(base, "off"),
    "rclone-writes": lambda base: _rclone(base, "writes"),
    "rclone-full": lambda base: _rclone(base, "full"),
    "exfat-fuse": lambda base: _image(base, ["mkfs.exfat"], ["mount.exfat-fuse"]),
    "vfat": lambda base: _image(base, ["mkfs.vfat", "-F", "32"], ["mount", "-t", "vfat"]),
    "fusefat": lambda base: _image(base, ["mkfs.vfat", "-F", "32"], ["fusefat", "-o", "rw+"]),
}
ALL = tuple(_MOUNTS)
"""Their names."""


@contextlib.contextmanager
def mounted(name: str, base: Path) -> Iterator[Path]:
    """An empty folder on a file system, until the end of the block; where it cannot be mounted, the test is skipped.

    Args:
        name: one of `ALL`.
        base: an empty folder on a local disk.
    """
    with contextlib.ExitStack() as stack:
        try:
            at = stack.enter_context(_MOUNTS[name](base))
        except CannotMountError as error:
            pytest.skip(f"cannot mount {name}: {error}")
        yield at
