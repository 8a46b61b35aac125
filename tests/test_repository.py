"""The repository as a whole: its environment files, the Makefile, and the notebooks' form."""

import ast
import graphlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from safetensors import safe_open

import neurolib
from neurolib.course.runs import COURSE
from neurolib.files import SHIPPED

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def lines_of(name):
    """Lines of a requirements file, without comments."""
    lines = (line.strip() for line in read(name).splitlines())
    return [line for line in lines if line and not line.startswith("#")]


# ------------------------------------------------------------------------------ environments

PROJECT = tomllib.loads(read("pyproject.toml"))["project"]
PINS = [Requirement(line) for line in lines_of("constraints.txt")]


def pins(environment=None):
    """Pinned version of each package in an environment (default: this one)."""
    valid = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate(environment)]
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in valid}


def requirements():
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for text in sum(extras, PROJECT["dependencies"])]


def test_dependencies_have_lower_bounds_only():
    for requirement in requirements():
        assert [spec.operator for spec in requirement.specifier] == [">="], requirement


def test_what_people_expect_is_installed_by_default():
    names = {Requirement(text).name for text in PROJECT["dependencies"]}
    expected = {"jupyterlab", "torch", "torchvision", "timm", "tifffile", "matplotlib"}
    assert names >= expected | {"ipywidgets", "papermill", "nbval"}


def test_constraints_are_exact_and_carry_no_local_label():
    for pin in PINS:
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        assert Version(specifier.version).local is None, pin
        assert not pin.name.startswith("nvidia"), pin
    names = [canonicalize_name(pin.name) for pin in PINS]
    assert names == sorted(names)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_every_dependency_is_pinned(python, platform):
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.2",
        "sys_platform": platform,
        "platform_machine": "x86_64" if platform == "linux" else "arm64",
    }
    pinned = pins(environment)
    for requirement in requirements():
        if requirement.marker is None or requirement.marker.evaluate(environment):
            version = pinned[canonicalize_name(requirement.name)]
            assert version in requirement.specifier, requirement
    names = [pin.name for pin in PINS if pin.marker is None or pin.marker.evaluate(environment)]
    assert len(names) == len(set(names))


# Distributions whose module has another name, or that a declared one installs.
MODULES = {
    "IPython": "ipykernel", "PIL": "matplotlib", "mpl_toolkits": "matplotlib",
    "numcodecs": "zarr", "skimage": "scikit-image", "yaml": "pyyaml",
}  # fmt: skip


