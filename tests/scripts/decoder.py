"""A small decoder with a static cache, eagerly on the npu and on the CPU: the same tokens."""

import copy

import torch
from torch import Tensor, nn

import lq_graph

WIDTH, HEADS, LONGEST, TOKENS, LAYERS = 64, 4, 24, 50, 3


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        for name in ("keys", "values"):
            cache = torch.zeros(HEADS, LONGEST, WIDTH // HEADS, dtype=torch.float16)
            self.register_buffer(name, cache)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        q, k, v = self.qkv(norm(x)).view(1, 3, HEADS, -1).transpose(0, 2).unbind(1)
        self.keys.index_copy_(1, position, k)
        self.values.index_copy_(1, position, v)
        scores = (q @ self.keys.mT) / 4
        hidden = torch.arange(LONGEST, device=x.device) > position
        weights = scores.masked_fill(hidden, -6e4).softmax(-1, dtype=torch.float32).half()
        x = x + (weights @ self.values).transpose(0, 1).reshape(1, WIDTH)
        return x + self.down(nn.functional.silu(self.up(norm(x))))


def norm(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).half()


def generate(layers: nn.ModuleList, table: Tensor, device: str) -> list[int]:
    layers, table = layers.to(device), table.to(device)
    token, position = (torch.tensor([n], device=device) for n in (7, 0))
    tokens = []
    for _ in range(LONGEST):
        x = nn.functional.embedding(token, table)
        for layer in layers:
            x = layer(x, position)
        token = (norm(x) @ table.flip(0, 1).t()).argmax(-1)
        position.add_(1)
        tokens.append(token.clone())
    return torch.cat(tokens).tolist()


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer() for _ in range(LAYERS)).half()
    table = torch.randn(TOKENS, WIDTH).half()
    lq_graph.quantize(layers, lq_graph.A8W8Dynamic())
    wanted = generate(copy.deepcopy(layers), table, "cpu")
    got = generate(layers, table, "npu")
    print(wanted, got)
    print("equal" if got == wanted and len(set(got)) > 5 else "different")


if __name__ == "__main__":
    main()
