"""Do here what Binder and Colab would do with this repository, in fresh environments.

    python binder/simulate.py [NN ...]     Binder: install, build, run notebooks (01 and 02)
    python binder/simulate.py colab        Colab: would an installation change its torch or NumPy?

On Binder, memory is limited. repo2docker takes its configuration from ``binder/`` alone where
there is such a folder. Of what it knows, this folder may hold ``runtime.txt``, ``requirements.txt``
and ``postBuild``; each other name would change the build.
"""

import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BINDER = ROOT / "binder"
# https://repo2docker.readthedocs.io/en/latest/configuration/
KNOWN = {
    "environment.yml", "environment.yaml", "Pipfile", "Pipfile.lock", "requirements.txt",
    "setup.py", "pyproject.toml", "Project.toml", "REQUIRE", "install.R", "DESCRIPTION", "apt.txt",
    "postBuild", "start", "runtime.txt", "default.nix", "Dockerfile",
}  # fmt: skip
EXPECTED = {"runtime.txt", "requirements.txt", "postBuild"}
MEMORY = 2 << 30
# What a hosted notebook brings along, in versions that are older than ours.
HOSTED = {"numpy": "2.0.2", "torch": "2.9.0+cu126", "torchvision": "0.24.0+cu126"}


def check_files() -> list[str]:
    """What in the folder repo2docker would read in another way than we mean it."""
    problems = []
    found = {path.name for path in BINDER.iterdir()} & KNOWN
    if found != EXPECTED:
        problems.append(
            f"binder/ configures by {sorted(found)}, expected {sorted(EXPECTED)} and no more"
        )
    runtime = (BINDER / "runtime.txt").read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"python-3\.\d+", runtime):
        problems.append(f"runtime.txt says {runtime!r}, expected as python-3.11")
    post = BINDER / "postBuild"
    if not post.stat().st_mode & stat.S_IXUSR:
        problems.append("postBuild cannot be executed; chmod +x binder/postBuild")
    if not post.read_text(encoding="utf-8").startswith("#!"):
        problems.append("postBuild has no #! line")
    return problems


def main(names: list[str]) -> int:
    """Check, install, build, run; the exit status is 1 if it would not work there."""
    if names == ["colab"]:
        with tempfile.TemporaryDirectory() as folder:
            return simulate_colab(Path(folder))
    problems = check_files()
    wanted = (BINDER / "runtime.txt").read_text(encoding="utf-8").strip().removeprefix("python-")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != wanted:
        problems.append(f"this is Python {here}; call this with python{wanted}, as on Binder")
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        return simulate_binder(Path(folder), names)


def simulate_colab(folder: Path) -> int:
    """Ask pip what the bootstrap's installation would do beside packages that are there already."""
    venv.create(folder / "venv", with_pip=False)
    packages = next((folder / "venv" / "lib").glob("python*/site-packages"))
    for name, version in HOSTED.items():
        info = packages / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text("")
    report = folder / "report.json"
    python = str(folder / "venv" / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q"]
    subprocess.run([*pip, "--dry-run", "--report", str(report), "-e", str(ROOT)], check=True)
    planned = json.loads(report.read_text(encoding="utf-8"))["install"]
    names = {item["metadata"]["name"].lower() for item in planned}
    changed = sorted(names & HOSTED.keys()) + sorted(n for n in names if n.startswith("nvidia"))
    print(
        f"{len(names)} packages to install; of what is there it would change: {changed or 'none'}"
    )
    return 1 if changed else 0


def simulate_binder(folder: Path, names: list[str]) -> int:
    home, copy = folder / "home", folder / "repository"
    home.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for name in filter(None, files):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    venv.create(folder / "venv", with_pip=True)
    binaries = folder / "venv" / "bin"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NEUROLIB", "PYTHON"))}
    environment |= {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"NEUROLIB_CACHE": str(home / "cache"), "OMP_WAIT_POLICY": "PASSIVE"}

    def run(name: str, *command: str | Path, limit: int = 0) -> None:
        def confine() -> None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

        started = time.monotonic()
        subprocess.run(
            command, cwd=copy, env=environment, check=True, preexec_fn=confine if limit else None
        )
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)

    run("installed", binaries / "pip", "install", "-q", "-r", "binder/requirements.txt")
    run("postBuild", copy / "binder" / "postBuild")
    for name in names or ["01", "02"]:
        notebook = next((copy / "notebooks").glob(f"{name}_*.ipynb"))
        command = [binaries / "papermill", "--no-progress-bar", "--cwd", notebook.parent]
        run(notebook.stem, *command, notebook, folder / "out.ipynb", limit=MEMORY)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"  largest process so far: {peak:.2f} GiB; limit {MEMORY / 2**30:.0f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
