# %% [markdown]
# # GRPO on a free GPU
# BADGE
#
# In this notebook a language model of half a billion parameters learns to solve word problems, on one small GPU such as
# the T4 that hosted notebooks lend for nothing. It trains adapters beside the model (LoRA), in fp16, since a T4 has no
# bf16. It ends by itself after `MINUTES`, shows what happened, and gives you the adapter.
#
# Take a runtime with a GPU first (in Colab: Runtime, Change runtime type, T4). Then run the cells from top to bottom.
# **Nobody has measured it on a T4 yet**: memory is by arithmetic, and how far it comes in the time is open.
# %%
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
RECIPE = "configs/gsm8k-0.5b-lora.yaml"
MINUTES = 45  # of training; what is set up before takes some five more
VLLM = False  # writes answers faster, but pip fetches several GB more; whether it runs on a T4 has not been tried
FLAGS = {}  # more settings, such as {"lora_rank": 8}: `python grpo.py --help` has all of them
REPOSITORY = ""
# %% [markdown]
# ## Set up
# Gets the files and the packages. An older torchvision beside a newer torch breaks what imports it (`operator
# torchvision::nms does not exist`), and hosted notebooks bring one along: it goes, since nothing here needs it.
# %%
import html
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def run(*words, **how):
    print("$", *words)
    return subprocess.run(list(words), check=True, **how)


def is_broken(package):
    """Whether it is installed, and cannot be imported."""
    tried = subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True)
    return find_spec(package) is not None and tried.returncode != 0


def find_files():
    places = [Path.cwd(), *Path.cwd().parents, Path("grpo").resolve()]
    return next((place for place in places if (place / "grpo.py").exists()), None)


if find_files() is None:
    if not REPOSITORY:
        raise SystemExit("say in REPOSITORY, above, where the files are: https://github.com/OWNER/NAME")
    run("git", "clone", "-q", REPOSITORY, "grpo")
    needed = "requirements-gpu.txt" if VLLM else "requirements.txt"
    run(sys.executable, "-m", "pip", "install", "-q", "-r", f"grpo/{needed}")
for package in ("torchvision", "torchaudio"):
    if is_broken(package):
        run(sys.executable, "-m", "pip", "uninstall", "-q", "-y", package)
ROOT = find_files()
gpu = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"
run(sys.executable, "-c", gpu)
# %% [markdown]
# ## Train
# First the memory table and the first evaluation: can this model learn this task? Then the steps. Stop it with the stop
# button whenever you like: it saves a checkpoint and ends.
# %%
settings = {"model": MODEL, "max_minutes": MINUTES, "runs": "runs", "sampler": "auto" if VLLM else "torch", **FLAGS}
command = [sys.executable, "grpo.py", "--config", RECIPE, *(f"--{name}={value}" for name, value in settings.items())]
print("$", *command)
how = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
training = subprocess.Popen(command, **how)
try:
    while part := training.stdout.read1():
        print(part.decode(errors="replace"), end="", flush=True)
except KeyboardInterrupt:
    training.send_signal(2)  # as Ctrl-C does in a terminal: it finishes its step, and saves
    try:
        print(training.communicate()[0].decode(errors="replace"))
    except KeyboardInterrupt:
        training.kill()
if training.wait() not in (0, 130):
    raise SystemExit("the run has failed: the line that begins with `error:` says why")
RUN = max((ROOT / settings["runs"]).iterdir(), key=lambda folder: folder.stat().st_mtime)
print(RUN)
# %% [markdown]
# ## What happened
# The page has the curves, every evaluation and groups of answers with their rewards. It is one file, `report.html`.
# %%
from IPython.display import HTML, display

run(sys.executable, "-m", "view", "report", str(RUN), cwd=ROOT, stdout=subprocess.DEVNULL)
page = (RUN / "report.html").read_text(encoding="utf-8")
display(HTML(f'<iframe srcdoc="{html.escape(page)}" width="100%" height="900" style="border: 0"></iframe>'))
# %% [markdown]
# ## Take it with you
# `final/` is the model with the adapter merged in, for `from_pretrained` and vLLM. `final/adapter` is the adapter
# alone, as PEFT saves it: `PeftModel.from_pretrained(model, "adapter")` puts it beside the model that it was trained
# on. A run that was stopped has no `final/` yet: its newest checkpoint holds the adapter.
# %%
checkpoints = sorted(RUN.glob("checkpoint-*"), key=lambda folder: folder.stat().st_mtime)
made = [RUN / "final" / "adapter", *checkpoints[::-1]]
adapter = next((folder for folder in made if (folder / "adapter_model.safetensors").exists()), None)
if adapter is None:
    print("nothing was trained yet")
else:
    print(shutil.make_archive("adapter", "zip", adapter), f"{Path('adapter.zip').stat().st_size / 1e6:.1f} MB")
    if find_spec("google") and find_spec("google.colab"):
        from google.colab import files

        files.download("adapter.zip")
# %% [markdown]
# ## Go on
# - More time: `python grpo.py --resume RUN --max_minutes 60`, with the folder that was printed above.
# - Another task, or one of your own: `docs/your_own_task.md`. Another model: `docs/models.md`.
# - What LoRA does, and which learning rate it wants: `docs/small_cards.md`.
# - How GRPO works, step by step, on a CPU: the notebooks 1 to 7.
