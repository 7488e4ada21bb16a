"""What holds for the repository as a whole: arrows, surfaces, documents, size."""

import ast
import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from hotneuron.cli import app

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "hotneuron": {
        "model_store", "predictor", "prosparse", "runtime", "server", "training_predictors",
    },
    "model_store": set(),
    "predictor": set(),
    "prosparse": {"model_store", "predictor"},
    "runtime": {"model_store", "predictor"},
    "server": {"model_store", "runtime"},
    "training_predictors": {"model_store", "predictor", "runtime"},
}  # fmt: skip
SURFACE = {
    "hotneuron": set(),
    "model_store": {
        "DEFAULT_MODEL", "DownloadError", "ModelNotFound", "ModelStoreError", "cache_root",
        "resolve_model",
    },
    "predictor": {
        "ActivationProfile", "MlpPredictor", "Predictor", "PredictorCorrupted",
        "PredictorMismatch", "PredictorSet", "RecallMeter", "fingerprint", "load_predictors",
        "save_predictors",
    },
    "runtime": {
        "Engine", "EngineConfig", "ModelConfig", "Request", "SamplingParams", "TokenEvent",
    },
    "server": {"Gateway", "ServerConfig", "create_app", "load_tokenizer", "read_default_sampling"},
}  # fmt: skip
NOT_PACKAGES = ("benchmarks", "docker", "docs", "tests")
MAX_LINES = 350
MIB = 1 << 20
MAX_TREE_BYTES = 48 * MIB
MAX_ADAPTER_BYTES = 30 * MIB
MAX_SPARSITY_BYTES = 8 * MIB


def modules() -> Iterator[tuple[str, Path]]:
    """(package, file) of every module of ours."""
    for package in MAY_IMPORT:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield package, path


def imported_packages(path: Path) -> set[str]:
    """The top-level packages that a file imports absolutely."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_imports_follow_the_arrows() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for package, path in modules()
        for name in sorted(imported_packages(path) & set(MAY_IMPORT))
        if name != package and name not in MAY_IMPORT[package]
    ]
    assert wrong == []


def test_every_module_says_its_job_and_stays_small() -> None:
    for _, path in modules():
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
        assert text.count("\n") <= MAX_LINES, f"{path} has more than {MAX_LINES} lines"


@pytest.mark.parametrize("name", SURFACE)
def test_surfaces_are_as_agreed(name: str) -> None:
    package = importlib.import_module(name)
    assert set(package.__all__) == SURFACE[name]
    for exported in package.__all__:
        assert getattr(package, exported) is not None


def test_only_packages_have_an_init() -> None:
    for name in MAY_IMPORT:
        assert (ROOT / name / "__init__.py").is_file()
    assert [name for name in NOT_PACKAGES if list((ROOT / name).rglob("__init__.py"))] == []


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_the_tree_stays_small() -> None:
    sizes = {path: path.stat().st_size for path in tracked_files()}
    store = ROOT / "model_store" / "default"

    def total(folder: Path) -> int:
        return sum(size for path, size in sizes.items() if path.is_relative_to(folder))

    assert total(ROOT) <= MAX_TREE_BYTES
    assert total(store / "adapter") <= MAX_ADAPTER_BYTES
    assert total(store / "sparsity") <= MAX_SPARSITY_BYTES


# --- documents ------------------------------------------------------------------------------------


def commands() -> dict[str, Any]:
    """'serve', 'prosparse train', ... -> the command."""

    def walk(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from walk(command, f"{prefix}{name} ")
            else:
                yield prefix + name, command

    return dict(walk(typer.main.get_command(app), ""))


def options_of(command: Any) -> set[str]:
    return {word for param in command.params for word in (*param.opts, *param.secondary_opts)}


def test_every_command_is_documented() -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for name in commands():
        assert f"`hotneuron {name}" in text, f"docs/commands.md lacks `hotneuron {name}`"
    assert "`train-predictors MODEL`" in text


def test_every_command_and_option_says_what_it_does() -> None:
    for name, command in commands().items():
        assert command.help, f"hotneuron {name} has no help"
    for param in commands()["serve"].params:
        assert param.help, f"serve's {param.name} has no help"
        assert param.envvar == f"HOTNEURON_{param.name.upper()}"


def test_every_setting_of_serve_is_documented() -> None:
    rows = re.findall(
        r"^\| (`--.+?) \| `(\w+)` \|",
        (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    documented = {
        flag: variable for flags, variable in rows for flag in re.findall("--[a-z-]+", flags)
    }
    settings = {
        flag: param.envvar
        for param in commands()["serve"].params
        for flag in (*param.opts, *param.secondary_opts)
        if flag.startswith("--")
    }
    assert documented == settings


def shell_lines(document: Path) -> Iterator[list[str]]:
    """The words of each command in the document's bash blocks."""
    text = document.read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


@pytest.mark.parametrize("document", ["README.md", "benchmarks/README.md"])
def test_documented_command_lines_exist(document: str) -> None:
    from training_predictors.__main__ import build_parser

    ours = commands()
    count = 0
    for words in shell_lines(ROOT / document):
        if words[0].endswith("python"):
            assert (ROOT / words[1]).is_file()
            count += 1
        elif words[0] == "train-predictors":
            build_parser().parse_args(words[1:])
            count += 1
        elif Path(words[0]).name == "hotneuron":
            depth = 3 if " ".join(words[1:3]) in ours else 2
            name = " ".join(words[1:depth])
            assert name in ours, f"{document}: no command `hotneuron {name}`"
            flags = {word.split("=")[0] for word in words[depth:] if word.startswith("-")}
            assert flags <= options_of(ours[name]), f"{document}: {' '.join(words)}"
            count += 1
    assert count > 0


def test_every_route_is_documented() -> None:
    from server import dashboard, info_routes, routes

    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(/[\w./{}-]*)`", text))
    for router in (dashboard.router, info_routes.router, routes.router):
        for route in router.routes:
            path = route.path.replace(":path", "")
            assert path in documented, f"docs/commands.md lacks {path}"


def test_readme_links_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_readme_names_every_folder() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Folders")[2]
    for folder in (*MAY_IMPORT, *NOT_PACKAGES, "kernels"):
        assert f"{folder}/" in tree