def imported_modules(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


# The course may import everything, the method itself and the data, and the data only these
# common modules.
GROUND = {"neurolib", "errors", "files", "parameters", "volume", "swc"}


def package_imports():
    """Each module of the package, by its name without "neurolib.", with those that it imports."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "neurolib").rglob("*.py")
    }
    short = {name: name.removeprefix("neurolib.") for name in paths}
    for name, path in paths.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in paths:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                named |= {one if one in paths else node.module for one in names}
        yield short[name], {short[one] for one in named - {name}}


def test_imports_run_from_course_to_method_to_data_and_in_no_circle():
    imports = dict(package_imports())
    assert len(imports) > 30
    for module, named in imports.items():
        if module.startswith("data."):
            assert all(one in GROUND or one.startswith("data.") for one in named), module
        elif not module.startswith("course") and module not in ("neurolib", "__main__"):
            assert not any(one.startswith("course") for one in named), module
    # All import the version from `neurolib`, which imports the method only on demand.
    graph = {module: named - {"neurolib"} for module, named in imports.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("data.formats") < order.index("blocking") < order.index("course.cli")


def test_the_method_stays_small():
    stages = "blocking weights inflation network training inference evaluation tracing"
    texts = [read(f"neurolib/{name}.py") for name in stages.split()]
    assert sum(text.count("\n") for text in texts) <= 4500
    for path in (ROOT / "neurolib").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = text.splitlines()[body[0].lineno - 1 : node.end_lineno] if body else []
                code = [line for line in lines if line.strip() and line.strip()[0] != "#"]
                assert len(code) <= 60, f"{path.name}: {node.name}"


def test_a_data_set_is_imported_without_torch():
    code = "import sys, neurolib.data.datasets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_the_package_imports_is_declared():
    extras = PROJECT["optional-dependencies"]
    texts = PROJECT["dependencies"] + extras["peer"] + extras["cluster"]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    for path in (ROOT / "neurolib").rglob("*.py"):
        for name in imported_modules(path.read_text(encoding="utf-8")):
            name = name.partition(".")[0]
            if name not in sys.stdlib_module_names and name != "neurolib":
                package = canonicalize_name(MODULES.get(name, name))
                assert package in declared, f"{path.name} imports {name}"


def test_conda_environment_takes_the_same_pins():
    environment = yaml.safe_load(read("environment.yml"))
    assert environment["name"] == PROJECT["name"]
    assert environment["channels"][0] == "conda-forge"
    *conda, pip = environment["dependencies"]
    # Whatever conda installed beside Python and pip would escape the pins.
    assert [re.split("[=<>]", name)[0] for name in conda] == ["python", "pip"]
    assert conda[0].partition("=")[2] in PYTHONS
    assert pip == {"pip": ["--constraint constraints.txt", "--editable ."]}


def test_binder_takes_the_same_pins_and_torch_without_cuda():
    required = ["-r torch-cpu.txt", "-c ../constraints.txt", "-e ."]
    assert lines_of("binder/requirements.txt") == required
    (index,) = lines_of("binder/torch-cpu.txt")
    assert index == "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert lines_of("binder/runtime.txt")[0].removeprefix("python-") in PYTHONS
    assert os.access(ROOT / "binder/postBuild", os.X_OK)
    # With an environment.yml beside it, requirements.txt would not be read.
    assert not (ROOT / "binder/environment.yml").exists()


def test_no_other_file_names_a_package_index():
    names = ["pyproject.toml", "constraints.txt", "environment.yml", "Makefile", ".ci/run"]
    for name in [*names, ".github/workflows/ci.yml"]:
        assert not re.search(r"index-url|find-links|https?://\S*(pypi|whl)", read(name)), name


def test_workflow_mirrors_the_ci_script():
    (job,) = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"].values()
    matrix = job["strategy"]["matrix"]
    assert tuple(matrix["python"]) == PYTHONS
    assert [system.partition("-")[0] for system in matrix["os"]] == ["ubuntu", "macos"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "make --no-print-directory test" in read(".ci/run")


def test_citation_and_licence():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == neurolib.__version__
    assert citation["license"] == PROJECT["license"] == "MIT"
    assert read("LICENSE").startswith("MIT License")
    assert "creativecommons.org/licenses/by/4.0" in read("LICENSE-docs")
    assert all("doi" in work or "identifiers" in work for work in citation["references"])


def test_what_a_guest_looks_for_is_there_and_true():
    container = json.loads(read(".devcontainer/devcontainer.json"))
    target = container["postCreateCommand"].split()[1]
    assert target == ".venv/.installed"
    assert "INSTALLED := $(VENV)/.installed" in read("Makefile")
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.md"):
        head = yaml.safe_load(path.read_text(encoding="utf-8").split("---")[1])
        assert {"name", "about"} <= set(head), path
    with safe_open(SHIPPED, "np") as shipped:
        trained = json.loads(shipped.metadata()["facts"])["training"]
    card = read("data/neurite.md")
    assert f"{trained['steps']} steps of {trained['batch']} blocks" in card
    # Marks of a table of measurements.
    assert card.index("<!-- measured -->") < card.index("<!-- /measured -->")
    assert "[Unreleased]" in read("CHANGELOG.md")


# --------------------------------------------------------------------------------- Makefile

# Replaces Python: `-m venv` makes an environment with itself in it, `-m pip` logs its
# arguments and can be interrupted.
STUB = """#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/pip"
             printf '#!/bin/sh\\necho "$*" >> "%s/log"\\n' "$PWD" > "$3/bin/neurolib"
             chmod +x "$3/bin/neurolib"; echo venv >> log ;;
  "-m pip") echo "$*" >> log; test ! -e interrupt ;;
  *) exec PYTHON "$@" ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A folder with the Makefile, its dependencies, and a replacement for Python."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    stub = tmp_path / "stub"
    stub.write_text(STUB.replace("PYTHON", sys.executable))
    stub.chmod(0o755)
    return tmp_path


