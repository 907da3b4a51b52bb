"""Every damaged file of a model: exit code 2, one line with the file's name, and no store.

The table is {kind of damage} x {file}. What is legal is in the table too: weights in another
floating-point dtype are cast.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModel, Gemma2Config, GPTNeoXConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from mpcache.config import CollectConfig
from mpcache.model.load_errors import explain_load_errors
from mpcache.model.model_source import find_source, short_name
from mpcli.mpcache import app
from tests.helpers.gguf_files import write_gguf
from tests.helpers.models import save_tiny, tiny_tokenizer
from tests.helpers.stores import write_corpus

LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064d}\nsize 99\n"
SETTINGS = ("--hookpoints", "layers.0", "--rows", "64", "--ctx-len", "16", "--part-rows", "64")
SETTINGS += ("--chunk-rows", "32", "--model-dtype", "float32", "--device", "cpu")

SHARD, INDEX = "model-00002-of-00002.safetensors", "model.safetensors.index.json"
# the folder that a file is damaged in
KINDS = {
    "model.safetensors": "whole",
    SHARD: "cut",
    INDEX: "cut",
    "config.json": "whole",
    "tokenizer.json": "whole",
    "generation_config.json": "whole",
    "tokenizer_config.json": "whole",
    "pytorch_model.bin": "torch",
    "tiny.gguf": "gguf",
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound models in each form of file, and a corpus."""
    folder = tmp_path_factory.mktemp("originals")
    save_tiny(folder / "whole", layers=2)
    (folder / "whole" / "generation_config.json").write_text('{"max_length": 20}')
    shutil.copytree(folder / "whole", folder / "cut")
    weights = load_file(folder / "whole" / "model.safetensors")
    save_shards(folder / "cut", weights)
    shutil.copytree(folder / "whole", folder / "torch")
    (folder / "torch" / "model.safetensors").unlink()
    torch.save(weights, folder / "torch" / "pytorch_model.bin")
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf" / "tiny.gguf")
    write_corpus(folder / "corpus.jsonl", 12)
    return folder


def save_shards(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[:5], SHARD: names[5:]}
    for shard, inside in shards.items():
        save_file({name: weights[name] for name in inside}, folder / shard, {"format": "pt"})
    index = {name: shard for shard, inside in shards.items() for name in inside}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.fixture
def copy(originals: Path, tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    yield lambda kind: Path(shutil.copytree(originals / kind, tmp_path / kind))
    for path in tmp_path.rglob("*"):  # so that pytest can delete the unreadable file
        if path.is_file() and not path.is_symlink():
            path.chmod(0o600)


def collect(originals: Path, model: Path, *more: str):
    arguments = [str(model), str(originals / "corpus.jsonl"), str(model.parent / "store")]
    return CliRunner().invoke(app, ["collect", *arguments, *SETTINGS, *more])


def refusal(originals: Path, model: Path, *more: str) -> str:
    """The error line of a command that refuses a model and leaves no files."""
    before = sorted(model.parent.rglob("*"))
    result = collect(originals, model, *more)
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    assert sorted(model.parent.rglob("*")) == before
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


# --- the table: kind of damage x file ---


def cut_short(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:12])


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("../blobs/none")


def in_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (cut_short, "cut short|must be JSON"),
    "cut in the header": (cut_header, "cut short|must be JSON"),
    "empty": (lambda path: path.write_bytes(b""), "is empty; download it again"),
    "LFS pointer": (lambda path: path.write_text(LFS), "Git LFS pointer.*git lfs pull"),
    "web page": (lambda path: path.write_text("\n<!DOCTYPE html>\n<html>"), "is a web page"),
    "dangling link": (dangling, "is a link to a missing file, .*none; download"),
    "a folder": (in_a_folder, "must be a file, got a folder"),
}


