"""What a user imports and what a user installs: the lazy public names, and the wheel built from the tree."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import duo_mlx

ROOT = Path(__file__).parent.parent
PACKAGES = {"duo_mlx": "duo_mlx", "convert": "duo_mlx/convert", "bench": "duo_mlx/bench"}  # in the tree -> in the wheel
HEAVY = {"click", "huggingface_hub", "mlx", "mlx_lm", "numpy", "rich", "sentencepiece", "torch", "transformers"}
EMBEDDED_LIMIT = 12_000_000  # bytes


def modules_after(code: str) -> set[str]:
    """The top-level modules that a process has imported after ``code``."""
    code += "\nimport json, sys; print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_import_is_light():
    assert not modules_after("import duo_mlx; duo_mlx.__version__, duo_mlx.DuoError, dir(duo_mlx)") & HEAVY


def test_a_conversion_imports_what_its_source_needs(saved, tmp_path):
    arguments = [str(saved()[0]), str(tmp_path / "model")]
    loaded = modules_after(f"from duo_mlx.cli import main\nmain(['convert', *{arguments}], standalone_mode=False)")
    assert "mlx_lm" in loaded and not loaded & {"google", "matplotlib"}
    assert (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize("name", duo_mlx.__all__)
def test_every_public_name_is_there(name):
    assert getattr(duo_mlx, name).__name__ == name if name != "__version__" else duo_mlx.__version__
    assert name in dir(duo_mlx)


def test_type_checkers_see_the_names_that_run():
    tree = ast.parse((ROOT / "duo_mlx/__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    assert imported == {name: f"duo_mlx.{home}" for home, names in duo_mlx._HOMES.items() for name in names}
    assert {*imported, "__version__"} == set(duo_mlx.__all__)
    for name, home in imported.items():
        assert getattr(duo_mlx, name) is getattr(import_module(home), name)


def test_no_public_name_is_also_a_submodule():
    """Importing a submodule sets it as an attribute of the package, over any function of that name."""
    assert not set(duo_mlx.__all__) & {path.stem for path in (ROOT / "duo_mlx").iterdir()}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'duo_mlx' has no attribute 'genrate'"):
        duo_mlx.genrate  # noqa: B018
    with pytest.raises(ImportError, match="genrate"):
        from duo_mlx import genrate  # noqa: F401


def build(kind: str, tree: Path, target: Path) -> Path:
    """Build a ``wheel`` or ``sdist`` as pip does, with the setuptools that is installed."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    target.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", code, target], cwd=tree, capture_output=True, text=True, check=True)
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the tree; nothing that earlier builds left."""
    copy = tmp_path_factory.mktemp("package") / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy)
    for name in (*PACKAGES, "tests", "examples", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree) -> Path:
    return build("wheel", tree, tree.parent / "wheel")


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    """A directory into which the wheel, and nothing else, is installed."""
    target = wheel.parent / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", target, wheel]
    subprocess.run(command, check=True)
    return target


def names_in(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def run_installed(installed: Path, code: str) -> str:
    """What ``code`` prints in a process that finds the installed package before the tree."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=installed, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_wheel_holds_the_package_and_nothing_else(tree, wheel):
    expected = {
        f"{PACKAGES[name]}/{file.relative_to(tree / name).as_posix()}"
        for name in PACKAGES
        for file in (tree / name).rglob("*")
        if file.is_file()
    }
    names = names_in(wheel)
    info = f"duo_mlx-{duo_mlx.__version__}.dist-info"
    assert {name for name in names if not name.startswith(info)} == expected
    assert {name.partition("/")[0] for name in names} == {"duo_mlx", info}
    assert {"duo_mlx/convert/__init__.py", "duo_mlx/bench/__init__.py", "duo_mlx/py.typed"} <= names


def test_the_embedded_model_is_in_the_wheel_and_small(wheel):
    files = {file.filename: file.file_size for file in zipfile.ZipFile(wheel).infolist()}
    embedded = {name: size for name, size in files.items() if name.startswith("duo_mlx/embedded/")}
    assert {"duo_mlx/embedded/config.json", "duo_mlx/embedded/model.safetensors"} <= embedded.keys()
    assert sum(embedded.values()) <= EMBEDDED_LIMIT


def test_the_sdist_builds_the_same_wheel(tree, wheel):
    with tarfile.open(build("sdist", tree, tree.parent / "sdist")) as archive:
        archive.extractall(tree.parent / "unpacked", filter="data")
    (unpacked,) = (tree.parent / "unpacked").iterdir()
    assert names_in(build("wheel", unpacked, tree.parent / "again")) == names_in(wheel)


def test_the_installed_package_runs(installed):
    assert {path.name for path in installed.iterdir()} <= {"duo_mlx", "bin", f"duo_mlx-{duo_mlx.__version__}.dist-info"}
    code = (
        "import duo_mlx, duo_mlx.bench, duo_mlx.cli, duo_mlx.convert, sys\n"
        "print(*(module.__file__ for name, module in sys.modules.items() if name.startswith('duo_mlx')), sep='\\n')"
    )
    files = run_installed(installed, code).splitlines()
    assert len(files) > 4
    assert all(Path(file).is_relative_to(installed) for file in files)


def test_the_installed_metadata(installed):
    code = (
        "from importlib.metadata import metadata, version, entry_points\n"
        "print(version('duo-mlx'), metadata('duo-mlx')['License-Expression'],"
        " *(e.value for e in entry_points(group='console_scripts', name='duo-mlx')))"
    )
    assert run_installed(installed, code).split()[:3] == [duo_mlx.__version__, "Apache-2.0", "duo_mlx.cli:main"]


def test_the_installed_package_speaks(installed):
    code = (
        "import duo_mlx, duo_mlx.checkpoint\n"
        "print(duo_mlx.checkpoint.EMBEDDED)\n"
        "print(duo_mlx.generate(*duo_mlx.load(), 'It is a truth', max_tokens=4))"
    )
    where, _, text = run_installed(installed, code).partition("\n")
    assert Path(where).is_relative_to(installed)
    assert text.strip()
