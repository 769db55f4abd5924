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
