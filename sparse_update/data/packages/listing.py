"""The fixed list of packages: name, version, architecture, size and sha256 of each, as Debian 12's index has them."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hardware.documents import read_json
from hardware.text import short
from sparse_update.data.records import CorpusError

SHIPPED = Path(__file__).with_name("debian_12.json")
FETCH_S = 900
FORMS = {"name": r"[a-z0-9][a-z0-9+.-]+", "version": r"[0-9][A-Za-z0-9.+:~-]*", "architecture": r"[a-z0-9][a-z0-9-]*"}
"""What Debian's policy (5.6.1, 5.6.12) allows."""


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    architecture: str
    size_bytes: int
    sha256: str

    @property
    def file(self) -> str:
        """The name that `apt-get download` gives it."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


@dataclass(frozen=True)
class Listing:
    """The packages, and the sha256 of the text that they make, training then held out; empty: not yet known."""

    packages: tuple[Package, ...]
    text_sha256: str = ""


def read_listing(path: Path = SHIPPED) -> Listing:
    """Raises `CorpusError` for a list that is no list of packages with exactly the fields of `Package`."""
    try:
        read = read_json(path, CorpusError)
        packages = tuple(Package(**entry) for entry in read["packages"])
        listing = Listing(packages, str(read.get("text_sha256") or ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(f"{path} is no list of packages: {short(str(error))}") from error
    if not packages or any(not isinstance(p.size_bytes, int) or len(str(p.sha256)) != 64 for p in packages):
        raise CorpusError(f"{path}: at least one package, each with size_bytes and a sha256 of 64 digits")
    for package in packages:  # they become arguments of apt-get and names of files: no option, no other folder
        for field, form in FORMS.items():
            if not re.fullmatch(form, str(getattr(package, field))):
                raise CorpusError(f"{path}: {field} {short(getattr(package, field))} is none of a Debian package")
    return listing


def fetch(listing: Listing, folder: Path) -> list[str]:
    """Have `apt-get download` bring what `folder` lacks, by name and version; the names that were brought.

    Raises `CorpusError` where apt-get is not there or does not bring them.
    """
    missing = [package for package in listing.packages if not (folder / package.file).is_file()]
    if not missing:
        return []
    wanted = [f"{package.name}={package.version}" for package in missing]
    by_hand = f"fetch them into {folder} on a Debian 12 machine: apt-get download {' '.join(wanted)}"
    apt = shutil.which("apt-get")
    if apt is None:
        raise CorpusError(f"{len(missing)} packages are not in {folder}, and there is no apt-get here; {by_hand}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run([apt, "download", "-q", *wanted], cwd=folder, capture_output=True, text=True, timeout=FETCH_S)
    except subprocess.TimeoutExpired as error:
        raise CorpusError(f"apt-get download did not end within {FETCH_S} s; {by_hand}") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        raise CorpusError(f"apt-get download: {' '.join(said)[:300]}; is the index there (apt-get update)? Or {by_hand}")
    return [package.name for package in missing]


def check(listing: Listing, folder: Path) -> list[Path]:
    """The packages' files in the order of the list, each of the listed size and sha256. Raises `CorpusError`."""
    paths = []
    for package in listing.packages:
        path = folder / package.file
        if not path.is_file():
            raise CorpusError(f"{path} is missing: apt-get download {package.name}={package.version} brings it")
        if path.stat().st_size != package.size_bytes:
            raise CorpusError(f"{path} has {path.stat().st_size} bytes, listed are {package.size_bytes}; fetch it again")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != package.sha256:
            raise CorpusError(f"{path} has sha256 {found}, listed is {package.sha256}; fetch it again")
        paths.append(path)
    return paths
