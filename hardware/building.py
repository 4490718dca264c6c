"""C sources of a folder as one shared library, built once per machine and version and kept in the user's cache.

A build is named by a digest of everything that it depends on: the sources, the compiler and its flags, the processor. It
lies in `$XDG_CACHE_HOME/spikegate` (`~/.cache/spikegate` where that is not set), or, where nothing can be written there, in
a folder of the user's own under the folder for temporary files. A file is written beside its place and renamed, so that
several processes at once find a whole one or none; a lock lets one of them build while the others wait.

What is loaded runs with the user's rights. So a folder counts only if it is the user's own and nobody else may write into
it, and a file only if the digest of its bytes, which it ends with, is right: a cut or damaged one is built anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on this system: then several processes may build at once, and the last one's file stays
    fcntl = None  # type: ignore[assignment]

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-fwrapv", "-fPIC", "-shared", "-pthread")
NATIVE = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ())
"""For this processor; compilers that do not know the first ones get the next ones."""
BUILD_S = 300
DIGEST_BYTES = 32


class BuildError(RuntimeError):
    """No library: no compiler, one that fails, or nowhere to put what it makes."""


@dataclass(frozen=True)
class Library:
    """A folder of C sources that becomes one library."""

    sources: Path
    name: str
    """Of the file in the cache."""
    what: str
    """What it is called in messages, such as "the simulator's loops"."""

    def files(self) -> list[Path]:
        """The C files, in the order of their names."""
        return sorted(self.sources.glob("*.c"))

    def load(self) -> ctypes.CDLL:
        """The library out of the cache, built first where it is not there.

        Raises:
            BuildError: why there is none.
        """
        compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
        if compiler is None:
            raise BuildError(f"no C compiler is installed ({', '.join(COMPILERS)})")
        name = f"{self.name}-{_key(compiler, self.sources)}.so"
        folder = cache_folder()
        if folder is None:
            with tempfile.TemporaryDirectory(prefix="spikegate-", ignore_cleanup_errors=True) as private:
                return self._built(compiler, Path(private), name)  # stays mapped after its file is gone
        path = folder / name
        found = _opened(path)
        if found is None:
            with _alone(folder / "lock"):
                found = _opened(path) or self._built(compiler, folder, name)
        return found

    def load_or_warn(self, without: str) -> ctypes.CDLL | None:
        """The library, or None where it cannot be had, with a warning that says why and what comes of it."""
        try:
            return self.load()
        except BuildError as error:
            warnings.warn(f"{error}; {without}", stacklevel=3)
            return None

    def _built(self, compiler: str, folder: Path, name: str) -> ctypes.CDLL:
        """Build into `folder` and load. Raises BuildError."""
        handle, made = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
        os.close(handle)
        try:
            _compile(compiler, self.files(), made, self.what)
            with open(made, "r+b") as file:
                digest = hashlib.sha256(file.read()).digest()
                file.write(digest)  # what follows the sections of a library is nothing to its loader
            os.chmod(made, 0o700)
            os.replace(made, folder / name)
        except OSError as error:
            raise BuildError(f"{self.what} in C could not be built in {folder} ({error})") from error
        finally:
            Path(made).unlink(missing_ok=True)
        found = _opened(folder / name)
        if found is None:
            raise BuildError(f"what {compiler} made of {self.what} in C cannot be loaded from {folder}")
        return found


def cache_folder() -> Path | None:
    """The first folder that is the user's alone and can be written into, made where it is not there; None: no such."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    bases = []
    if os.path.isabs(home):  # the specification has others ignored
        bases.append(Path(home) / "spikegate")
    else:
        with contextlib.suppress(RuntimeError):  # no home
            bases.append(Path.home() / ".cache" / "spikegate")
    with contextlib.suppress(OSError):
        bases.append(Path(tempfile.gettempdir()) / f"spikegate-{os.getuid()}")
    for folder in bases:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if is_ours(folder) and os.access(folder, os.W_OK | os.X_OK):
                return folder
    return None


def is_ours(path: Path) -> bool:
    """Whether a folder or file, itself and no link to one, is this user's and nobody else may write into it."""
    found = path.lstat()
    kind = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
    return kind and found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _key(compiler: str, sources: Path) -> str:
    """Digest of what a build depends on."""
    real = Path(compiler).resolve()
    about = real.stat()
    parts = [f"{real} {about.st_size} {about.st_mtime_ns}", repr((FLAGS, NATIVE)), *platform.uname()[4:5], _processor()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in sorted(sources.glob("*.[ch]")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """What the processor can do, where the system says it."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0].splitlines()
        return "\n".join(line for line in lines if line.split("\t")[0] in ("model name", "flags", "Features", "CPU part"))
    return platform.processor()


def _opened(path: Path) -> ctypes.CDLL | None:
    """The library of a whole file of ours, else None."""
    try:
        if not is_ours(path):
            return None
        held = path.read_bytes()
        if hashlib.sha256(held[:-DIGEST_BYTES]).digest() != held[-DIGEST_BYTES:]:
            return None
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _compile(compiler: str, sources: Sequence[Path], made: str, what: str) -> None:
    said = ""
    for native in NATIVE:
        command = [compiler, *FLAGS, *native, *map(str, sources), "-o", made, "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=BUILD_S)
        except subprocess.SubprocessError as error:
            raise BuildError(f"the C compiler {compiler} did not finish: {error}") from error
        if done.returncode == 0:
            return
        said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
    raise BuildError(f"the C compiler {compiler} fails on {what} ({said[:200]})")


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context(open(lock, "w"))
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
