"""Runs the vendor's own inference recipes on cann_host, from your own checkout.

    python benchmarks/recipes.py --recipes DIR

DIR is a checkout of cann-recipes-infer, which is not changed. For each model of models/qwen the
program makes a tiny model that has learned one sentence, with a tokenizer; it writes the recipe's
yaml file, and starts the recipe's own `executor/offline/infer.py` under `python -m cann_host`, with
the environment that the recipe's shell script sets. It prints what each mode generated, beside what
transformers generates on the CPU, or what stopped it. The exit status is 1 if a run failed or the
texts differ.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cann_host

NEEDS = {  # what models/qwen imports, and the packages that have it
    "torch_npu": "torch_npu",
    "transformers": "transformers",
    "compressed_tensors": "compressed-tensors",
    "datasets": "datasets",
    "psutil": "psutil",
    "yaml": "pyyaml",
    "tqdm": "tqdm",
}
MODELS = {  # in transformers, and the recipe's name
    "qwen3": ("Qwen3", "qwen3_8b"),
    "qwen2": ("Qwen2", "qwen25_7b_instruct"),
}
WEIGHTS = ("bf16", "w8a8")
MODES = ("eager", "ge_graph", "npugraph_ex")
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE = 4, 2, 128, 256, 512
CHARACTERS = string.printable[:95] + "".join(map(chr, range(0xE0, 0xFE)))
SPECIAL = ("<pad>", "<eos>", "<unk>")
ANSWER = "a graph and an eager call say the same."
STEPS = 120  # of training
LINEAR = re.compile(r"\.layers\.\d+\..*_proj\.weight$")


@dataclass(frozen=True)
class Run:
    """One start of the recipe."""

    model: str
    weights: str
    mode: str
    ranks: int = 1

    @property
    def name(self) -> str:
        ranks = f"-{self.ranks}ranks" if self.ranks > 1 else ""
        return f"{self.model}-{self.weights}-{self.mode}{ranks}"


@dataclass
class Outcome:
    text: str | None = None  # what the model generated
    step: str = ""  # the recipe's own line: the mean time of a decode step
    stopped: str = ""  # why there is no text
    seconds: float = 0.0


def make_tokenizer(folder: Path) -> Any:
    """A tokenizer of single characters, with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(.|\n)"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    fast.save_pretrained(folder)
    return fast


