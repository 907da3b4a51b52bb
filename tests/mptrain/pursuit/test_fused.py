"""Whether Triton kernels are used."""

import importlib.util
import warnings

import pytest
import torch

from mptrain.kernels import triton_support


def test_available_goes_by_device() -> None:
    assert not triton_support.available(torch.device("cpu"))


def test_a_gpu_without_triton_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    triton_support._warn_once.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert triton_support.available(torch.device("cuda"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="pip install triton"):
        assert not triton_support.available(torch.device("cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not triton_support.available(torch.device("cuda"))


def test_an_older_gpu_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not triton_support.available(torch.device("cuda"))
