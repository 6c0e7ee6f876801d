"""The documents checked against the code: nodes, inputs, examples, links, packaging."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from demo_base.adapters import make_adapter
from qwen_edit_lora import lora_core
from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE
from qwen_edit_lora.lora_core.formats import parsed_key, schemes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
MANUAL = "\n".join([README, *((ROOT / page).read_text(encoding="utf-8") for page in DOCS)])
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", *DOCS)
MAX_README_LINES = 140
INTERNAL_NODES = ("QwenEditLoraHold", "QwenEditLoraSweepCollect")
MAX_HELP_LINES = 80

#: Nodes of ComfyUI itself that a shipped workflow may use.
CORE_NODES = frozenset(
    {
        *("UNETLoader", "CLIPLoader", "VAELoader", "LoadImage", "FluxKontextImageScale"),
        "ImageScaleToTotalPixels",
        *("ModelSamplingAuraFlow", "CFGNorm", "TextEncodeQwenImageEditPlus", "VAEEncode"),
        *("FluxKontextMultiReferenceLatentMethod", "KSampler", "VAEDecode", "SaveImage"),
        *("PreviewImage", "PreviewAny", "MarkdownNote", "ImageCompare"),
        *("TextEncodeQwenImage21", "QwenImage21Cache"),  # since ComfyUI 0.37
    }
)


# --- the nodes, read from their syntax trees so that no ComfyUI is needed -------------------------


class Socket(NamedTuple):
    """An input or output in a node's schema; a number in its id is written as 1."""

    id: str
    direction: str
    has_tooltip: bool


def read_trees() -> dict[str, ast.Module]:
    files = sorted((ROOT / "nodes").glob("**/*.py"))
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in files
    }


TREES = read_trees()
FUNCTIONS = {
    node.name: node
    for tree in TREES.values()
    for node in tree.body
    if isinstance(node, ast.FunctionDef)
}


def read_text(node: ast.expr | None, bound: Mapping[str, str]) -> str | None:
    """The string an expression stands for, where it is a literal, an f-string or a parameter."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(p.value) if isinstance(p, ast.Constant) else "1" for p in node.values)
    return bound.get(node.id) if isinstance(node, ast.Name) else None


def bind(function: ast.FunctionDef, call: ast.Call) -> dict[str, str]:
    """Parameter -> string for a call of a helper; "tooltip" is there if either side gives one."""
    names = [argument.arg for argument in function.args.args]
    defaults = dict(zip(reversed(names), reversed(function.args.defaults), strict=False))
    given = {**defaults, **dict(zip(names, call.args, strict=False))}
    given |= {k.arg: k.value for k in call.keywords if k.arg}
    bound = {name: text for name, node in given.items() if (text := read_text(node, {}))}
    sets_default = any(
        isinstance(node, ast.Call)
        and getattr(node.func, "attr", "") == "setdefault"
        and read_text(node.args[0], {}) == "tooltip"
        for node in ast.walk(function)
    )
    return {**bound, "tooltip": "default"} if sets_default else bound


def list_sockets(
    tree: ast.AST, bound: Mapping[str, str] | None = None, inside: frozenset[str] = frozenset()
) -> Iterator[Socket]:
    """Every Input and Output that `tree` builds, the shared helpers of nodes/ followed."""
    bound = bound or {}
    for node in ast.iter_child_nodes(tree):
        name = ""
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("Input", "Output"):
                forwards = any(k.arg is None for k in node.keywords) and "tooltip" in bound
                has_tooltip = forwards or any(k.arg == "tooltip" for k in node.keywords)
                id_ = read_text(node.args[0], bound)
                assert id_ is not None, f"cannot read the id in {ast.unparse(node)}"
                yield Socket(id_, name, has_tooltip)
            elif isinstance(node.func, ast.Name) and name in FUNCTIONS.keys() - inside:
                helper = FUNCTIONS[name]  # followed once: some call themselves
                yield from list_sockets(helper, bind(helper, node), inside | {name})
            elif name == "TemplatePrefix":
                # The template's own id is replaced by prefix + number.
                prefix = next(read_text(k.value, {}) for k in node.keywords if k.arg == "prefix")
                for inner in list_sockets(ast.Expression(node.args[0])):
                    yield inner._replace(id=f"{prefix}0")
                continue
        yield from list_sockets(node, bound, inside)


def find_nodes() -> dict[str, list[Socket]]:
    """Node id -> its sockets, for each class in nodes/ with a schema."""
    found = {}
    for tree in TREES.values():
        for class_ in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            ids = [
                read_text(keyword.value, {})
                for node in ast.walk(class_)
                if isinstance(node, ast.Call)
                for keyword in node.keywords
                if keyword.arg == "node_id"
            ]
            if ids:
                found[ids[0]] = list(list_sockets(class_))
    return found


NODES = find_nodes()


def test_the_walk_over_the_nodes_finds_all_nodes():
    assert {s.id for s in NODES["QwenEditLoraApply"] if s.direction == "Input"} == {
        *("model", "adapter", "strength", "mode", "image_strength", "text_strength", "blocks")
    }
    assert {s.id for s in NODES["QwenEditLoraStack"] if s.direction == "Input"} == {
        *("model", "mode", "files", "lora_1", "strength_1", "strengths", "adapters", "adapter_0"),
        "switched_off",
    }
    (without,) = list_sockets(ast.parse('io.Float.Input("x")'))
    assert not without.has_tooltip


def test_every_class_among_the_nodes_ends_up_in_the_extension():
    listed = {name for tree in TREES.values() for name in list_registered(tree)}
    assert listed == set(NODES)


def list_registered(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NODES":
            yield from (ast.unparse(item) for item in node.value.elts)


@pytest.mark.parametrize("node_id", NODES)
def test_every_input_has_a_tooltip(node_id):
    sockets = NODES[node_id]
    assert [s.id for s in sockets if s.direction == "Input" and not s.has_tooltip] == []


# --- help pages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("node_id", NODES)
def test_the_help_page_names_every_input_and_output(node_id):
    text = (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    assert [s.id for s in NODES[node_id] if f"`{s.id}`" not in text] == []
    assert len(text.splitlines()) <= MAX_HELP_LINES


def test_every_help_page_belongs_to_a_node():
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == set(NODES)


def list_quotes(page: str) -> list[str]:
    """The messages a page quotes: "..." in the first column of a table, cut at each ellipsis.

    If the first column says what to look at, they are in the second.
    """
    quotes, column = [], 0
    for line in page.splitlines():
        cells = line.split("|")[1:-1]
        if not cells:
            column = 0
        elif cells[0].strip() == "Look at":
            column = 1
        if len(cells) > column:
            quotes += re.findall(r'"([^"]+)"', cells[column])
    pieces = [piece.strip(" ,") for quote in quotes for piece in quote.split("...")]
    return [piece for piece in pieces if len(piece) > 3]


def test_messages_are_found_in_their_column():
    plain = '| You see | Do |\n|---|---|\n| "once ... and two" | "no" |\n'
    looked_at = '| Look at | If | Do |\n|---|---|---|\n| "this" | "three, " | "no" |\n'
    assert list_quotes(f"{plain}\n{looked_at}\n{plain}") == [
        *("once", "and two", "three", "once", "and two")
    ]


def list_strings(tree: ast.AST) -> Iterator[str]:
    """Every string literal of a file, and the text between the braces of its f-strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@cache
