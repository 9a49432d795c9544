"""prepare_for_cpu: the same bits, whatever happens to the weight afterwards."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lq_graph
from lq_graph.kernels import library, prepared
from support.native import by_torch, needs_kernel, values

pytestmark = pytest.mark.native
BF16 = torch.bfloat16
SETS = library.instruction_sets()


def prepares(name: str, int4: bool) -> bool:
    """Whether an instruction set reads a copy faster than the weight."""
    return name == "avx512vnni" or (name == "avxvnni" and not int4)


def layer(k: int = 96, n: int = 80, *, int4: bool = False, seed: int = 0) -> lq_graph.LinearQuant:
    weight = values(n, k, int4=int4, seed=seed)
    made = lq_graph.LinearQuant(
        k,
        n,
        bias=False,
        pertoken_scale=True,
        output_dtype=BF16,
        dtype=torch.int32 if int4 else torch.int8,
    )
    made.weight.data = lq_graph.pack_int4(weight) if int4 else weight
    made.scale.data = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    return made


def inputs(m: int, k: int, *, int4: bool = False) -> tuple[Tensor, Tensor]:
    x = values(m, k, int4=int4, seed=5)
    return lq_graph.pack_int4(x) if int4 else x, torch.rand(m)


def golden(made: lq_graph.LinearQuant, x: Tensor, pertoken: Tensor) -> Tensor:
    return by_torch(
        x, made.weight.data, made.scale.data, pertoken_scale=pertoken, output_dtype=BF16
    )


@needs_kernel
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("m", [1, 15, 16, 17, 31, 64, 257])
@pytest.mark.parametrize(
    ("k", "n"), [(8, 1), (64, 16), (72, 63), (1032, 64), (4160, 65), (120, 200)]
)
def test_the_same_bits(name: str, int4: bool, m: int, k: int, n: int) -> None:
    n = -(-n // 8) * 8 if int4 else n  # eight int4 in a word
    made = layer(k, n, int4=int4)
    with library.using(name):
        (one,) = lq_graph.prepare_for_cpu(made)
        assert bool(one.copy) == prepares(name, int4) and one.copy >= one.bytes * bool(one.copy)
        x, pertoken = inputs(m, k, int4=int4)
        assert torch.equal(made(x, pertoken), golden(made, x, pertoken))


@needs_kernel
@pytest.mark.parametrize("name", SETS)
def test_to_ask_why_the_kernel_is_not_used_does_not_choose_another(name: str) -> None:
    with library.using(name):
        assert library.why_not_used() == ""
        (one,) = lq_graph.prepare_for_cpu(layer())
        assert bool(one.copy) == prepares(name, int4=False)


def replaced(made: lq_graph.LinearQuant) -> None:
    made.weight = nn.Parameter(layer(seed=9).weight.data, False)


def other_memory(made: lq_graph.LinearQuant) -> None:
    made.weight.data = layer(seed=9).weight.data


def in_place(made: lq_graph.LinearQuant) -> None:
    with torch.no_grad():
        made.weight[3, 5] += 1


def through_data(made: lq_graph.LinearQuant) -> None:
    made.weight.data.copy_(layer(seed=9).weight.data)


def loaded(made: lq_graph.LinearQuant) -> None:
    made.load_state_dict(layer(seed=9).state_dict())


def transposed(made: lq_graph.LinearQuant) -> None:
    made.weight.data = made.weight.data.t().contiguous().t()


def nothing(made: lq_graph.LinearQuant) -> None:
    pass


@needs_kernel
@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (nothing, True),
        (replaced, False),
        (other_memory, False),
        (in_place, False),
        (through_data, True),
        (loaded, False),
        (transposed, True),  # torch computes it
    ],
)
def test_a_weight_that_changes_afterwards(
    change: Callable[[lq_graph.LinearQuant], None], kept: bool
) -> None:
    made = layer()
    report = lq_graph.prepare_for_cpu(made)
    if not report[0].copy:
        pytest.skip("this instruction set has no copies")
    x, pertoken = inputs(40, 96)
    before = made(x, pertoken)
    change(made)
    out = made(x, pertoken)
    assert torch.equal(out, golden(made, x, pertoken))
    assert torch.equal(out, before) == (change in (nothing, transposed))
    assert (id(made.weight) in prepared._all) == kept
    lq_graph.prepare_for_cpu(made)
    assert torch.equal(made(x, pertoken), golden(made, x, pertoken))


@needs_kernel
def test_state_dicts_copies_and_files_do_not_have_it() -> None:
    made = layer()
    plain, file = {k: v.clone() for k, v in made.state_dict().items()}, io.BytesIO()
    torch.save(made, file)
    size = file.tell()
    lq_graph.prepare_for_cpu(made)
    again = made.state_dict()
    assert list(again) == list(plain) and all(torch.equal(again[k], plain[k]) for k in plain)
    file = io.BytesIO()
    torch.save(made, file)
    assert file.tell() == size
    assert id(copy.deepcopy(made).weight) not in prepared._all


@needs_kernel
def test_the_copy_is_freed_with_the_weight_or_when_it_moves() -> None:
    made, moved = layer(), layer(seed=1)
    before = set(prepared._all)
    lq_graph.prepare_for_cpu(made)
    lq_graph.prepare_for_cpu(moved)
    moved.to("meta")
    del made
    assert set(prepared._all) == before


@needs_kernel
def test_the_report() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(8, 8), "a": layer(), "b": layer()})
    model["b"].to("meta")
    report = lq_graph.prepare_for_cpu(model)
    assert [(one.name, one.bytes) for one in report] == [("a", 96 * 80), ("b", 96 * 80)]
    assert report[1].copy == 0 and report[1].note == "its weight is on meta"
    assert f"{2 * 96 * 80:,} bytes of weights, and {report[0].copy:,} bytes of copies" in str(
        report
    )
    assert lq_graph.prepare_for_cpu(model) == report


def test_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "loaded", lambda: None)
    (one,) = lq_graph.prepare_for_cpu(layer())
    assert one.copy == 0 and one.note.startswith("the compiled CPU kernel is not used here")


def test_a_model_without_such_layers() -> None:
    assert str(lq_graph.prepare_for_cpu(nn.Linear(8, 8))) == "no LinearQuant in this model"
