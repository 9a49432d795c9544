"""Open folders with transformers and compressed-tensors: `open_saved.py FOLDER...`.

Runs in a Python that has both, without lq_graph. Beside each FOLDER, FOLDER.ids.pt has token ids;
FOLDER.out.pt gets what the model makes of them: with compressed weights, and decompressed.
"""

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

for folder in sys.argv[1:]:
    ids, found = torch.load(f"{folder}.ids.pt"), list[dict[str, Any]]()
    for dequantize in (False, True):
        options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, **(options if dequantize else {})
        )
        model, info = loaded
        with torch.no_grad():
            logits = model(ids).logits
            tokens = model.generate(ids[:1], max_new_tokens=16, do_sample=False)
        found.append(
            {
                "logits": logits.float(),
                "tokens": tokens,
                "dtype": str(model.dtype),
                "tied": model.lm_head.weight is model.model.embed_tokens.weight,
                "wrong": {key: sorted(map(str, names)) for key, names in info.items() if names},
                "word": AutoTokenizer.from_pretrained(folder).decode([5]),
            }
        )
    torch.save(found, f"{folder}.out.pt")