def learn(model: Any, tokenizer: Any, prompt: str) -> str:
    """Train a model until it answers the prompt with the sentence; returns what it then generates
    in bfloat16.

    Rounding does not change such a text, and a wrong position, mask or cache does. A model that is
    only random often chooses between characters that are nearly as likely.
    """
    import torch

    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    asked = tokenizer(text, return_tensors="pt").input_ids
    answer = tokenizer(ANSWER + "<eos>", return_tensors="pt").input_ids
    tokens = torch.cat([asked, answer], dim=1)
    labels = torch.cat([torch.full_like(asked, -100), answer], dim=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
    with torch.no_grad():
        said = (
            model.bfloat16()
            .eval()
            .generate(asked, max_new_tokens=answer.shape[1], do_sample=False, pad_token_id=0)
        )
    return str(tokenizer.decode(said[0, asked.shape[1] :], skip_special_tokens=True))


def make_model(folder: Path, kind: str, prompt: str, layers: int) -> str:
    """A checkpoint of a tiny model in bfloat16: config.json, model.safetensors and a tokenizer.
    Returns what transformers generates from it."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    tokenizer = make_tokenizer(folder)
    said = learn(model, tokenizer, prompt)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    theta = 1e4 if kind == "Qwen2" else 1e6
    rope = getattr(config, "rope_parameters", None) or {}
    settings = {**config.to_dict(), "torch_dtype": "bfloat16", "rope_theta": theta}
    settings["rope_theta"] = rope.get("rope_theta", theta)
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    return said


def quantize(folder: Path, target: Path) -> None:
    """The same model with int8 weights in the layout of compressed-tensors."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if LINEAR.search(name)]:
        weight = state[name].float()
        scale = (weight.abs().amax(dim=1, keepdim=True) / 127).to(torch.bfloat16)
        state[name] = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
        state[f"{name}_scale"] = scale
    save_file(state, target / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = _quantization_config()
    (target / "config.json").write_text(json.dumps(settings, indent=1))


def _quantization_config() -> dict[str, object]:
    """compressed-tensors: int8 per channel, activations int8 per token and dynamic."""
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**int8, "strategy": "channel", "dynamic": False},
        "input_activations": {**int8, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def make_yaml(file: Path, run: Run, weights: Path, tokens: int) -> None:
    """The recipe's own configuration; JSON is YAML."""
    settings = {
        "model_config": {
            "model_name": MODELS[run.model][1],
            "model_path": str(weights),
            "output_path": str(file.parent),
            "exe_mode": run.mode,
            "with_ckpt": True,
        },
        "data_config": {"dataset": "default", "input_truncated_len": 256},
        "parallel_config": {
            "world_size": run.ranks,
            "attn_tp_size": run.ranks,
            "lmhead_tp_size": run.ranks,
        },
        "scheduler_config": {"max_new_tokens": tokens, "batch_size": 1},
    }
    file.write_text(json.dumps(settings, indent=1))


def environment(recipes: Path, run: Run, rank: int, folder: Path, port: int) -> dict[str, str]:
    """What executor/scripts/infer.sh and function.sh set, for one process."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*filter(None, [os.getenv("PYTHONPATH")]), str(recipes)]),
        "PYTHONDONTWRITEBYTECODE": "1",  # nothing is written into the checkout
        "HF_HUB_OFFLINE": "1",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "WORLD_SIZE": str(run.ranks),
        "LOCAL_WORLD_SIZE": str(run.ranks),
        "LOCAL_RANK": str(rank),
        "RANK_ID": str(rank),
        "RANK_OFFSET": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "HCCL_IF_IP": "127.0.0.1",
        "HCCL_IF_BASE_PORT": "23456",
        "HCCL_SOCKET_IFNAME": "enp",
        "HCCL_OP_EXPANSION_MODE": "AIV",
        "HCCL_CONNECT_TIMEOUT": "1200",
        "HCCL_EXEC_TIMEOUT": "1200",
        "WORK_DIR": str(folder),
        "RES_PATH": "",
    }


def start(recipes: Path, run: Run, folder: Path, yaml: Path, args: argparse.Namespace) -> Outcome:
    """Start the recipe's program, a process for each rank, and read what rank 0 generated."""
    begin = time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(recipes / "executor" / "offline" / "infer.py")
    command = [sys.executable, "-m", "cann_host", "--devices", str(run.ranks)]
    if args.graphs:
        args.graphs.mkdir(parents=True, exist_ok=True)
        command += [str(Path(__file__).with_name("dump_graphs.py")), str(args.graphs.resolve())]
    logs = [folder / f"{run.name}.{rank}.log" for rank in range(run.ranks)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, program, f"--yaml_file_path={yaml}"],
                cwd=folder,
                env=environment(recipes, run, rank, folder, port),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        processes.append(process)
    stopped = ""
    try:
        for process in processes:
            process.wait(timeout=max(0.0, args.limit - (time.monotonic() - begin)))
    except subprocess.TimeoutExpired:
        stopped = f"no end within {args.limit:g} s"
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    outcome = read(logs[0].read_text(errors="replace"), processes[0].returncode)
    outcome.stopped = outcome.stopped and (stopped or outcome.stopped)
    outcome.seconds = time.monotonic() - begin
    return outcome


def read(log: str, code: int) -> Outcome:
    """What a log says: the generated text, or why there is none."""
    found = re.search(r"Request 0: outputs: (.*)\n", log)
    if found is not None and code == 0:
        step = re.search(r"decode average inference time cost is ([\d.]+ ms)", log)
        return Outcome(found[1], step[1] if step else "")
    if code < 0:
        return Outcome(stopped=f"crashed: {signal.Signals(-code).name}")
    return Outcome(stopped=reason(log))


def reason(log: str) -> str:
    """The line that says what is missing, else the last error."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    missing = re.compile(
        r"cann_host (does not|has no)|cann_host: (?!no NPU)|not in libopapi|op type \w+, node"
    )
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Unsupported)\b", line)]
    found = [line for line in lines if missing.search(line)] + errors[::-1] + lines[::-1]
    return re.sub(r"/\S+/", ".../", (found or ["no output"])[0])[:200]


# Where torch_npu's name does not contain that of CANN's operator.
NAMES = {
    "npu_rotary_mul": "rotarypositionembedding",
    "npu_fusion_attention": "flashattentionscore",
    "npu_format_cast": "npuformatcast",
    "npu_dtype_cast": "cast",
    "scatter_update_": "scatterupdate",
}
OPERATOR = re.compile(r"(?:torch_npu|torch\.ops\.npu)\.(npu_\w+|scatter_update_)")
OTHER_OPERATOR = re.compile(r"torch\.ops\.(?!npu\b)(\w+)\.\w+")
OTHER_PACKAGES = ("tilelang", "diffusers", "cann_ops_transformer", "custom_ops")


def others(recipes: Path) -> None:
    """What the sources of each model name that is not here. Nothing runs."""
    import torch_npu

    from cann_host.aclnn.runner import OPERATORS

    def plain(name: str) -> str:
        return re.sub(r"v\d+$", "", re.sub(r"^aclnn(inplace)?|^npu_|_", "", name.lower()))

    here = {plain(name) for name in OPERATORS}
    print(f"{'model':30} not here, by reading its sources")
    for folder in sorted(path for path in (recipes / "models").iterdir() if path.is_dir()):
        text = "\n".join(file.read_text(errors="replace") for file in folder.rglob("*.py"))
        if "fuse_moe_gmm" in text:
            text += (recipes / "module" / "fuse_moe_gmm.py").read_text()
        names = sorted(set(OPERATOR.findall(text)))
        absent = [name for name in names if not hasattr(torch_npu, name)]
        missing = [
            name
            for name in names
            if name not in absent and NAMES.get(name, plain(name)) not in here
        ]
        parts = [" ".join(missing)] if missing else []
        parts += [f"not in this torch_npu: {' '.join(absent)}"] if absent else []
        libraries = sorted(set(OTHER_OPERATOR.findall(text)) - {"higher_order", "aten"})
        libraries += [name for name in OTHER_PACKAGES if f"import {name}" in text]
        libraries += [name for name in OTHER_PACKAGES if f"from {name}" in text]
        if libraries:
            parts.append(f"operators of other packages: {' '.join(dict.fromkeys(libraries))}")
        print(f"{folder.name:30} {'; '.join(parts) or ('nothing' if text else 'no sources')}")


def runs(args: argparse.Namespace) -> Iterator[Run]:
    for model in MODELS:
        for weights in WEIGHTS:
            for mode in MODES:
                for ranks in args.ranks:
                    run = Run(model, weights, mode, ranks)
                    if re.search(args.only, run.name):
                        yield run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", default="", help="a pattern of names, such as qwen3-w8a8")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="devices, such as 1 2")
    parser.add_argument("--tokens", type=int, default=len(ANSWER) + 1, help="how many to generate")
    parser.add_argument("--layers", type=int, default=2, help="of the tiny model")
    parser.add_argument("--graphs", type=Path, help="keep the GE graphs in this folder")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one run")
    parser.add_argument("--others", action="store_true", help="what the other models would need")
    parser.add_argument("--logs", type=Path, help="keep the logs in this folder")
    args = parser.parse_args()
    recipes = args.recipes.resolve()
    if not (recipes / "executor" / "offline" / "infer.py").is_file():
        parser.error(f"{recipes} is not a checkout of cann-recipes-infer")
    missing = [package for name, package in NEEDS.items() if not importlib.util.find_spec(name)]
    if missing:
        parser.error(f"the recipe needs packages that are not installed: {' '.join(missing)}")
    cann_host.activate()  # transformers imports torch_npu if it is installed
    if args.others:
        others(recipes)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        return report(recipes, args, Path(temporary))


def report(recipes: Path, args: argparse.Namespace, folder: Path) -> int:
    """Run everything and print the table."""
    prompt = json.loads((recipes / "dataset" / "default_prompt.json").read_text())["text"]
    texts: dict[str, str] = {}
    failed = 0
    print(f"{'model':6} {'weights':8} {'mode':12} {'ranks':5} {'seconds':>7} {'step':>10}  text")
    for run in runs(args):
        if run.model not in texts:
            show(f"{run.model} learns a sentence")
            kind = MODELS[run.model][0]
            texts[run.model] = make_model(folder / f"{run.model}-bf16", kind, prompt, args.layers)
            quantize(folder / f"{run.model}-bf16", folder / f"{run.model}-w8a8")
            print(
                f"{run.model:6} bf16     transformers on the CPU             {texts[run.model]!r}"
            )
        yaml = folder / f"{run.name}.yaml"
        make_yaml(yaml, run, folder / f"{run.model}-{run.weights}", args.tokens)
        show(run.name)
        outcome = start(recipes, run, folder, yaml, args)
        if args.logs:
            args.logs.mkdir(parents=True, exist_ok=True)
            for log in folder.glob(f"{run.name}.*.log"):
                shutil.copy(log, args.logs)
        said = f"stopped: {outcome.stopped}"
        if outcome.text is not None:
            is_same = outcome.text == texts[run.model]
            said = "the same" if is_same else f"{outcome.text!r}"
        failed += said != "the same"
        head = f"{run.model:6} {run.weights:8} {run.mode:12} {run.ranks:5}"
        print(f"{head} {outcome.seconds:7.0f} {outcome.step:>10}  {said}", flush=True)
    return int(failed > 0)


def show(what: str) -> None:
    print(f"  {what} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
