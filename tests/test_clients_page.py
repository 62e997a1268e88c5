"""docs/clients.md: its programs run as they stand there, against a server of this process."""

import re

import pytest

pytest.importorskip("llguidance", reason="NO llguidance (the extra test has it): clients are not tested")
pytest.importorskip("starlette", reason="NO starlette (the extra test has it): clients are not tested")
pytest.importorskip("uvicorn", reason="NO uvicorn (the extra test has it): clients are not tested")

from src.data.rwkv_template import RwkvTemplate

from .conftest import ROOT
from .serving import scripted

TEXT = (ROOT / "docs/clients.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^## (\S+)\n+```python\n(.*?)```", TEXT, re.S | re.M))
PACKAGES = {
    "openai": "openai",
    "openai-agents": "agents",
    "langchain": "langchain_openai",
    "pydantic-ai": "pydantic_ai",
    "instructor": "instructor",
    "llama-index": "llama_index.llms.openai_like",
    "llm": "llm",
    "anthropic": "anthropic",
}


def test_every_recipe_has_at_most_ten_lines():
    assert BLOCKS.keys() == PACKAGES.keys()
    blocks = re.findall(r"```\w+\n(.*?)```", TEXT, re.S)
    assert all(len([line for line in block.splitlines() if line]) <= 10 for block in blocks)


@pytest.mark.parametrize("client", PACKAGES)
def test_a_recipe_runs(client, capsys):
    pytest.importorskip(PACKAGES[client], reason=f"NO {client}: its recipe is not tested")
    script = '{"name": "Soup", "price": 4}'
    with scripted(script, RwkvTemplate("rwkv", "json")) as server:
        code = BLOCKS[client].replace("http://127.0.0.1:8000", server.url).replace("merged", "tiny")
        assert code.count(server.url) == 1 and code.count("tiny") == 1
        exec(compile(code, client, "exec"), {})
    said = capsys.readouterr().out.strip()
    assert said in (script, "name='Soup' price=4")
