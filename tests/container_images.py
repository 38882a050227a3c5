"""Images are built and run here without a container engine: by mmdebstrap, buildah, and a chroot."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE = "debian:bookworm-slim"
TOOLS = ("buildah", "mmdebstrap", "unshare", "nsenter", "ip")
# Official slim images have neither manuals nor translations, either.
_SLIM = [
    "--variant=minbase",
    "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
    "--include=usr-is-merged",
    *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "doc", "locale")),
    '--customize-hook=rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*',
]


_ISOLATED = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child")
_CERTIFICATES = "/pip-certificates.pem"


def missing_tools():
    """What keeps this machine from building images."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return missing if os.geteuid() == 0 else ["root", *missing]


class ImageStore:
    """A storage of images of its own, in a folder."""

    def __init__(self, folder):
        self.folder = folder
        self._options = ["--root", str(folder / "root"), "--runroot", str(folder / "run")]

    def buildah(self, *arguments, **options):
        done = subprocess.run(
            ["buildah", *self._options, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            **options,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout.strip()

    def make_base(self):
        tar = self.folder / "base.tar"
        subprocess.run(["mmdebstrap", "--quiet", *_SLIM, "bookworm", str(tar)], check=True)
        container = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", container, tar, "/")
        self.buildah("commit", "--quiet", "--rm", container, BASE)
        tar.unlink()

    def build(self, target):
        """Build a target of the Dockerfile; its only source is the base, and pip's index as it is set up here."""
        settings, volumes = _pip_settings()
        secret = self.folder / "pip.conf"
        secret.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
        self.buildah(
            *("bud", "--isolation", "chroot", "--pull-never", "--format", "docker"),
            *("--file", "deploy/Dockerfile", "--target", target, "--tag", f"glm4-deploy:{target}"),
            *("--secret", f"id=pip.conf,src={secret}"),
            *(f"--volume={source}:{place}:ro" for source, place in volumes.items()),
            ".",
            cwd=ROOT,
        )

    def size(self, target):
        """Bytes of an image, as engines list them."""
        (found,) = json.loads(self.buildah("images", "--json", f"glm4-deploy:{target}"))
        units = {"KB": 1e3, "MB": 1e6, "GB": 1e9}
        number, unit = found["size"].split()
        return float(number) * units[unit]

    def settings(self, target):
        """What the image says about itself: user, command, environment, health check."""
        found = json.loads(self.buildah("inspect", "--type", "image", f"glm4-deploy:{target}"))
        return found["Docker"]["config"]

    @contextlib.contextmanager
    def root_of(self, target):
        """The folder with an image's files."""
        container = self.buildah("from", "--pull-never", f"glm4-deploy:{target}")
        try:
            yield Path(self.buildah("mount", container))
        finally:
            self.buildah("umount", container)
            self.buildah("rm", container)

    def remove(self):
        self.buildah("rmi", "--all", "--force")
        shutil.rmtree(self.folder)


def _pip_settings():
    """pip's settings on this machine, and the paths that they name: source -> place in the container."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    settings, volumes = {}, {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        key, value = name.rpartition(".")[2], value.strip("'")
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                # an index in a folder has its files beside it; Debian writes certificates of its own where ours are
                source = path.parent if word.startswith("file://") else path
                volumes[source] = _CERTIFICATES if key == "cert" else source
                value = value.replace(word, _CERTIFICATES) if key == "cert" else value
        settings[key] = value
    return settings, volumes


class Running:
    """A container: read-only root, the image's user and command, no network but its own loopback."""

    def __init__(self, root, settings, arguments=None, environment=(), mounts=(), writable=()):
        """
        Args:
            arguments: in place of those of the image.
            mounts: pairs of a folder here and its place in the container, read-only.
            writable: as ``mounts``, for folders that the container may write.
        """
        self._user = settings["User"]
        given = [*settings["Env"], *environment]
        command = [*settings["Entrypoint"], *(settings["Cmd"] if arguments is None else arguments)]
        self._command = ["env", "-i", *given]
        steps = [
            "ip link set lo up",
            f"mount --bind {root} {root}",
            *(f"mount --bind {source} {root}{place}" for source, place in [*mounts, *writable]),
            *(f"mount -o remount,bind,ro {root}{place}" for _, place in [*mounts, ("", "")]),
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /dev {root}/dev",
            f'exec chroot --userspec={self._user}:{self._user} {root} "$@"',
        ]
        self._process = subprocess.Popen(
            [*_ISOLATED, "sh", "-ec", "; ".join(steps), "sh", *self._command, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def pid(self):
        """The process id of the container's first process, outside of it."""
        end = time.monotonic() + 20
        while not (children := self._children().split()):
            assert self._process.poll() is None, self._process.stdout.read()
            assert time.monotonic() < end, "the container has not begun"
            time.sleep(0.05)
        return int(children[0])

    def _children(self):
        return Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()

    def run(self, *command, text=None):
        """Run a command in the container, as its user."""
        entered = ["nsenter", "--target", str(self.pid), "--mount", "--net", "--pid", "--root", "--wd=/"]
        users = ["--setuid", self._user, "--setgid", self._user]
        return subprocess.run(
            [*entered, *users, *self._command, *command],
            input=text,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def wait_for(self, command, seconds=120):
        """Run a command until it succeeds, as an engine does with a health check."""
        end = time.monotonic() + seconds
        while (done := self.run(*command)).returncode:
            assert self._process.poll() is None, self._process.stdout.read()
            assert time.monotonic() < end, done.stderr
            time.sleep(0.2)

    def stop(self):
        """Ask it to end; returns its exit code and what it wrote."""
        os.kill(self.pid, signal.SIGTERM)
        return self.ended()

    def ended(self, seconds=60):
        """Wait for its end; returns its exit code and what it wrote."""
        try:
            said, _ = self._process.communicate(timeout=seconds)
        finally:
            self._process.kill()
        return self._process.returncode, said
