"""What `mpcache hookpoints` lists is what `collect` accepts."""

import doctest
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    DeepseekV3Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    ViTConfig,
)
from typer.testing import CliRunner

from mpcache.model import hookpoint_report
from mpcache.model.alike_hookpoints import numbers_in_names
from mpcache.model.hookpoint_patterns import Side, resolve_sides
from mpcache.model.hookpoint_report import HookpointReport, hookpoints
from mpcache.model.hooks import Capture, widths
from mpcli.mpcache import app
from tests.helpers.hookpoint_families import FAMILIES
from tests.helpers.models import captured


@pytest.fixture(autouse=True)
def _no_advice_on_kernels() -> Iterator[None]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    yield
    logging.getLogger("transformers").setLevel(logging.WARNING)


def report_of(name: str, folder: Path) -> tuple[HookpointReport, PreTrainedModel]:
    """The report from the config alone, and the model with weights."""
    config = FAMILIES[name]()
    config.save_pretrained(folder)
    report = hookpoints(str(folder))
    model = AutoModel.from_config(config, attn_implementation=report.attention)
    return report, model.to(torch.bfloat16).eval().requires_grad_(False)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_list_is_what_collect_accepts(name: str, tmp_path: Path) -> None:
    report, model = report_of(name, tmp_path)
    good: dict[Side, int] = {}
    bad: list[Side] = []
    for point in report.hookpoints:
        for module in point.modules:
            for side in ("input", "output"):
                width, reason = getattr(point, side), getattr(point, f"{side}_reason")
                assert (width is None) != (reason is None)
                if width is None:
                    bad.append(Side(module, side))
                else:
                    good[Side(module, side)] = width
                    assert getattr(point, f"{side}_bytes") == 2 * width
    assert widths(model, good) == good
    for side_ in bad:
        with pytest.raises(ValueError, match="cannot be collected"):
            widths(model, [side_])
    names = {name for name, _ in model.named_modules() if name}
    assert {module for point in report.hookpoints for module in point.modules} == names
    assert any(point.input or point.output for point in report.hookpoints)


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("llama", {"residual stream": "layers.*:output", "MLP reads": "layers.*.mlp:input",
                   "MLP adds to the stream": "layers.*.mlp:output",
                   "attention adds to the stream": "layers.*.self_attn:output"}),
        ("gpt2", {"MLP adds to the stream": "h.*.mlp:output"}),
        ("gemma2", {"MLP writes": "layers.*.mlp:output", "MLP adds to the stream":
                    "layers.*.post_feedforward_layernorm:output"}),
        ("gemma3", {"attention writes": "layers.*.self_attn:output", "MLP adds to the stream":
                    "layers.*.post_feedforward_layernorm:output",
                    "attention adds to the stream": "layers.*.post_attention_layernorm:output"}),
        ("olmo2", {"MLP adds to the stream": "layers.*.post_feedforward_layernorm:output"}),
        ("modernbert", {"attention adds to the stream": "layers.*.attn:output"}),
        ("gemma3n", {"stream that a layer reads": "layers.*.input_layernorm:input"}),
        ("llava", {"residual stream": "language_model.layers.*:output"}),
    ],
)  # fmt: skip
def test_roles(name: str, roles: dict[str, str], tmp_path: Path) -> None:
    report, _ = report_of(name, tmp_path)
    assert roles.items() <= {role.role: role.side for role in report.roles}.items()


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2", "gpt2", "neox"])
def test_the_additions_make_the_stream(name: str, tmp_path: Path) -> None:
    """The law behind the roles: stream before + what attention and MLP add = stream after."""
    report, model = report_of(name, tmp_path)
    paths = {role.role: role.side.replace("*", "1") for role in report.roles}
    after = paths["residual stream"]
    adds = [paths["attention adds to the stream"], paths["MLP adds to the stream"]]
    before = after.replace(":output", ":input")
    with Capture(model.float(), resolve_sides([before, *adds, after], model)) as capture:
        seen = captured(capture, {"input_ids": torch.arange(8).reshape(2, 4)})
    values = {str(side): value for side, value in seen.items()}
    added = values[adds[0]] + values[adds[1]]
    assert torch.allclose(values[before] + added, values[after], atol=1e-5)