def list_messages() -> str:
    """All messages of the nodes and the core; parsing them takes seconds."""
    core = [ast.parse(p.read_text(encoding="utf-8")) for p in ROOT.glob("lora_core/**/*.py")]
    return "\n".join(text for tree in [*TREES.values(), *core] for text in list_strings(tree))


@pytest.mark.parametrize("page", ["README.md", *DOCS, *(f"web/docs/{id}.md" for id in NODES)])
def test_the_messages_a_page_quotes_exist(page):
    said, known_elsewhere = list_messages(), {"lora key not loaded"}  # ComfyUI's console
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [q for q in list_quotes(text) if q not in said and q not in known_elsewhere] == []


# --- README and docs ------------------------------------------------------------------------------


def test_the_readme_is_short_and_links_every_page():
    assert len(README.splitlines()) <= MAX_README_LINES
    first_screen = README.splitlines()[:12]
    assert any(line.startswith("![") for line in first_screen)
    assert [page for page in DOCS if f"]({page}" not in README] == []
    assert [node_id for node_id in NODES if f"`{node_id}`" not in README] == [*INTERNAL_NODES]


def test_the_manual_names_every_node_prefix_and_format():
    expected = [
        *NODES,
        *parsed_key.DOTTED_PREFIXES,
        *parsed_key.UNDERSCORED_PREFIXES,
        *schemes.SCHEMES,
    ]
    assert [name for name in expected if f"`{name}`" not in MANUAL] == []


def test_the_report_in_the_documents_is_the_real_one():
    state_dict, dtype = {}, torch.bfloat16
    for block in range(QWEN_IMAGE.num_blocks):
        for name in lora_core.TARGET_PRESETS["full"]:
            out_features, in_features = QWEN_IMAGE.compute_shape(name)
            stem = f"lora_unet_transformer_blocks_{block}_{name.replace('.', '_')}"
            state_dict[f"{stem}.lora_down.weight"] = torch.empty(16, in_features, dtype=dtype)
            state_dict[f"{stem}.lora_up.weight"] = torch.empty(out_features, 16, dtype=dtype)
            state_dict[f"{stem}.alpha"] = torch.tensor(8.0, dtype=dtype)
    metadata = {"ss_base_model_version": "qwen_image_edit_2511"}
    adapter = lora_core.read_state_dict(state_dict, metadata, "my_edit_lora.safetensors")
    block = f"```text\n{adapter.report.to_text()}\n```"
    assert block in MANUAL
    assert block in (ROOT / "web" / "docs" / "QwenEditLoraLoad.md").read_text(encoding="utf-8")


