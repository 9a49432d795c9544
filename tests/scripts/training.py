"""A training step, a data loader's workers, the profiler: `training.py FUNCTION [ARGUMENTS]`."""

import copy
import sys

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


def step(model: nn.Module, x: Tensor, target: Tensor) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(x), target).backward()
    optimizer.step()
    return [p.detach().cpu() for p in model.parameters()]


def one_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(196, 5),
    )
    x, target = torch.randn(2, 3, 16, 16), torch.tensor([1, 2])
    twin = copy.deepcopy(model)
    on_npu = step(model.npu(), x.npu(), target.npu())
    for a, b in zip(on_npu, step(twin, x, target), strict=True):
        torch.testing.assert_close(a, b)
    print("equal")


class Numbers(Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        return torch.full((2,), float(i))


def workers(context: str) -> None:
    torch.ones(1, device="npu")  # the parent has used the device
    loader = DataLoader(
        Numbers(), 2, num_workers=2, pin_memory=True, multiprocessing_context=context
    )
    print([int(x.to("npu", non_blocking=True).sum()) for x in loader])


def profiler() -> None:
    with torch.profiler.profile() as profile:
        torch.ones(4, device="npu") + torch.ones(4, device="npu")
    print("aten::add" in {event.key for event in profile.key_averages()})


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