@pytest.mark.parametrize("file", KINDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file(originals, copy, damage, file):
    folder = copy(KINDS[file])
    change, message = DAMAGES[damage]
    change(folder / file)
    line = refusal(originals, folder / file if file.endswith(".gguf") else folder)
    assert file in line
    assert matches(message, line), line


def matches(pattern: str, line: str) -> bool:
    return re.search(pattern, line) is not None


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all files")
@pytest.mark.parametrize("file", KINDS)
def test_a_file_that_cannot_be_read(originals, copy, file):
    folder = copy(KINDS[file])
    (folder / file).chmod(0)
    line = refusal(originals, folder / file if file.endswith(".gguf") else folder)
    assert matches("must be readable, got no permission", line)
    assert file in line


def edited(path: Path, **changes: object) -> None:
    """Keys of a JSON file; None deletes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def reshaped(path: Path, change: Callable[[torch.Tensor], torch.Tensor], torch_file=False) -> None:
    weights = torch.load(path) if torch_file else load_file(path)
    name = next(name for name in sorted(weights) if name.endswith("layers.1.mlp.up_proj.weight"))
    weights[name] = change(weights[name]).contiguous()
    torch.save(weights, path) if torch_file else save_file(weights, path, {"format": "pt"})


def relabelled(path: Path) -> None:
    """Give the header another dtype than the data has."""
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F16"'))


SHAPES: list[tuple[str, Callable[[Path], object], str]] = [
    ("model.safetensors", lambda p: reshaped(p, lambda x: x[:-1]), r"up_proj.* of shape \[31, 16"),
    (SHARD, lambda p: reshaped(p, lambda x: x[:-1]), r"up_proj.* instead of \[32, 16\]"),
    (
        "pytorch_model.bin",
        lambda p: reshaped(p, lambda x: x.T, True),
        r"of shape \[16, 32\] instead of",
    ),
    (INDEX, lambda p: edited(p, weight_map={"a": "none.safetensors"}), "1 are missing: none.safet"),
    (INDEX, lambda p: edited(p, weight_map={"a": "../x.safetensors"}), "files in its own folder"),
    ("config.json", lambda p: edited(p, intermediate_size=40), r"of shape \[.*use the config.json"),
    ("config.json", lambda p: edited(p, num_hidden_layers=1), "does not use: layers.1"),
    ("config.json", lambda p: edited(p, num_hidden_layers=3), "got none for layers.2"),
    ("config.json", lambda p: edited(p, num_attention_heads=7), "not a multiple"),
    ("config.json", lambda p: edited(p, hidden_size=-4), "cannot be loaded"),
    ("config.json", lambda p: p.write_text("[1]"), "must hold a JSON object, got list"),
    ("tokenizer.json", lambda p: p.write_text("[1]"), "must hold a JSON object, got list"),
    ("tokenizer_config.json", lambda p: p.write_text("[1]"), "must hold a JSON object, got list"),
    ("generation_config.json", lambda p: p.write_text("[1]"), "must hold a JSON object"),
]  # fmt: skip

DTYPES: list[tuple[str, Callable[[Path], object], str]] = [
    ("model.safetensors", lambda p: reshaped(p, lambda x: x.int()), "floating-point.*up_proj.* as"),
    (SHARD, lambda p: reshaped(p, lambda x: x.to(torch.int8)), "floating-point.*up_proj.* as I8"),
    ("model.safetensors", relabelled, "is damaged: its header gives .* F16"),
    ("pytorch_model.bin", lambda p: reshaped(p, lambda x: x.int(), True), "floating-point.* as I3"),
    (INDEX, lambda p: edited(p, weight_map=[1]), "must hold a weight_map"),
    (INDEX, lambda p: edited(p, weight_map={"a": 3}), "must hold a weight_map"),
    ("config.json", lambda p: edited(p, hidden_size="big"), "expected int, got str"),
    ("config.json", lambda p: edited(p, rope_parameters=3), "rope_parameters"),
    ("config.json", lambda p: edited(p, hidden_act="nope"), "cannot be loaded: KeyError: 'nope'"),
    ("config.json", lambda p: edited(p, model_type=None), "must have a model_type, got None"),
    ("config.json", lambda p: edited(p, model_type=3), "must have a model_type, got 3"),
    ("config.json", lambda p: edited(p, model_type="nope"), "'nope', which transformers 5"),
    ("config.json", lambda p: edited(p, quantization_config="x"), "object as its quantization_c"),
    ("tokenizer.json", lambda p: edited(p, model=3), "holds no tokenizer, because the field"),
    ("tokenizer.json", lambda p: edited(p, model={"type": "Nope"}), "tokenizer of .* cannot be l"),
    ("tokenizer.json", lambda p: p.write_text("{}"), "holds no tokenizer, because the field"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "change", "message"),
    SHAPES + DTYPES,
    ids=[f"{name}-{number}" for number, (name, *_) in enumerate(SHAPES + DTYPES)],
)
def test_another_shape_or_type(originals, copy, file, change, message):
    folder = copy(KINDS[file])
    change(folder / file)
    line = refusal(originals, folder)
    assert matches(message, line), line
    assert folder.name in line


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_another_floating_point_dtype_is_cast(originals, copy, file, dtype):
    folder = copy(KINDS[file])
    reshaped(folder / file, lambda x: x.to(dtype), file.endswith(".bin"))
    result = collect(originals, folder)
    assert result.exit_code == 0, result.output


# --- what is missing, or something else ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / "config.json").unlink(),
            "must hold config.json, got .*give the folder with the model",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "must have weights, got neither"),
        (
            lambda f: (f / "tokenizer.json").unlink(),
            "holds text, but .* has no tokenizer; put its",
        ),
        (
            lambda f: [(f / f"tokenizer{end}").unlink() for end in (".json", "_config.json")],
            "has no tokenizer; put its tokenizer.json into",
        ),
        (
            lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"),
            "got only the SentencePiece file tokenizer.model; ",
        ),
        (
            lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}'),
            r"is an adapter \(LoRA\) for a/b.*merge_and_unload",
        ),
        (
            lambda f: edited(f / "config.json", auto_map={"AutoModel": "m.M"}, model_type="own"),
            "its own Python code.*--trust-remote-code",
        ),
        *(
            (
                lambda f, q=quantised: edited(f / "config.json", quantization_config=q),
                f"is quantised by {quantised['quant_method']}.*; run pip install {package}, or "
                "use an unquantised checkpoint",
            )
            for quantised, package in (
                ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptqmodel optimum"),
                ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
                ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
            )
        ),
    ],
)
def test_what_is_missing_is_named(originals, copy, change, message):
    folder = copy("whole")
    change(folder)
    line = refusal(originals, folder)
    assert matches(message, line), line
    assert "sdpa" not in line


def test_an_adapter_without_a_config_is_named(originals, copy):
    folder = copy("whole")
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text("{}")
    assert "an adapter (LoRA) for its base model" in refusal(originals, folder)


def test_a_model_without_sdpa_is_led_to_eager(originals, tmp_path):
    config = Gemma2Config(
        vocab_size=260, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=8, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModel.from_config(config, attn_implementation="eager")
    model.save_pretrained(tmp_path / "gemma")
    tiny_tokenizer().save_pretrained(tmp_path / "gemma")
    line = refusal(originals, tmp_path / "gemma")
    assert line == "error: Gemma2Model has no SDPA attention; use --attention eager"
    assert collect(originals, tmp_path / "gemma", "--attention", "eager").exit_code == 0


def test_a_leftover_old_buffer_is_accepted(originals, copy):
    folder = copy("whole")
    weights = load_file(folder / "model.safetensors")
    weights["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = torch.ones(260, 16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert collect(originals, folder).exit_code == 0


def test_an_integer_mask_is_accepted(originals, tmp_path):
    config = GPTNeoXConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path / "neox")
    tiny_tokenizer().save_pretrained(tmp_path / "neox")
    file = tmp_path / "neox" / "model.safetensors"
    weights = load_file(file)
    weights["layers.0.attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    save_file(weights, file, {"format": "pt"})
    assert collect(originals, tmp_path / "neox").exit_code == 0


# --- tokenizers ---


def test_a_tokenizer_with_more_ids_than_embeddings(originals, copy):
    folder = copy("whole")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(5)])
    tokenizer.save_pretrained(folder)
    line = refusal(originals, folder)
    assert matches("must be below 260, the size of the model's embedding, got 262", line)


def test_special_tokens_beyond_the_embedding_may_stay_unused(originals, copy):
    folder = copy("whole")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<image{i}>" for i in range(5)]})
    tokenizer.save_pretrained(folder)
    assert collect(originals, folder).exit_code == 0
    shutil.rmtree(folder.parent / "store")
    assert "got 262 for '<image4>'" in refusal(originals, folder, "--parse-special-tokens")


@pytest.mark.parametrize("first", ["<image4>", ""])
def test_a_chat_template_may_not_lead_beyond_the_embedding(originals, copy, first):
    """Markers of a template that were added to the tokenizer, but not to the embedding."""
    folder = copy("whole")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<image{i}>" for i in range(5)]})
    tokenizer.chat_template = first + "{% for m in messages %}{{ m.content }}<image0>{% endfor %}"
    tokenizer.save_pretrained(folder)
    chat = [{"role": role, "content": "abcdefg " * 4} for role in ("user", "assistant")]
    chats = folder.parent / "chats.jsonl"
    chats.write_text((json.dumps({"messages": chat}) + "\n") * 20)
    arguments = [str(folder), str(chats), str(folder.parent / "store"), *SETTINGS]
    result = CliRunner().invoke(app, ["collect", *arguments, "--text-column", "messages"])
    if not first:  # the marker between messages has an embedding
        assert result.exit_code == 0, result.output
        return
    assert result.exit_code == 2, result.output
    assert not (folder.parent / "store").exists()
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert matches(
        r"row \d+ of chats.jsonl .* has the token '<image4>' with id 262, .* is 259", line
    )


def test_an_unknown_token_beyond_the_embedding_is_refused(originals, copy):
    """The unknown token is a special token that a text can produce."""
    folder = copy("whole")
    words = Tokenizer(WordLevel({"a": 0, "</s>": 1, "<unk>": 262}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.add_special_tokens(["</s>", "<unk>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="</s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    assert matches(
        "a text .* has the token '<unk>' with id 262, .* is 259", refusal(originals, folder)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--chat-template", "nosuch.jinja"], "--chat-template applies only to chat messages"),
        (["--chat-template", "nosuch.jinja", "--text-column", "m"], "nosuch.jinja cannot be read"),
        (["--bos", "document"], "bos=document needs a tokenizer with a BOS"),
    ],
)
@pytest.mark.parametrize("workers", [[], ["--workers", "1"]])
def test_wrong_token_options_are_refused_before_a_model_is_loaded(
    originals, copy, monkeypatch, change, message, workers
):
    def never(*_: object, **__: object) -> None:
        pytest.fail("it was loaded")

    monkeypatch.setattr("mpcache.collection.collect.load_for_collection", never)
    monkeypatch.setattr("mpcache.collection.dask_client.DaskCollector.__enter__", never)
    folder = copy("whole")
    tiny_tokenizer(bos=None).save_pretrained(folder)
    chat = [{"role": "user", "content": "a"}]
    rows = [json.dumps({"text": "a", "m": chat}) + "\n" for _ in range(20)]
    (originals / "both.jsonl").write_text("".join(rows))
    arguments = [str(folder), str(originals / "both.jsonl"), str(folder.parent / "store")]
    command = ["collect", *arguments, *SETTINGS, *change, *workers]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (folder.parent / "store").exists()


# --- paths that no system takes ---


@pytest.mark.parametrize("name", ["~nosuch/m", "~nosuch/m.gguf", "x" * 300, "x/" * 3000 + "m.gguf"])
def test_an_impossible_path_is_refused_in_one_line(originals, tmp_path, name):
    for arguments in (
        [name, str(originals / "corpus.jsonl")],
        [str(originals / "whole"), name if "gguf" not in name else f"{name}.jsonl"],
        [str(originals / "whole"), f"{name},{name}"],
    ):
        result = CliRunner().invoke(app, ["collect", *arguments, str(tmp_path / "s"), *SETTINGS])
        is_hub = "x" * 300 in arguments  # a valid though long name of a Hub repository
        assert result.exit_code == 2 or is_hub, (result.output, result.exception)
        assert isinstance(result.exception, SystemExit)
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "m.gguf"])
def test_a_link_to_itself_is_named(originals, copy, name):
    folder = copy("whole")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(name)
    model = folder / name if name.endswith("gguf") else folder
    assert f"{name} is a link to itself" in refusal(originals, model)


def test_an_unknown_model_type_is_not_blamed_on_attention(originals):
    source = find_source(
        CollectConfig(model=str(originals / "whole"), dataset="d", hookpoints=("a",))
    )
    config = CollectConfig(model="m", dataset="d", hookpoints=("a",), attention="flash_attention_2")
    for error, message in (
        (
            ValueError("The checkpoint has model type `new` but Transformers"),
            "the model_type 'new'",
        ),
        (ValueError("the head sizes do not fit"), "the head sizes do not fit; compare"),
        (ImportError("FlashAttention2 is not installed."), "installed; use --attention sdpa"),
    ):
        with pytest.raises(ValueError, match=message), explain_load_errors(source, "model", config):
            raise error


def test_a_file_behind_a_link_has_the_name_of_the_link(tmp_path):
    """As in the Hub's cache, where digests are the names of files and links have the real names."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0af3").write_bytes(b"GGUF")
    (tmp_path / "tiny.gguf").symlink_to("blobs/0af3")
    (tmp_path / "latest").symlink_to("blobs")
    assert short_name(str(tmp_path / "tiny.gguf")) == "tiny.gguf"
    assert short_name(str(tmp_path / "latest")) == "blobs"
    assert short_name("owner/name") == "name"
