"""Makes checkpoint folders with llmcompressor or msmodelslim, in a Python that has the tool.

    PYTHON interop_make.py TOOL FOLDER CASE...        # `interop.py` starts it

FOLDER gets the float models that it begins with, and a folder for each case. Beside a folder of
llmcompressor stands what the tool itself computes with it: inputs and outputs of each quantized
layer, in bfloat16 and in float32, and logits. A line for each case goes to stdout, as JSON.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # the tools run on the CPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from interop_cases import (
    CASES,
    LINES,
    LLMCOMPRESSOR,
    MODELS,
    SIZES,
    TEXTS,
    TOKENS,
    VOCABULARY,
    Case,
)
from safetensors.torch import save_file
from torch import Tensor

HOMES = {
    "SmoothQuantModifier": "llmcompressor.modifiers.transform",
    "SpinQuantModifier": "llmcompressor.modifiers.transform",
    "QuantizationModifier": "llmcompressor.modifiers.quantization",
    "GPTQModifier": "llmcompressor.modifiers.gptq",
}


def ids(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, TOKENS), generator=generator)


def tokenizer() -> Any:
    """Words w0 to w255."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="w0", pad_token="w0", eos_token="w1", bos_token="w2"
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def float_model(folder: Path, name: str) -> Path:
    """The folder of a float model with random weights."""
    target = folder / f"float_{name}"
    if not target.exists():
        kind, sizes = MODELS[name]
        config = getattr(transformers, f"{kind}Config")(**SIZES, **sizes)
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "norm" in key:  # channels of different sizes
                    parameter.copy_(torch.exp(torch.randn(parameter.shape) / 2))
                elif key.endswith("bias"):
                    parameter.normal_(std=0.1)
        model.config.torch_dtype = torch.bfloat16
        model.save_pretrained(target)
        tokenizer().save_pretrained(target)
    return target


# ---- llmcompressor ----


def compress(case: Case, folder: Path) -> None:
    """Make a folder with llmcompressor, and open it with transformers as its users do."""
    from datasets import Dataset
    from llmcompressor import oneshot

    source = float_model(folder, case.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    texts = ids(TEXTS, 1).tolist()
    data = Dataset.from_dict({"input_ids": texts, "attention_mask": [[1] * TOKENS] * TEXTS})
    recipe = [
        getattr(importlib.import_module(HOMES[name]), name)(**copy.deepcopy(arguments))
        for name, arguments in case.recipe
    ]
    oneshot(
        model=model,
        processor=tokenizer(),
        dataset=data,
        recipe=recipe,
        num_calibration_samples=TEXTS,
        max_seq_length=TOKENS,
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(folder / case.name, save_compressed=True)
    if not case.refused:
        beside(folder, case.name)


@torch.no_grad()
def beside(folder: Path, name: str) -> None:
    """Save what the tool computes with a folder that it made: "x NAME", "y NAME" (in bfloat16),
    "y32 NAME" (in float32) of each quantized layer; "ids" and "logits"."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / name, dtype=torch.bfloat16
    ).eval()
    layers = {
        key: module
        for key, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None and hasattr(module, "weight")
    }
    found: dict[str, Tensor] = {}
    for key, module in layers.items():

        def see(_: Any, args: Any, out: Tensor, key: str = key) -> None:
            found[f"x {key}"], found[f"y {key}"] = args[0].clone(), out.clone()

        module.register_forward_hook(see)
    found["ids"] = ids(2, 2)
    found["logits"] = model(found["ids"]).logits
    for key, module in layers.items():
        module._forward_hooks.clear()
        found[f"y32 {key}"] = module.float()(found[f"x {key}"].float())
    save_file({key: t.contiguous() for key, t in found.items()}, folder / f"{name}.safetensors")


# ---- msmodelslim ----


def slim(case: Case, folder: Path) -> None:
    """Make a folder with msmodelslim's command line."""
    import yaml
    from msmodelslim.cli.__main__ import main as command

    texts = [" ".join(f"w{number}" for number in row) for row in ids(TEXTS, 1).tolist()]
    (folder / LINES).write_text(json.dumps(texts))
    recipe = copy.deepcopy(case.recipe)
    spec = recipe["spec"]
    spec["calib_dataset" if "calib_dataset" in spec else "dataset"] = str(folder / LINES)
    config = folder / f"{case.name}.yaml"
    config.write_text(yaml.safe_dump(recipe, sort_keys=False))
    for path in (folder, folder / LINES, config):
        path.chmod(0o700 if path.is_dir() else 0o600)  # it refuses files that others may write
    sys.argv = ["msmodelslim", "quant", "--device", "cpu", "--trust_remote_code", "False"]
    sys.argv += ["--model_path", str(float_model(folder, case.model))]
    sys.argv += ["--save_path", str(folder / case.name), "--config_path", str(config)]
    sys.argv += ["--model_type", case.model_type]
    command()


# ---- each case in a process of its own, with what is imported already ----


@contextlib.contextmanager
def _to_stderr() -> Iterator[None]:
    """The tools print to stdout."""
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _alone(make: Callable[[Case, Path], None], case: Case, folder: Path) -> str:
    """Empty, or why the tool failed."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        said = ""
        try:
            make(case, folder)
        except BaseException as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
        os.write(write, said[-2000:].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    return said if os.waitpid(child, 0)[1] == 0 else f"{said} (the process died)"


def main(tool: str, folder: str, *names: str) -> None:
    torch.set_num_threads(1)  # a forked process has no other threads
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with _to_stderr():
        importlib.import_module("llmcompressor" if tool == LLMCOMPRESSOR else "msmodelslim")
        if tool == LLMCOMPRESSOR:
            importlib.import_module("datasets")
    for name in names:
        start = time.perf_counter()
        with _to_stderr():
            failed = _alone(compress if tool == LLMCOMPRESSOR else slim, CASES[name], place)
        line = {"case": name, "failed": failed, "seconds": time.perf_counter() - start}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
