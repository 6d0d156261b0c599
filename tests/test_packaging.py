"""The package declares what it imports, ships what it holds, and names nobody's machine."""

import ast
import configparser
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mtllm_jax

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mtllm_jax"


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def normal(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(lines: str) -> dict[str, str]:
    """{normal name: requirement} of a block of setup.cfg, one requirement a line."""
    found = [line.strip() for line in lines.splitlines() if line.strip()]
    return {normal(re.match(r"[\w.-]+", line).group()): line for line in found}


def imported_modules(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: there is no list of tracked files")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_every_import_is_declared():
    base = requirements(setup_cfg()["options"]["install_requires"])
    # Exported stacks are shipped with the files in torch_code, which run in PyTorch; quantised.py
    # imports what only frozen weights in int8 ask for, watch.py what flags do, sources.py what the
    # name of a text does.
    extras = {
        name: requirements(setup_cfg()["options.extras_require"][extra])
        for name, extra in (
            ("torch_code", "torch"),
            ("quantised.py", "int8"),
            ("watch.py", "watch"),
            ("sources.py", "datasets"),
        )
    }
    providers = importlib.metadata.packages_distributions()
    files = [
        path for room in ("mtllm_jax", "launch", "configs") for path in ROOT.glob(room + "/**/*.py")
    ]
    undeclared = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in files
        for module in imported_modules(path) - sys.stdlib_module_names - {"mtllm_jax"}
        for declared in [base | extras.get(path.parent.name, extras.get(path.name, {}))]
        if not {normal(name) for name in providers.get(module, [module])} & declared.keys()
    }
    assert not undeclared


def test_extras_build_on_the_jax_that_is_installed_without_them():
    """jax[tpu] of another release than the base's would quietly replace the tested pair."""
    config = setup_cfg()
    lines = config["options"]["install_requires"].splitlines()
    base = {line.strip() for line in lines if line.strip().startswith("jax==")}
    for extra in ("tpu", "cuda", "plan"):
        lines = config["options.extras_require"][extra].strip().splitlines()
        assert {re.sub(r"\[\w+\]", "", line) for line in lines} == base


def test_every_folder_with_code_is_a_package():
    """setuptools leaves out a folder without __init__.py, in an ordinary install alone."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_scripts_and_recipes_are_files_and_not_packages():
    assert not [*ROOT.glob("configs/**/__init__.py"), *ROOT.glob("launch/**/__init__.py")]
    assert setup_cfg()["options.packages.find"]["include"] == "mtllm_jax*"


def test_version_is_the_installed_one():
    try:
        installed = importlib.metadata.version("mtllm_jax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mtllm_jax runs from its folder and is not installed")
    assert mtllm_jax.__version__ == installed


def test_importing_the_package_does_not_start_jax():
    code = "import sys, mtllm_jax; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_file_names_a_place_on_one_machine():
    places = re.compile(r"(?<![\w.*}~-])/(?:work|root|tmp|home)/")
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a picture, not text
        found += [
            f"{path.relative_to(ROOT)}:{i}"
            for i, line in enumerate(lines, 1)
            if places.search(line)
        ]
    assert not found
