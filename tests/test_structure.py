"""The file itself: what it imports, how it is laid out, how long its functions are."""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "chatgpt_apiserver.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
BANNER = re.compile(r"^# ==== (\d+)\. (.+) ====$", re.MULTILINE)


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    doc = ast.get_docstring(function) is not None
    return (function.end_lineno or 0) - function.lineno + 1 - ((first.end_lineno or 0) - first.lineno + 1 if doc else 0)


def test_only_the_standard_library() -> None:
    """Nothing outside the standard library is imported, not even optionally."""
    names = {alias.name for node in ast.walk(TREE) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= set(sys.stdlib_module_names)


def test_sections_are_those_of_the_docstring() -> None:
    """The banners stand in order and are the map that the docstring shows."""
    banners = BANNER.findall(SOURCE)
    assert banners == re.findall(r"^    (\d+)\. (.+)$", ast.get_docstring(TREE, clean=False) or "", re.MULTILINE)
    assert [int(number) for number, _ in banners] == list(range(1, len(banners) + 1))


def test_a_section_uses_only_those_above_it() -> None:
    """No function or class names something that a later section defines."""
    starts = [SOURCE[: match.start()].count("\n") + 1 for match in BANNER.finditer(SOURCE)]

    def section(line: int) -> int:
        return sum(start <= line for start in starts)

    defined: dict[str, int] = {}
    for node in TREE.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        for name in [getattr(node, "name", ""), *names]:
            defined.setdefault(name, node.lineno)
    uses = [node for node in ast.walk(TREE) if isinstance(node, ast.Name) and node.id in defined]
    late = [f"{node.id}@{node.lineno}" for node in uses if section(node.lineno) < section(defined[node.id])]
    assert not late


def test_functions_are_short_and_annotated() -> None:
    """Nine of ten have at most 35 lines, none more than 60; every argument and result has a type."""
    lengths = sorted(code_lines(function) for function in FUNCTIONS)
    assert lengths[int(0.9 * len(lengths))] <= 35 and lengths[-1] <= 60
    for function in FUNCTIONS:
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        arguments += [argument for argument in (function.args.vararg, function.args.kwarg) if argument]
        assert function.returns is not None, function.name
        assert all(argument.annotation for argument in arguments if argument.arg not in ("self", "cls")), function.name


def test_lines_and_old_parsers() -> None:
    """No line is over 120 columns, and Python 3.6 can parse the file far enough to refuse politely."""
    assert not [line for line in SOURCE.splitlines() if len(line) > 120]
    ast.parse(SOURCE, feature_version=(3, 6))


def test_version_is_the_newest_change() -> None:
    """`__version__` and the README's newest entry agree."""
    version = re.search(r'^__version__ = "(.+)"$', SOURCE, re.MULTILINE)
    newest = re.search(r"^## Changes\n+### (\S+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert version and newest and version.group(1) == newest.group(1)


def test_tests_say_what_they_show() -> None:
    """Every test has a docstring, and none waits for real time."""
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("sleep") and node.args:
                assert ast.unparse(node.args[0]) == "0", f"{path.name}:{node.lineno}"


def test_the_top_level_is_as_small_as_promised() -> None:
    """The top level has one module, its README, configurations, tests and a Dockerfile; a wheel was once committed there."""
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - {"__pycache__"}
    assert names == {"chatgpt_apiserver.py", "README.md", "config", "tests", "Dockerfile"}


PRIVATE = re.compile(r"asyncio\.[a-z_.]*\._|\bloop\._|\b_asyncio\b|\bsslproto\b")
UNPLAIN = re.compile(r"\b(who|whoever|whom|nobody|somebody)\b", re.IGNORECASE)


def test_no_private_names_of_asyncio() -> None:
    """Only what asyncio documents is used, so that a new Python version breaks nothing."""
    lines = [f"{number}: {line.strip()}" for number, line in enumerate(SOURCE.splitlines(), 1) if PRIVATE.search(line)]
    assert not lines


def test_plain_english() -> None:
    """Comments, docstrings and messages name the client, the controller or the caller."""
    kinds = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
    tokens = tokenize.generate_tokens(io.StringIO(SOURCE).readline)
    lines = [
        f"{token.start[0]}: {match.group()}"
        for token in tokens
        if token.type in kinds
        for match in UNPLAIN.finditer(token.string)
    ]
    assert not lines


def test_size() -> None:
    """The file does not grow: the ceiling goes down with each shortening."""
    assert SOURCE.count("\n") <= 9780 and len(SOURCE.encode()) <= 505_000
