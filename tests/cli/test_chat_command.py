"""Chat messages in a real file, by the commands: collected, damaged, repaired, trained on."""

import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from mpcache.store.reader import open_store
from mpcli.mpcache import app as mpcache
from mpcli.mptrain import app as mptrain
from tests.helpers.chat_templates import TEMPLATES
from tests.helpers.models import save_tiny


def write_chats(path: Path, count: int = 60) -> Path:
    """Conversations in the form of ShareGPT, whose messages are `from` and `value`."""
    random = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(count):
            names = ("human", "gpt") * int(random.integers(1, 3))
            texts = ("x" * int(random.integers(3, 30)) for _ in names)
            turns = [{"from": n, "value": t} for n, t in zip(names, texts, strict=True)]
            file.write(json.dumps({"conversations": turns}) + "\n")
    return path


def run(app: object, *arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])  # type: ignore[arg-type]
    assert done.exit_code == 0, done.output
    return done.stdout


def test_chats_from_a_file(tmp_path: Path) -> None:
    model, chats = save_tiny(tmp_path / "model"), write_chats(tmp_path / "chats.jsonl")
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATES["chatml"])
    store = tmp_path / "store"
    collect = [
        "collect", model, chats, store, "--text-column", "conversations",
        "--chat-template", template, "--one-document-per-sequence",
        "--hookpoints", "layers.1.mlp", "--rows", 1200, "--ctx-len", 32, "--part-rows", 192,
        "--chunk-rows", 32, "--model-dtype", "float32", "--device", "cpu",
    ]  # fmt: skip
    run(mpcache, *collect)
    assert "the model did not run" in run(mpcache, *collect)
    assert "chat template" in run(mpcache, "info", store)

    tokens = store / "arrays.zarr/tokens/c/0/0"
    before = tokens.read_bytes()
    tokens.write_bytes(before[:9] + bytes([before[9] ^ 1]) + before[10:])
    assert CliRunner().invoke(mpcache, ["verify", str(store)]).exit_code == 1
    template.unlink()  # its text is in the store
    run(mpcache, "repair", store, "--device", "cpu")
    assert tokens.read_bytes() == before

    out = run(
        mptrain, "fit", store, "--run", tmp_path / "run", "--hookpoints", "layers.1.mlp",
        "--only-tokens", "assistant", "--k", 3, "--expansion", 2, "--rows", 640,
        "--batch-rows", 64, "--arch", "topk", "--device", "cpu", "--json",
    )  # fmt: skip
    (result,) = json.loads(out)
    opened = open_store(store)
    parts = opened.parts([("layers.1.mlp", "output")], "validation")
    written = sum(int(opened.tokens.read_assistant(part.number).sum()) for part in parts)  # type: ignore[union-attr]
    assert result["validation"]["rows"] == written
    assert 0 < written < sum(part.rows for part in parts)
