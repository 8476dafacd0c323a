"""The moving average of weights: against a plain loop in float64, buffers, states, what a step may read."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cluster.training.average import MovingAverage, decay_at

DECAY = 0.9


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def changed(module: nn.Module, step: int) -> None:
    """Every number of the module, as if a step had been trained."""
    torch.manual_seed(step + 1)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor))
            else:
                tensor.add_(1)


@pytest.mark.parametrize("decay", [0.05, DECAY, 0.999])
def test_it_is_the_plain_average_in_float64_of_weights_and_running_statistics(decay):
    module = net()
    average = MovingAverage(module, decay)
    expected = {name: tensor.double().clone() for name, tensor in module.state_dict().items()}
    for step in range(200):
        changed(module, step)
        average.update()
        kept = min(decay, (1 + step) / (10 + step))
        for name, tensor in module.state_dict().items():
            expected[name] = kept * expected[name] + (1 - kept) * tensor.double()
    found = average.module.state_dict()
    assert int(found.pop("1.num_batches_tracked")) == 200  # whole numbers are not averaged
    for name, tensor in found.items():
        # float32: a rounding each step, of numbers of about 15, of which the last 1 / (1 - decay) add up
        torch.testing.assert_close(tensor.double(), expected[name], atol=2e-5, rtol=1e-5)


def test_the_decay_warms_up():
    assert [decay_at(0.999, updates) for updates in (0, 1, 8)] == [0.1, 2 / 11, 0.5]
    assert decay_at(0.999, 8980) < 0.999 <= decay_at(0.999, 8990)
    assert decay_at(0.05, 0) == 0.05


def test_it_starts_as_the_weights_do_and_is_a_module_of_its_own():
    module = net()
    average = MovingAverage(module, DECAY)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    changed(module, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in average.module.state_dict().items())
    average.update()
    weight = average.module[0].weight
    torch.testing.assert_close(weight, 0.1 * before["0.weight"] + 0.9 * module[0].weight.detach())  # float32
    assert not weight.requires_grad
    assert module[0].weight.requires_grad


def test_a_buffer_that_the_module_puts_another_in_place_of_is_averaged_too():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self) -> None:
            self.seen = self.seen + 1

    module = Counting()
    average = MovingAverage(module, DECAY)
    for _ in range(3):
        module()
        average.update()
    assert 1 < float(average.module.seen) < 3


def test_it_goes_on_from_its_state_bit_for_bit():
    module, other = net(), net()
    whole, half = MovingAverage(module, DECAY), MovingAverage(other, DECAY)
    for step in range(5):
        changed(module, step)
        whole.update()
    half.load_state_dict(whole.state_dict())
    other.load_state_dict(module.state_dict())
    for step in range(5, 9):
        changed(module, step)
        changed(other, step)
        whole.update()
        half.update()
    assert half.num_updates == whole.num_updates == 9
    assert half.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in half.state_dict().items())


def test_a_state_of_torchs_averaged_model_can_be_loaded_and_has_the_same_names():
    module = net()
    earlier = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for step in range(3):
        changed(module, step)
        earlier.update_parameters(module)
    average = MovingAverage(net(), DECAY)
    assert list(average.state_dict()) == list(earlier.state_dict())
    average.load_state_dict(earlier.state_dict())
    assert average.num_updates == 3
    for name, tensor in earlier.module.state_dict().items():
        assert torch.equal(average.module.state_dict()[name], tensor)


def test_nothing_is_read_back_from_the_device():
    """The meta device has no numbers to read."""
    with torch.device("meta"):
        module = net()
    average = MovingAverage(module, DECAY)
    average.update()
    assert average.module[0].weight.is_meta


def test_numbers_of_different_precision_are_averaged_together():
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2).bfloat16())
    average = MovingAverage(module, DECAY)
    first = module[1].weight.detach().clone()
    changed(module, 0)
    average.update()
    torch.testing.assert_close(average.module[1].weight, 0.1 * first + 0.9 * module[1].weight.detach())  # float64
    assert average.module[2].weight.dtype == torch.bfloat16


def test_a_module_without_numbers_has_an_average():
    average = MovingAverage(nn.ReLU(), DECAY)
    average.update()
    assert average.num_updates == 1