def make(folder, *arguments):
    """Call make; return its exit status, its output, and the log of the replacement."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command, options = ["make", "PYTHON=./stub", *arguments], {"cwd": folder, "env": clean}
    done = subprocess.run(command, **options, capture_output=True, text=True, check=False)
    said = log.read_text().splitlines() if log.exists() else []
    return done.returncode, done.stdout + done.stderr, said


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


@needs_make
def test_make_course_installs_once_and_runs(clone):
    status, _, said = make(clone, "course", "DATA=my pairs")
    assert status == 0
    install = "-m pip install -c constraints.txt -e .[test]"
    run = "run --data my pairs --profile course --name "
    assert said == ["venv", install, run]
    (said,) = make(clone, "course", "PROFILE=smoke", "NAME=x")[2]
    assert said == "run --data synthetic --profile smoke --name x"
    stamp = (clone / ".venv/.installed").stat().st_mtime
    os.utime(clone / "constraints.txt", (stamp + 10, stamp + 10))
    assert make(clone, ".venv/.installed")[2] == [install]


@needs_make
def test_make_mends_an_interrupted_installation(clone):
    (clone / "interrupt").touch()
    assert make(clone, "course")[0] != 0
    (clone / ".venv/half").touch()
    (clone / "interrupt").unlink()
    status, _, said = make(clone, "course")
    assert status == 0
    assert said[0] == "venv"
    assert not (clone / ".venv/half").exists()
    assert not (clone / ".venv/.incomplete").exists()


@needs_make
def test_make_names_the_python_it_needs(clone):
    old = clone / "old"
    lie = "import sys; sys.version_info = (3, 9, 2)"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{lie}\n$2"\n')
    old.chmod(0o755)
    status, printed, _ = make(clone, "course", "PYTHON=./old")
    assert status != 0
    assert "Python 3.11 or newer is needed" in printed
    assert not (clone / ".venv").exists()


# -------------------------------------------------------------------------------- notebooks


def load(name):
    """Import a module of the tools, whose folder is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


readme = load("readme")
build = load("build")


def test_notebooks_keep_the_rules():
    assert build.check(build.sources()) == []


def test_the_tables_of_the_readme_are_current(monkeypatch, tmp_path):
    assert readme.check(build.sources()) == []
    text = read("README.md")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    for name, digit in (("notebooks", " GB"), ("results", "0.")):
        before, mark, after = text.partition(f"<!-- {name} -->")
        (tmp_path / "README.md").write_text(before + mark + after.replace(digit, "7.", 1))
        assert [name in problem for problem in readme.check(build.sources())] == [True]
    readme.write(build.sources(), executed=False)
    assert readme.check(build.sources()) == []
    with pytest.raises(SystemExit, match="<!-- none -->"):
        readme.fill(text, "none", "")


def test_the_course_has_its_notebooks():
    assert [path.stem for path in build.sources()] == list(COURSE)


TEXT = """# %% [markdown]
# # A title
#
# ```
# # not a title
# ```

# %% tags=["parameters"]
steps = 3  # of what
rate = -1e-4  # per step

# %% tags=["bootstrap"]
import sys

# %%
print(steps)
"""


@pytest.fixture
def course(tmp_path):
    """A folder with two small notebooks that keep the rules, with made-up outputs."""
    for name in ("00_first", "01_second"):
        store(tmp_path / f"{name}.py", TEXT)
    return tmp_path


def store(source, text):
    """Write a text source and its notebook."""
    source.write_text(text)
    notebook = build.convert(source)
    for count, (_, cell) in enumerate(build.code_cells(notebook), 1):
        cell.execution_count = count
    notebook.cells[-1].outputs = [stream("3\n")]
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    return notebook


