#!/usr/bin/env python3
"""make.py [FOLDER] renders every conversation of cases.json with every template there as transformers does, and writes
goldens.json.

Needs jinja2 3.1 alone: the environment below is the one that `apply_chat_template` of transformers 5.19 makes (sandboxed,
`trim_blocks`, `lstrip_blocks`, `break` and `continue`, blocks of `generation`, `raise_exception`, `strftime_now`, and
Python's own `json.dumps` behind `tojson`). A date is written as its format between ⟦ and ⟧: the test puts the date in.
"""

import json
import pathlib
import sys

from jinja2 import TemplateError
from jinja2 import ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

FOLDER = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent


class Raised(TemplateError):
    pass


class Generation(ext.Extension):
    """`{% generation %}` marks what an assistant wrote, and renders as if it were not there."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("inside"), [], [], body).set_lineno(line)

    def inside(self, caller):
        return caller()


def raise_exception(message):
    raise Raised(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda how: f"⟦{how}⟧"
    return made


def rendered(template, case):
    given = {
        "messages": case["messages"],
        "tools": case.get("tools"),
        "add_generation_prompt": case.get("add_generation_prompt", True),
        "bos_token": "<s>",
        "eos_token": "</s>",
        **case.get("extra", {}),
    }
    try:
        return {"text": template.render(**given)}
    except Raised as refusal:
        return {"raised": str(refusal)}
    except (TemplateError, TypeError) as error:
        return {"failed": str(error)}


def main():
    cases = json.loads((FOLDER / "cases.json").read_text())
    goldens = {}
    for path in sorted(FOLDER.glob("*.jinja")):
        template = environment().from_string(path.read_text())
        goldens[path.name] = {name: rendered(template, case) for name, case in cases.items()}
    (FOLDER / "goldens.json").write_text(json.dumps(goldens, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
