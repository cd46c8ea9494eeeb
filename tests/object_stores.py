"""Object stores that run on this machine for the tests: OpenStack Swift, moto, localbucket, rclone.

Each is processes of its own on free ports of 127.0.0.1, which end with the `with` block.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Server:
    """An S3 server, and what a process needs in its environment to use it."""

    endpoint: str
    user: str = "test:tester"
    secret: str = "testtest"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.user,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def through(self, endpoint: str) -> "Server":
        """The same server behind another address."""
        return Server(endpoint, self.user, self.secret)

    @cached_property
    def client(self) -> Any:
        """A plain client, with which the tests look at the server past the sorter's code."""
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.user,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"mode": "standard", "total_max_attempts": 5}),
        )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def process(command: list[str | Path], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process group of its own, which ends with the block, or with the tests if these are killed."""
    with log.open("ab") as file:
        running = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *map(str, command)],
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        yield running
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def wait_for(port: int, running: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    """Until something answers HTTP on a port."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            assert running.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


@contextmanager
def moto(folder: Path, *, strict: bool) -> Iterator[Server]:
    """moto's S3; strict means that its CopyObject keeps the conditions of Amazon's."""
    port, log = free_port(), folder / "moto.log"
    arguments = [str(port), "strict"] if strict else [str(port)]
    with process([sys.executable, HERE / "strict_moto.py", *arguments], log) as running:
        wait_for(port, running, log)
        yield Server(f"http://127.0.0.1:{port}")


@contextmanager
def localbucket(folder: Path) -> Iterator[Server]:
    port, log = free_port(), folder / "localbucket.log"
    (folder / "buckets").mkdir()
    program = Path(sys.executable).with_name("localbucket")
    with process([program, "--port", str(port), folder / "buckets"], log) as running:
        wait_for(port, running, log)
        yield Server(f"http://127.0.0.1:{port}")


def rclone_with_s3() -> str | None:
    """The program, where there is one that serves S3: Debian's does not."""
    for program in (str(Path(sys.executable).with_name("rclone")), shutil.which("rclone")):
        if program and Path(program).exists():
            help_text = subprocess.run([program, "serve", "s3", "--help"], capture_output=True, text=True, check=False)
            if "--auth-key" in help_text.stdout:
                return program
    return None


@contextmanager
def rclone(program: str, folder: Path) -> Iterator[Server]:
    """A folder of this machine behind `rclone serve s3`."""
    port, log = free_port(), folder / "rclone.log"
    (folder / "buckets").mkdir()
    server = Server(f"http://127.0.0.1:{port}", "tester")
    flags = ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{server.user},{server.secret}", "--config", os.devnull]
    with process([program, "serve", "s3", *flags, folder / "buckets"], log) as running:
        wait_for(port, running, log)
        yield server


SWIFT_STORAGE = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
devices = {folder}/devices
mount_check = false
disable_fallocate = true
swift_dir = {folder}
log_level = WARNING
log_address = {folder}/no-log

[pipeline:main]
pipeline = {kind}-server

[app:{kind}-server]
use = egg:swift#{kind}
"""
SWIFT_PROXY = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
swift_dir = {folder}
log_level = WARNING
log_address = {folder}/no-log

[pipeline:main]
pipeline = catch_errors gatekeeper proxy-logging cache listing_formats bulk s3api tempauth copy slo dlo {versions}

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true

[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testtest .admin

[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_object_versioning = true
allow_versioned_writes = true

[filter:proxy-logging2]
use = egg:swift#proxy_logging
"""
SWIFT_FILTERS = {"cache": "memcache", "proxy-logging": "proxy_logging"} | {
    name: name
    for name in ("catch_errors", "gatekeeper", "listing_formats", "bulk", "s3api", "copy", "slo", "dlo", "symlink")
}


@contextmanager
def swift(folder: Path) -> Iterator[Server]:
    """OpenStack Swift: a proxy, and one server each for accounts, containers and objects, one replica on one disk."""
    ports = {kind: free_port() for kind in ("account", "container", "object", "proxy")}
    (folder / "devices" / "sda").mkdir(parents=True)
    (folder / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_suffix = a\nswift_hash_path_prefix = b\n"
        "[storage-policy:0]\nname = gold\ndefault = yes\n"
    )
    for kind in ("account", "container", "object"):
        text = SWIFT_STORAGE.format(folder=folder, port=ports[kind], kind=kind)
        (folder / f"{kind}-server.conf").write_text(text)
    proxy = SWIFT_PROXY.format(
        folder=folder, port=ports["proxy"], versions="versioned_writes symlink proxy-logging2 proxy-server"
    )
    for name, egg in SWIFT_FILTERS.items():
        proxy += f"\n[filter:{name}]\nuse = egg:swift#{egg}\n"
    (folder / "proxy-server.conf").write_text(proxy)
    launcher, log = HERE / "swift_server.py", folder / "swift.log"
    subprocess.run(
        [sys.executable, str(launcher), str(folder), "rings", json.dumps(ports)], check=True, capture_output=True
    )
    with ExitStack() as stack:
        for kind in ports:
            running = stack.enter_context(process([sys.executable, launcher, folder, kind], log))
        wait_for(ports["proxy"], running, log)
        yield Server(f"http://127.0.0.1:{ports['proxy']}")
