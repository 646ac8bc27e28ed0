"""Commands that the documents show do what they say: every curl line and every Python block, cut out of the text itself."""

import ast
import json
import os
import re
import shutil
import subprocess

import pytest

from conftest import ROOT

DOCUMENTS = sorted(path for path in ROOT.glob("*.md"))
NODE = "127.0.0.1:8080"


def blocks(language):
    """Fenced blocks of one language in all documents; "" is a block that names none."""
    fence = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for path in DOCUMENTS:
        for found in fence.finditer(path.read_text()):
            if found[1] == language:
                yield path.name, found[2]


def curl_commands():
    """Each with what continues it behind a backslash."""
    command = re.compile(r"^(?:\$ )?(curl (?:[^\n]*\\\n)*[^\n]*)$", re.MULTILINE)
    for language in ("", "bash", "sh", "shell", "console"):
        for document, block in blocks(language):
            for found in command.finditer(block):
                yield pytest.param(found[1], id=f"{document}: {found[1].split()[1]}")


def test_no_document_shows_a_curl_line_outside_of_what_is_run_here():
    shown = sum(len(re.findall(r"^\s*(?:\$ )?curl ", path.read_text(), re.MULTILINE)) for path in DOCUMENTS)
    assert shown == len(list(curl_commands())) > 0
    assert shutil.which("curl"), "curl is missing; hint: apt-get install curl"


@pytest.mark.parametrize("command", list(curl_commands()))
def test_a_curl_line_works_as_printed(node, keys, tmp_path, command):
    assert NODE in command, "the line asks the node of the shipped cluster.toml"
    # Tells status and headers without a word added to the line.
    told = f'silent\nshow-error\nwrite-out = "\\n%{{http_code}}"\ndump-header = "{tmp_path / "head"}"\n'
    (tmp_path / ".curlrc").write_text(told)
    done = subprocess.run(
        ["bash", "-c", command.replace(NODE, f"127.0.0.1:{node.http}")],
        env={**os.environ, "CURL_HOME": str(tmp_path), "KEY": keys["brightcart"]},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answer, status = done.stdout.rsplit("\n", 1)
    assert status == "200", answer
    answer = json.loads(answer)
    assert answer["object"] == "chat.completion"
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"].strip()
    assert choice["finish_reason"] in ("stop", "length")
    assert answer["usage"]["completion_tokens"] > 0
    assert "x-tenantry-adapter: brightcart-support-smollm2-v1.0.0" in (tmp_path / "head").read_text()


@pytest.mark.parametrize("block", [pytest.param(block, id=name) for name, block in blocks("python")])
def test_a_python_block_works_as_printed(node, keys, block):
    assert NODE in block
    *before, last = ast.parse(block.replace(NODE, f"127.0.0.1:{node.http}")).body
    names = {"KEY": keys["brightcart"]}
    exec(compile(ast.Module(before, []), "block", "exec"), names)
    answer = eval(compile(ast.Expression(last.value), "block", "eval"), names)
    assert answer.choices[0].message.content.strip()
