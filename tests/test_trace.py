"""What the dry pass rests on: wrappers, first tensors, modes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpuclust.capture.trace import eval_mode, first_tensor, function_name, trace_forward, unwrap


def test_unwrap_looks_through_wrappers():
    inner = nn.Linear(2, 2)
    assert unwrap(nn.DataParallel(inner)) is inner
    assert unwrap(torch.compile(nn.DataParallel(inner), backend="eager")) is inner
    assert unwrap(inner) is inner


def test_first_tensor_of_what_modules_return():
    one, two = torch.zeros(1), torch.ones(1)
    assert first_tensor(one) is one
    assert first_tensor((None, two, one)) is two
    assert first_tensor({"a": None, "b": one}) is one
    assert first_tensor(None) is None
    assert first_tensor("text") is None


def test_function_names_ignore_the_place():
    assert {function_name(f) for f in (F.relu, torch.relu, torch.relu_, torch.Tensor.relu_)} == {"relu"}


def test_eval_mode_restores_each_module_and_runs_no_train_method():
    class Loud(nn.Linear):
        def train(self, mode=True):
            raise AssertionError("train() may do more than set the flag")

    module = nn.Sequential(Loud(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    module[1].training = False

    def interrupt():
        with eval_mode(module):
            assert not any(part.training for part in module.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert [part.training for part in module] == [True, False, True]


def test_an_in_place_function_ends_what_a_tensor_was():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            y = self.fc(x)
            y.mul_(2.0)
            return F.relu(y)

    calls = trace_forward(Net(), torch.ones(1, 3))
    (fc,) = [call for call in calls if call.module == "fc" and not call.after]
    assert fc.activated is None


def test_what_has_as_many_rows_as_the_batch_by_chance_is_no_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
            self.table = nn.Embedding(2, 4)

        def forward(self, x):
            x = self.conv(x).mean((2, 3)) + self.table(torch.arange(2)).sum(0)
            return self.fc(x)

    labels = {call.label for call in trace_forward(Net(), torch.randn(1, 3, 8, 8))}
    assert labels == {"conv", "conv+mean", "fc", "output"}


def test_complex_and_whole_numbers_are_no_activations():
    class Spectrum(nn.Module):
        def forward(self, x):
            return torch.fft.rfft2(x)

    class Largest(nn.Module):
        def forward(self, x):
            return x.flatten(1).argmax(1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.spectrum, self.largest, self.fc = Spectrum(), Largest(), nn.Linear(3 * 4 * 3, 2)

        def forward(self, x):
            x = self.spectrum(x).abs()
            return self.fc(x.flatten(1) + self.largest(x)[:, None])

    labels = {call.label for call in trace_forward(Net(), torch.randn(1, 3, 4, 4))}
    assert "fc" in labels
    assert not {"spectrum", "largest"} & labels
