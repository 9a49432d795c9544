"""lq_graph.kernels: what it imports, its errors, and the sizes of int4 in int32."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch_npu.contrib.module import LinearQuant as VendorLinearQuant

import lq_graph
from lq_graph import LinearQuant, LinearQuantValueError, kernels
from lq_graph.kernels import (
    NotFiniteError,
    OperandError,
    PartialGroupError,
    ShortStorageError,
    logical_k,
    storage_k,
)
from lq_graph.parallel import ColwiseLinearQuant

I8, I32, F16, F32 = torch.int8, torch.int32, torch.float16, torch.float32
HERE = Path(kernels.__file__).parent
ROOT = Path(__file__).resolve().parents[2]


# ---- imports ----

_LOADED = "import sys\n{}\nprint(*(m for m in sys.modules if m.partition('.')[0] == 'lq_graph'))"
_BARE_ROOT = """
import importlib.util, types
root = types.ModuleType("lq_graph")
root.__path__ = list(importlib.util.find_spec("lq_graph").submodule_search_locations)
sys.modules["lq_graph"] = root
import lq_graph.kernels
"""


@pytest.mark.parametrize("code", ["import lq_graph.kernels", _BARE_ROOT], ids=["root", "bare root"])
def test_the_kernels_load_nothing_else_of_lq_graph(code: str) -> None:
    """With the root package that is there, and with one that imports nothing."""
    done = subprocess.run(
        [sys.executable, "-c", _LOADED.format(code)],
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    loaded = set(done.stdout.split())
    assert {"lq_graph.kernels.native", "lq_graph.kernels.numerics"} <= loaded
    allowed = {"lq_graph", "lq_graph._import_torch", "lq_graph.errors", "lq_graph.ops"}
    assert not {m for m in loaded - allowed if not f"{m}.".startswith("lq_graph.kernels.")}


def _imports(file: Path) -> set[str]:
    """Modules a file imports, anywhere in it; relative ones begin with their dots."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


@pytest.mark.parametrize("file", sorted(HERE.glob("*.py")), ids=lambda f: f.stem)
def test_the_kernels_import_torch_only(file: Path) -> None:
    for name in _imports(file):
        is_own = name.startswith(".") and not name.startswith("..")
        root = name.partition(".")[0]
        assert is_own or root == "torch" or root in sys.stdlib_module_names, name


def test_other_packages_use_only_what_kernels_exports() -> None:
    """native, the compiled kernel, is for benchmarks and tests."""
    for package in ("lq_graph", "converters", "cann_host"):
        for file in (ROOT / package).rglob("*.py"):
            if file.parent == HERE:
                continue
            inner = {n for n in _imports(file) if re.search(r"(^\.+|lq_graph\.)kernels\.", n)}
            assert not inner, f"{file}: {inner}"
    assert all(hasattr(kernels, name) for name in kernels.__all__)


def test_bits_of_packed_forms_are_in_one_file() -> None:
    """Masks and shifts of the 19-bit scale and of int4 nibbles. The reference of doctor's self-test
    has its own, so that it is independent of what it tests."""
    bits = re.compile(
        r"0x(FFFF)?E000\b|0x1FFF\b|-0x2000\b|0x1FF\b|0x0?F0F\b|<< 4\)|\.remainder\(16\)|<< ?46",
        re.IGNORECASE,
    )
    found = {
        file.relative_to(ROOT).as_posix()
        for package in ("lq_graph", "converters", "cann_host")
        for file in (ROOT / package).rglob("*.py")
        if bits.search(file.read_text())
    }
    assert found == {"lq_graph/kernels/packing.py", "lq_graph/analysis/integer_reference.py"}


# ---- sizes of int4 in int32 ----


@pytest.mark.parametrize(
    ("k", "dtype", "elements"),
    [
        (0, I8, 0), (1, I8, 1), (20, I8, 20), (64, I8, 64),
        (0, I32, 0), (8, I32, 1), (16, I32, 2), (65528, I32, 8191),
        (20, F16, 20), (20, F32, 20),
    ],
)  # fmt: skip
def test_storage_k_and_logical_k_are_inverses(k: int, dtype: torch.dtype, elements: int) -> None:
    assert storage_k(k, dtype) == elements
    assert logical_k(elements, dtype) == k


@pytest.mark.parametrize("k", [1, 7, 9, 20, 65535])
def test_a_partial_group_has_no_storage(k: int) -> None:
    text = f"k is {k}; an int32 holds 8 int4 values, so k must be a multiple of 8"
    with pytest.raises(PartialGroupError, match=text) as caught:
        storage_k(k, I32)
    assert (caught.value.k, caught.value.group, caught.value.argument) == (k, 8, "k")
    with pytest.raises(PartialGroupError, match=text):
        kernels.pack_int4(torch.zeros(2, k, dtype=I8))


