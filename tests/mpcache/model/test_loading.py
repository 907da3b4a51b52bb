"""Loading is silent, and the model is identified by digests."""

import importlib.metadata
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    RobertaConfig,
)

from mpcache.config import CollectConfig
from mpcache.hub_errors import explain_hub_errors, hub_error
from mpcache.model.loading import available_device, load_model
from mpcache.model.model_identity import model_digest, model_provenance, tokenizer_digest
from mpcache.model.model_source import find_source
from tests.helpers.models import save_tiny, tiny_model, tiny_tokenizer, transformers_log


def make_config(model, **changes) -> CollectConfig:
    usual = {"dataset": "x.txt", "hookpoints": ("layers.1",), "ctx_len": 16, "device": "cpu"}
    return CollectConfig(model=str(model), **(usual | changes))


def test_loads_the_base_model_of_a_language_model(tmp_path):
    head = AutoModelForCausalLM.from_config(tiny_model().config)
    head.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with transformers_log() as records:
        model, tokenizer = load_model(make_config(tmp_path))
        assert not records
        AutoModel.from_pretrained(tmp_path)
        assert "lm_head" in records[0].getMessage()
    assert type(model).__name__ == "LlamaModel"
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer("ab", add_special_tokens=False)["input_ids"]


def test_a_pooler_without_weights_is_left_out(tmp_path):
    config = BertConfig(vocab_size=260, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    digests = {model_digest(load_model(make_config(tmp_path))[0]) for _ in range(2)}
    assert len(digests) == 1


def test_missing_weights_are_refused(tmp_path):
    save_tiny(tmp_path, layers=2)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(
        ValueError, match=r"must be complete for LlamaModel, got none for layers\.2"
    ):
        load_model(make_config(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such"}, "the model /no/such does not exist; give an existing folder"),
        ({"ctx_len": 128, "part_rows": 65536}, "must be at most the model's 64 positions, got 128"),
        ({"device": "cuda:99"}, "device must be a torch device of this machine, got cuda:99"),
        ({"device": "gpu"}, "device must be a torch device of this machine, got gpu"),
        ({"attention": "flash_attention_2"}, "use --attention sdpa"),
    ],
)
def test_refuses_in_one_line(tmp_path, changes, message):
    config = make_config(**({"model": save_tiny(tmp_path)} | changes))
    with pytest.raises(ValueError, match=message) as error:
        load_model(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("padding", [0, 1, 5])
def test_positions_that_start_after_the_padding_token(tmp_path, padding):
    """RoBERTa's family has padding_idx + 1 fewer positions than rows in the table."""
    architecture = RobertaConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=padding,
    )  # fmt: skip
    AutoModel.from_config(architecture).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    usable = 63 - padding
    sizes = {"part_rows": usable * (usable + 1), "chunk_rows": usable}
    model, _ = load_model(make_config(tmp_path, ctx_len=usable, **sizes))
    assert model(torch.full((1, usable), 7))[0].shape == (1, usable, 16)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(torch.full((1, usable + 1), 7))
    with pytest.raises(ValueError, match=f"the model's {usable} positions, got {usable + 1}; use"):
        load_model(make_config(tmp_path, ctx_len=usable + 1, **sizes))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold config\.json"):
        load_model(make_config(tmp_path))


def test_a_lost_hub_is_no_mistake_of_the_user():
    """In a separate process, since the Hub client reads HF_HUB_OFFLINE on import."""
    code = """
from mpcache.config import CollectConfig
from mpcache.model.loading import load_model
try:
    load_model(CollectConfig(model="no/such", dataset="x.txt", hookpoints=("a",), device="cpu"))
except ConnectionError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("the Hub cannot be reached for model no/such")


def hub_says(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    return kind("no", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (hub_says(RepositoryNotFoundError), ValueError, "m is neither a local path nor on the Hub"),
        (hub_says(GatedRepoError), ValueError, "m is gated; accept its terms"),
        (hub_says(RevisionNotFoundError), ValueError, "revision must exist in m, got main"),
        (hub_says(RemoteEntryNotFoundError), ValueError, "m cannot be opened: no"),
        (hub_says(HfHubHTTPError), ConnectionError, "cannot be reached for m"),
        (TimeoutError("slow"), ConnectionError, "cannot be reached for m"),
        (ValueError("Unknown split\nlong story"), ValueError, "m cannot be opened: Unknown split$"),
    ],
)
def test_errors_of_the_hub_are_explained(error, kind, message):
    with pytest.raises(kind, match=message), explain_hub_errors("m", "main"):
        raise error


def test_an_error_that_is_not_the_hubs_stays_itself():
    full = OSError(28, "No space left on device")
    assert hub_error(full, "model m", "main") is full


def test_resolve_device():
    assert available_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


# --- identity ---


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_digest_is_of_weights_not_of_files(tmp_path, dtype):
    model = tiny_model()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "cut", max_shard_size="4KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    for folder in ("whole", "cut"):
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    configs = [make_config(tmp_path / name, model_dtype=dtype) for name in ("whole", "cut")]
    digests = {model_digest(load_model(config)[0]) for config in configs}
    assert len(digests) == 1
    assert digests != {model_digest(tiny_model(seed=1).to(getattr(torch, dtype)))}


def test_digest_sees_the_architecture():
    original, changed = tiny_model(), tiny_model()
    changed.config.rms_norm_eps = 1e-3
    assert model_digest(original) != model_digest(changed)


def test_tokenizer_digest_ignores_calls_and_sees_tokens():
    tokenizer = tiny_tokenizer()
    digest = tokenizer_digest(tokenizer)
    tokenizer("ab", truncation=True, max_length=1)
    assert tokenizer_digest(tokenizer) == digest == tokenizer_digest(tiny_tokenizer())
    assert digest != tokenizer_digest(tiny_tokenizer(bos=None))
    tokenizer.add_tokens(["word"])
    assert tokenizer_digest(tokenizer) != digest


def test_provenance(tmp_path):
    config = make_config(save_tiny(tmp_path / "name"), attention="eager")
    provenance = model_provenance(load_model(config)[0], find_source(config))
    assert provenance["model"] == "name"
    assert provenance["model_revision"] is None
    assert provenance["attention"] == "eager"
    assert provenance["torch_version"] == importlib.metadata.version("torch")