@pytest.mark.parametrize("name", ["granite", "bloom", "bert"])
def test_what_is_not_added_as_it_is_has_no_such_role(name: str, tmp_path: Path) -> None:
    """Granite adds a multiple, BLOOM adds inside its MLP, BERT's parts are normed streams."""
    report, _ = report_of(name, tmp_path)
    assert not any("adds" in role.role for role in report.roles)
    assert any(role.role == "residual stream" for role in report.roles)


def test_layers_that_differ_are_apart(tmp_path: Path) -> None:
    moe, _ = report_of("deepseek_v3", tmp_path)
    mlps = [(p.numbers, p.module) for p in moe.hookpoints if p.hookpoint == "layers.*.mlp"]
    assert mlps == [("0", "DeepseekV3MLP"), ("1-2", "DeepseekV3MoE")]
    local, _ = report_of("gemma3", tmp_path)
    layers = [(p.numbers, p.module) for p in local.hookpoints if p.hookpoint == "layers.*"]
    assert layers == [
        ("0,2", "Gemma3DecoderLayer (sliding_attention)"),
        ("1", "Gemma3DecoderLayer (full_attention)"),
    ]


def test_several_streams_are_refused_with_a_hookpoint_that_works(tmp_path: Path) -> None:
    _, model = report_of("gemma3n", tmp_path)
    with pytest.raises(
        ValueError, match=r"4 streams of rows; use layers\.1\.input_layernorm:input"
    ):
        widths(model, [Side("layers.1", "output")])
    side = Side("layers.1.input_layernorm", "input")
    assert widths(model, [side]) == {side: 32}


def test_what_images_alone_run_is_idle(tmp_path: Path) -> None:
    report, _ = report_of("llava", tmp_path)
    idle = {p.hookpoint for p in report.hookpoints if p.is_idle}
    assert {"vision_tower", "multi_modal_projector"} <= idle
    assert not any(p.hookpoint.startswith("language_model.layers") for p in report.hookpoints
                   if p.is_idle)  # fmt: skip
    output = CliRunner().invoke(app, ["hookpoints", str(tmp_path)]).stdout
    assert "vision_tower, multi_modal_projector: it must run once in a pass over text" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64,
                    num_key_value_heads=8, intermediate_size=28672, vocab_size=128_256),
        DeepseekV3Config(),
    ],
)  # fmt: skip
def test_large_models_take_no_memory(config: object, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    program = f"""
import json, resource
from mpcache.model.hookpoint_report import hookpoints
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = hookpoints({str(tmp_path)!r})
mlps = [p.output for p in report.hookpoints if p.hookpoint == "layers.*.mlp"]
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, mlps]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    kilobytes, widths = json.loads(done.stdout.splitlines()[-1])
    assert kilobytes < 1e6  # the weights have more than a hundred times as much
    assert set(widths) == {config.hidden_size}


def test_json(tmp_path: Path) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["hookpoints", str(tmp_path), "--json"])
    assert done.exit_code == 0
    points = {p["hookpoint"]: p for p in json.loads(done.stdout)["hookpoints"]}
    assert points["layers.*.mlp"] | {"modules": 0} == {
        "hookpoint": "layers.*.mlp", "numbers": "0-2", "module": "LlamaMLP",
        "input": 32, "output": 32, "input_bytes": 64, "output_bytes": 64,
        "input_reason": None, "output_reason": None, "is_idle": False, "modules": 0,
    }  # fmt: skip


def test_a_model_without_sdpa_says_what_collect_needs(tmp_path: Path) -> None:
    FAMILIES["gpt_oss"]().save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["hookpoints", str(tmp_path)])
    assert "collect needs --attention eager" in done.stdout


@pytest.mark.parametrize("config", [T5Config(), ViTConfig()])
def test_models_that_do_not_run_on_text_alone(config: PreTrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["hookpoints", str(tmp_path)])
    assert done.exit_code == 2
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "must be a decoder or an encoder" in message or "must run with only tokens" in message


def test_no_such_model(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["hookpoints", str(tmp_path / "none")])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert "does not exist; give an existing folder" in done.stderr


def test_numbers() -> None:
    assert numbers_in_names(["norm"]) == ""
    assert numbers_in_names([f"a.{n}" for n in (0, 1, 2, 5)]) == "0-2,5"
    assert numbers_in_names([f"a.{n}.b.{m}" for n in range(2) for m in range(3)]) == "0-1 x 0-2"


def test_the_example_of_the_function_runs() -> None:
    result = doctest.testmod(hookpoint_report)
    assert result.attempted > 0
    assert result.failed == 0