def stream(text, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


ERROR = nbformat.v4.new_output("error", ename="E", evalue="no", traceback=[])


def shows(output):
    """Gives the last cell of a notebook this output."""
    return lambda notebook: notebook.cells[3].update(outputs=[output])


def problems_of(folder):
    return build.check(build.sources(folder=folder))


def test_a_good_course_has_no_problems(course):
    assert problems_of(course) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# # A title\n", "# A title\n", "titles of level one in cells []"),
        ("# ```\n\n", "# ```\n#\n# # Another\n\n", "titles of level one in cells [0, 0]"),
        ("# # A title\n", "# Some text\n#\n# # A title\n", "at the very top"),
        (' tags=["parameters"]', "", "0 cells tagged parameters"),
        (' tags=["bootstrap"]', ' tags=["parameters"]', "2 cells tagged parameters"),
        (' tags=["bootstrap"]', "", "exactly one cell tagged bootstrap"),
        ("steps = 3", "steps = 3 * 4 + len('x')", "is not 'name = literal'"),
        ("steps = 3", "import os", "cell 1: 'import os' is not 'name = literal'"),
        ("steps = 3", "steps: int = 3", "is not 'name = literal'"),
        ("steps = 3", "steps = ", "cell 1: not Python"),
        ("print(steps)\n", "print(steps)\n" * 16, "cell 3: 16 lines of code, expected 15"),
        ("print(steps)\n", "print(steps)\n" * 6, "median of 6 lines"),
        ("print(steps)", 'open("/home/me/x.tif")', "cell 3: names the absolute path /home/me"),
        ("# not a title", "see C:\\\\data", "cell 0: names the absolute path C:"),
        ("import sys", "import os", "bootstrap cell differs from that of 00_first"),
    ],
)
def test_a_broken_rule_is_reported(course, old, new, message):
    assert old in TEXT
    store(course / "01_second.py", TEXT.replace(old, new))
    (problem, *_) = [p for p in problems_of(course) if message in p]
    assert problem.startswith("01_second, ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda nb: nb.cells[3].update(source="print(4)"), "cell 3: its source differs"),
        (lambda nb: nb.cells[1].metadata.update(tags=[]), "cell 1: its metadata differs"),
        (lambda nb: nb.cells[3].update(id="other"), "cell 3: its id differs"),
        (lambda nb: nb.cells.pop(), "3 cells, its text has 4"),
        (lambda nb: nb.metadata.update(kernelspec={"name": "mine"}), "its metadata differ"),
        (lambda nb: nb.cells[2].update(execution_count=7), "cell 2: execution count 7, expected 2"),
        (lambda nb: nb.cells[3].update(execution_count=None), "execution count None"),
        (shows(ERROR), "cell 3: holds the error E: no"),
        (shows(stream("in /tmp/x/run\n")), "cell 3: prints the absolute path /tmp/x/run"),
        (shows(stream(f"{Path.home()}/x\n")), "cell 3: prints the absolute path"),
        (shows(stream("50%|## | 1/2 [00:01]", "stderr")), "cell 3: holds a bar"),
    ],
)
def test_drift_is_reported(course, change, message):
    path = course / "00_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)
    problems = problems_of(course)
    assert any(p.startswith("00_first, ") and message in p for p in problems), problems


def test_missing_and_orphaned_notebooks_are_reported(course):
    (course / "00_first.ipynb").rename(course / "07_extra.ipynb")
    assert problems_of(course) == [
        "00_first, there is no notebook; run make notebooks",
        "07_extra, has no text source 07_extra.py",
    ]


def test_unknown_names_are_refused(course):
    assert [path.stem for path in build.sources(["01"], course)] == ["01_second"]
    with pytest.raises(SystemExit, match="99: no such source"):
        build.sources(["99"], course)


def test_build_gives_the_same_bytes_twice(course):
    bars = ("tqdm.tqdm", "tqdm.auto.tqdm")
    loop = '\n# %%\nfor i in {}(range(3)):\n    print("a", i, flush=True)\n'
    text = TEXT + "import tqdm.auto\n" + "".join(map(loop.format, bars))
    source = course / "00_first.py"
    source.write_text(text)
    first = build.build(source).read_bytes()
    assert build.build(source).read_bytes() == first
    assert problems_of(course) == []
    for cell in nbformat.reads(first.decode(), as_version=4).cells[-2:]:
        assert [output.text for output in cell.outputs] == ["a 0\na 1\na 2\n"]


def test_build_keeps_the_old_notebook_where_it_fails(course):
    source = course / "00_first.py"
    before = source.with_suffix(".ipynb").read_bytes()
    source.write_text(TEXT.replace("print(steps)", "print(1 / 0)"))
    with pytest.raises(Exception, match="division by zero"):
        build.build(source)
    source.write_text(TEXT.replace("print(steps)", "import os; print(os.getcwd())"))
    with pytest.raises(SystemExit, match="00_first, cell 3: prints the absolute path"):
        build.build(source)
    assert source.with_suffix(".ipynb").read_bytes() == before


def test_build_attaches_the_figure_that_was_drawn(course):
    source = course / "00_first.py"
    figure = '<figure id="tree"><img src="data:image/png;base64,QUJD"></figure>'
    shown = f"from IPython.display import HTML, display; display(HTML('{figure}'))"
    text = TEXT.replace("# # ", "# # ![A tree](attachment:tree.png) ", 1)
    source.write_text(text.replace("print(steps)", shown))
    written = nbformat.read(build.build(source), as_version=4)
    assert written.cells[0].attachments == {"tree.png": {"image/png": "QUJD"}}
    assert problems_of(course) == []