def test_the_python_example_of_the_manual_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", MANUAL, re.DOTALL)
    module = {next(iter(QWEN_IMAGE.block_linears)): (8, 8)}
    paths = {f"transformer_blocks.0.{name}": shape for name, shape in module.items()}
    make_adapter(tmp_path / "my_edit_lora.safetensors", paths, rank=2, alpha=1.0)
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    # Imported by its folder, lora_core has just that name, as in the manual.
    monkeypatch.setitem(sys.modules, "lora_core", lora_core)
    runpy.run_path("example.py")
    printed = capsys.readouterr().out
    assert "rank 2 alpha 1.0 scale 0.5" in printed
    (total,) = re.findall(r"print\(count_parameters.*# (\d+):", example)
    assert printed.splitlines()[-1] == total
    assert lora_core.read_adapter("converted.safetensors").report.unmatched == ()
    assert lora_core.read_adapter("for_peft").report.alpha_rules == {"adapter_config.json": 1}


def make_anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def list_anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {make_anchor(heading) for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_file_names_resolve(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    lost = []
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / name) if name else ROOT / page
        if not target.exists() or (anchor and anchor not in list_anchors(target)):
            lost.append(link)
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {".comfyui", ".venv"}
    lost += [
        name
        for code in re.findall(r"`([^`\n]+)`", text)
        for name in re.findall(r"[\w.]+(?:/[\w.]+)+", code)
        if name.split("/")[0] in folders and "<" not in name and not (ROOT / name).exists()
    ]
    assert lost == []


def test_every_command_in_the_documents_is_one_of_dev_py():
    tree = ast.parse((ROOT / "dev.py").read_text(encoding="utf-8"))
    known = {
        read_text(node.args[0], {})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_parser"
    }
    used = {
        command
        for page in PAGES
        for command in re.findall(r"dev\.py (\w+)", (ROOT / page).read_text(encoding="utf-8"))
    }
    assert used <= known


# --- packaging -----------------------------------------------------------------------------------


def test_requirements_equal_the_projects_dependencies():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # Python 3.10 has no tomllib
    (listed,) = re.findall(r"^dependencies = (\[.*?\])", text, re.MULTILINE | re.DOTALL)
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and line[0] != "#"] == ast.literal_eval(listed)


WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_has_an_image_and_only_known_nodes(name):
    workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    assert {node["type"] for node in workflow["nodes"]} - CORE_NODES - set(NODES) == set()
    picture = ROOT / "workflows" / f"{name}.jpg"
    assert picture.read_bytes().startswith(b"\xff\xd8\xff")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_first_note_of_a_workflow_explains_it_in_three_sentences(name):
    workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    notes = [n["widgets_values"][0] for n in workflow["nodes"] if n["type"] == "MarkdownNote"]
    heading, _, text = notes[0].partition("\n")
    assert heading.startswith("## ")
    plain = re.sub(r"\*\*\d\.\*\*|[*\"]", "", text)
    assert len(re.findall(r"[.?!](?=\s|$)", plain)) == 3


def test_every_workflow_is_in_the_changelog_and_every_image_has_one():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [name for name in WORKFLOWS if f"`{name}`" not in changelog] == []
    assert sorted(path.stem for path in (ROOT / "workflows").glob("*.jpg")) == WORKFLOWS


# --- what must not be published ------------------------------------------------------------------

# Assembled here, so that this file does not contain what it searches for.
MACHINE_FOLDERS = ("work", "root", "tmp", "home", "Users")
REGISTRIES = ("pypi", "pythonhosted", "npmjs", "anaconda")
FORBIDDEN = re.compile(
    rb"(?<![\w.:)-])/(?:" + "|".join(MACHINE_FOLDERS).encode() + rb")/|"
    rb"\b(?:" + "|".join(REGISTRIES).encode() + rb")\.(?:org|com)\b"
)


def list_repository_files() -> list[Path]:
    """Files that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout")
    paths = (ROOT / name for name in result.stdout.decode().split("\0") if name)
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_machine_or_a_registry():
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in list_repository_files()
        for match in FORBIDDEN.finditer(path.read_bytes())
    ]
    assert found == []


@pytest.mark.parametrize("folder", MACHINE_FOLDERS)
def test_the_search_sees_a_path(folder):
    assert FORBIDDEN.search(f"open('/{folder}/x')".encode())
    assert not FORBIDDEN.search(f"https://example.com/{folder}/x".encode())


@pytest.mark.parametrize("host", REGISTRIES)
def test_the_search_sees_a_registry(host):
    assert FORBIDDEN.search(f"https://{host}.org/simple".encode())