def test_sizes_may_be_symbols() -> None:
    unknown = ShapeEnv().create_unbacked_symint()
    words = storage_k(unknown, I32)
    assert not isinstance(words, int) and "8" in str(words)
    assert str(logical_k(unknown, I32)) == f"8*{unknown}"

    torch._dynamo.reset()
    quantize = torch.compile(
        lambda x: lq_graph.dynamic_quant(x, dtype=I32),
        dynamic=True,
        fullgraph=True,
        backend="eager",
    )
    for k in (64, 72, 128):
        x = torch.randn(3, k).half()
        assert torch.equal(quantize(x)[0], lq_graph.dynamic_quant(x, dtype=I32)[0])
        assert quantize(x)[0].shape == (3, k // 8)
    with pytest.raises(Exception, match=r"x has k = .*; allowed is a multiple of 8 for int4"):
        quantize(torch.randn(3, 60).half())


def assigned(layer: nn.Module, k: int = 16) -> nn.Module:
    layer.weight.data = torch.zeros(16, k // 8, dtype=I32)  # type: ignore[union-attr]
    return layer


def of_twenty() -> LinearQuant:
    return LinearQuant(20, 16, output_dtype=F16)


def int4_layer() -> LinearQuant:
    return LinearQuant(16, 16, dtype=I32, output_dtype=F16)


X = torch.zeros(3, 2, dtype=I32)
MISMATCH = (
    r"in_features is 20, and weight is int32 \(16, 2\) and holds k = 16 int4 values in a row; "
)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: LinearQuant(20, 16, dtype=I32), "LinearQuant: in_features is 20; .* multiple"),
        (lambda: LinearQuant(20, 16, x2_dtype=I32), "LinearQuant: in_features is 20; .* multiple"),
        (lambda: assigned(of_twenty())(X), "LinearQuant: " + MISMATCH),
        (
            lambda: torch.compile(assigned(of_twenty()), backend="eager")(X),
            "LinearQuant: " + MISMATCH,
        ),
        (
            lambda: ColwiseLinearQuant().check("up", assigned(of_twenty()), 2),
            "up: " + MISMATCH,
        ),
        (
            lambda: lq_graph.convert(nn.Sequential(assigned(VendorLinearQuant(20, 16)))),
            "convert: 0: " + MISMATCH,
        ),
        (lambda: lq_graph.pack_int4(torch.zeros(2, 20, dtype=I8)), r"pack_int4: .* multiple of 8"),
        (
            lambda: lq_graph.dynamic_quant(torch.zeros(2, 20).half(), dtype=I32),
            "dynamic_quant: x has k = 20; allowed is a multiple of 8 for int4",
        ),
        (
            lambda: lq_graph.from_fractal_nz(torch.zeros(1, 1, 16, 8, dtype=I32), 16, 20),
            "from_fractal_nz: k is 20; .* multiple of 8. What to do: pass the n and k",
        ),
    ],
    ids=[
        "constructor, dtype", "constructor, x2_dtype", "weight.data, eager",
        "weight.data, torch.compile", "parallel plan", "convert", "pack_int4", "dynamic_quant",
        "from_fractal_nz",
    ],
)  # fmt: skip
def test_a_partial_group_is_refused_by_name(call: Callable[[], object], text: str) -> None:
    torch._dynamo.reset()
    with pytest.raises(LinearQuantValueError, match=text):
        call()


def test_a_state_dict_with_a_partial_group_is_refused() -> None:
    layer = nn.Sequential(of_twenty())
    text = (
        r"0.weight is int32 \(16, 2\) in the state dict; allowed is .*\(16, 20\), and no int32, "
        "for in_features 20 is not a multiple of 8"
    )
    with pytest.raises(RuntimeError, match=text):
        layer.load_state_dict({f"0.{k}": v for k, v in int4_layer().state_dict().items()})
    assert layer[0].weight.dtype == I8


def test_quantize_leaves_a_layer_with_a_partial_group_float() -> None:
    model = nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 20), nn.Linear(16, 16)).half()
    report = " ".join(str(lq_graph.quantize(model, lq_graph.A4W4Dynamic())).split())
    kinds = [type(layer).__name__ for layer in model]
    assert kinds == ["Linear", "Linear", "QuantizedLinear"]
    assert "k = 20, n = 16: int4 needs multiples of 8" in report


@pytest.mark.parametrize("in_features", [20, 160])
def test_in_features_may_count_words_as_some_models_do(in_features: int) -> None:
    layer = assigned(LinearQuant(in_features, 16, output_dtype=F16), 160)
    assert layer(torch.zeros(3, 20, dtype=I32)).shape == (3, 16)
    vendor = assigned(VendorLinearQuant(in_features, 16, output_dtype=F16), 160)
    assert lq_graph.convert(vendor).in_features == 160


# ---- errors ----


def shortened(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(4)
    return tensor


def test_the_kernels_raise_errors_with_fields() -> None:
    x, weight = torch.ones(4, 64, dtype=I8), torch.ones(8, 64, dtype=I8)
    with pytest.raises(ShortStorageError) as short:
        kernels.quant_matmul(x, shortened(weight.clone()), torch.ones(1), output_dtype=F16)
    error = short.value
    assert (error.argument, error.shape, error.needed, error.held) == ("weight", (8, 64), 512, 4)
    nan = kernels.pack_scale(torch.full((8,), torch.nan))
    for call in (
        lambda: kernels.quant_matmul(x, weight, nan, output_dtype=F16),
        lambda: kernels.quant_matmul(x, weight.expand(2, 8, 64), nan, output_dtype=F16),  # torch
        lambda: kernels.unpack_finite_scale(nan),
    ):
        with pytest.raises(
            NotFiniteError, match="the packed scale holds NaN or infinity"
        ) as caught:
            call()
        assert isinstance(caught.value, OperandError) and caught.value.argument == "scale"
        assert not isinstance(caught.value, lq_graph.LinearQuantError)


def test_users_of_lq_graph_get_its_errors() -> None:
    x, weight = torch.ones(4, 64, dtype=I8), torch.ones(8, 64, dtype=I8)
    nan = kernels.pack_scale(torch.full((8,), torch.nan))
    for given, text in (
        ((x, weight, nan), "linear_quant: the packed scale holds NaN or infinity; what the chip"),
        ((x, shortened(weight.clone()), torch.ones(1)), "linear_quant: weight has shape"),
    ):
        with pytest.raises(LinearQuantValueError, match=text) as caught:
            lq_graph.linear_quant(*given, output_dtype=F16)
        assert caught.value.__cause__ is None and "What to do: " in str(caught.value)