def test_versions_are_written_if_all_notebooks_were_executed(monkeypatch):
    told = []
    monkeypatch.setattr(build, "build", lambda source: None)
    monkeypatch.setattr(build, "store", lambda source, notebook: None)
    monkeypatch.setattr(build.readme, "write", lambda sources, executed: told.append(executed))
    for arguments in (["--text"], ["03"], []):
        build.main(arguments)
    assert told == [False, False, True]


def test_new_text_keeps_the_outputs_and_new_code_is_refused(course):
    source = course / "00_first.py"
    figure = '<figure id="tree"><img alt="a &gt; b" src="data:image/png;base64,{}"></figure>'
    stored = store(source, TEXT)
    data = {"text/html": figure.format("QUJD")}
    stored.cells[-1].outputs = [nbformat.v4.new_output("display_data", data=data)]
    source.write_text(TEXT.replace("# # ", "# # How? ![A tree](attachment:tree.png) ", 1))
    written = nbformat.read(build.store(source, stored), as_version=4)
    assert written.cells[-1].outputs == stored.cells[-1].outputs
    assert written.cells[0].attachments == {"tree.png": {"image/png": "QUJD"}}
    assert problems_of(course) == []
    written.cells[-1].outputs[0].data["text/html"] = figure.format("QUJE")  # an older picture
    nbformat.write(written, source.with_suffix(".ipynb"))
    assert "cell 0: tree.png is not the figure" in problems_of(course)[0]
    source.write_text(TEXT.replace("print(steps)", "print(rate)"))
    with pytest.raises(SystemExit, match="00_first, its code has changed"):
        build.store(source, stored)
    source.write_text(TEXT.replace("# # ", "# # ![None](attachment:none.png) ", 1))
    with pytest.raises(SystemExit, match=r"none\.png is not the figure"):
        build.store(source, stored)


def test_state_that_a_second_run_meets_is_found(course):
    source = course / "00_first.py"
    before = source.with_suffix(".ipynb").read_bytes()
    build.execute_twice(source)
    assert source.with_suffix(".ipynb").read_bytes() == before
    source.write_text(TEXT.replace("print(steps)", "assert 'left' not in globals()\nleft = 1"))
    with pytest.raises(Exception, match="AssertionError"):
        build.execute_twice(source)


def test_embedded_images_are_not_taken_for_paths():
    assert not build.absolute_path('<img src="data:image/png;base64,ab/tmp/cd+/home/x==">')
    assert not build.absolute_path("https://example.org/home/x ../tmp/x ~/.cache/x tip/root")
    assert build.absolute_path('"/Users/me/x y"') == "/Users/me/x"


def test_colabs_cell_may_run_twice(tmp_path):
    """Running it again changes nothing, nor does a restart in any folder."""
    notebook = nbformat.read(ROOT / "notebooks" / "03_training.ipynb", as_version=4)
    cell = next(c.source for c in notebook.cells if "bootstrap" in c.metadata.get("tags", []))
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    clone = "mkdir -p neurite-vit-course/notebooks neurite-vit-course/neurolib"
    git.write_text(f"#!/bin/sh\necho cloned >> {tmp_path}/log\n{clone}\n")
    git.chmod(0o755)
    inside = [tmp_path / "neurite-vit-course" / name for name in ("", "runs/small", "neurolib")]
    beside = tmp_path / "sample_data"
    places = [".", ".", *map(str, (tmp_path, beside, *inside))]
    code = f"""
import os, sys, types
from IPython.core.interactiveshell import InteractiveShell
sys.modules["google.colab"] = types.ModuleType("google.colab")
shell = InteractiveShell.instance()
shell.register_magic_function(lambda line: None, "line", "pip")
for folder in {places!r}:
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    assert shell.run_cell({cell!r}).success
    print("at", os.getcwd())
"""
    path = f"{git.parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "IPYTHONDIR": str(tmp_path / "ipython")}
    call = {"args": [sys.executable, "-c", code], "cwd": tmp_path, "env": environment}
    call |= {"capture_output": True, "text": True}
    done = subprocess.run(**call, check=True)
    places = [line for line in done.stdout.splitlines() if line.startswith("at ")]
    # In neurolib the modules are beside it, and relative paths mean the same.
    assert places[:-1] == [f"at {tmp_path / 'neurite-vit-course' / 'notebooks'}"] * 6
    assert (tmp_path / "log").read_text() == "cloned\n"
    git.write_text("#!/bin/sh\nexit 128\n")  # no network
    failed = subprocess.run(**call | {"cwd": tmp_path.parent}, check=False)
    assert "FileNotFoundError" in failed.stdout + failed.stderr
