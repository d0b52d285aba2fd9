"""Measure timmport beside a peer or a physical limit, and print the ratios.

    python tools/bench.py              everything (2.5 GB of disk in the temporary folder, some minutes)
    python tools/bench.py start plan   only these

    start    `timmport --help`, and what `import converters` loads
    plan     planning a 400-tensor checkpoint over 10 candidate targets
    inspect  the bytes that a look at the 2.5 GB checkpoint of `convert` reads
    read     every tensor of 1 GB, as a torch zip and as safetensors, beside `cat FILE > /dev/null`, without imports
    convert  a 2.5 GB DDP-prefixed float32 ViT-H beside `cp` + `import timm`, timm's own route and torch's

Times are the best of several runs, and only their ratios mean anything: machines are noisy.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPEATS = 3
MODEL = "vit_huge_patch14_224"
IMPORT_TIMM = [sys.executable, "-c", "import timm"]
TIMMPORT = [sys.executable, "-m", "converters"]

MAKE_CHECKPOINT = """
import sys, timm, torch
model = timm.create_model("vit_huge_patch14_224")
with torch.no_grad():
    for tensor in model.parameters():
        tensor.normal_()
torch.save({"state_dict": {"module." + name: tensor for name, tensor in model.state_dict().items()}}, sys.argv[1])
"""
TIMMS_ROUTE = """
import sys, timm
from timm.models import save_for_hf
model = timm.create_model("vit_huge_patch14_224", checkpoint_path=sys.argv[1])
save_for_hf(model, sys.argv[2], safe_serialization=True)
"""
TORCHS_ROUTE = """
import sys, torch
from safetensors.torch import save_file
state_dict = torch.load(sys.argv[1], map_location="cpu", weights_only=True)["state_dict"]
save_file({name.removeprefix("module."): tensor for name, tensor in state_dict.items()}, sys.argv[2])
"""
PLAN = """
import time
from pathlib import Path
import timm, torch
from converters import mapping, plan, routes, target, tensors
torch.empty(1, device="meta")
names = ["swin_tiny_patch4_window7_224"] + {targets!r}
with torch.device("meta"):
    model = timm.create_model("swin_large_patch4_window7_224")
source = {{}}
for name, tensor in model.state_dict().items():
    source[name] = tensors.TensorSpec(name, tuple(tensor.shape), "float32")
for extra in range(400 - len(source)):
    source[f"optimizer_{{extra}}.step"] = tensors.TensorSpec(f"optimizer_{{extra}}.step", (), "float32")
family = mapping.load_mapping({family!r})
start = time.perf_counter()
found = routes.route(family, source)
closed = 0
for name in family.targets:
    read = plan.read_off(family, found, target.traits_of(name))
    closed += isinstance(plan.make_plan(family, found, target.build_skeleton(name, read)), plan.Plan)
print(time.perf_counter() - start, len(source), len(family.targets), closed)
"""


INSPECT = """
import sys
from converters import inspect
from converters.readers.files import SourceFile
counts, read_into = [], SourceFile._read_into
SourceFile._read_into = lambda *args: counts.append(read_into(*args)) or counts[-1]
inspect(sys.argv[1])
print(sum(counts), len(counts))
"""
MAKE_TENSORS = """
import sys, torch
from safetensors.torch import save_file
for path, layers in zip(sys.argv[1:], (32, 1)):
    tensors = {f"layer{number}.weight": torch.randn(2048, 4096) for number in range(layers)}
    torch.save(tensors, path) if path.endswith(".pth") else save_file(tensors, path)
"""
READ = """
import sys, time
from converters import open_checkpoint
for path in sys.argv[:0:-1]:  # the small one first, for what is imported on the way
    start = time.perf_counter()
    nbytes = sum(tensor.read().nbytes for tensor in open_checkpoint(path).tensors.values())
assert nbytes == 1 << 30
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["start", "plan", "inspect", "read", "convert"]
    parser.add_argument("what", nargs="*", default=names, choices=names)
    wanted = parser.parse_args().what
    with tempfile.TemporaryDirectory(prefix="timmport-bench-") as folder:
        for name in wanted:
            globals()[f"bench_{name}"](Path(folder))


def bench_start(folder: Path) -> None:
    """Start-up."""
    seconds = best(lambda: run([*TIMMPORT, "--help"])[0])
    loaded = "import sys, converters; print([m for m in ('torch', 'timm', 'tensorflow', 'h5py') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout.strip()
    row("timmport --help", seconds, "s", "at most 0.4 s")
    print(f"{'import converters loads':<44} {output} of torch, timm, tensorflow, h5py")


def bench_plan(folder: Path) -> None:
    """Planning alone, after the imports."""
    rules = "\n".join(["rules:", '  "{*}": "{*}"', "drop:", '  "optimizer_{n}": left by a training script'])
    targets = [f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base")] + [
        "swin_base_patch4_window12_384",
        "swin_large_patch4_window12_384",
        "swin_s3_tiny_224",
        "swin_s3_small_224",
    ]
    targets += ["swin_s3_base_224", "swinv2_tiny_window8_256", "swin_large_patch4_window7_224"]
    family = folder / "bench.yaml"
    rows = "\n".join(f"  {name}:" for name in targets)
    family.write_text(f"targets:\n{rows}\ndetect: [patch_embed]\nleaves: torch\n{rules}\n")
    code = PLAN.format(targets=targets, family=str(family))
    best_line = min(
        (
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
            for _ in range(REPEATS)
        ),
        key=lambda line: float(line[0]),
    )
    seconds, tensors, candidates, closed = best_line
    row(f"plan {tensors} tensors over {candidates} targets ({closed} closes)", float(seconds), "s", "under 1.5 s")


def bench_inspect(folder: Path) -> None:
    """What is read of a file that is only looked at."""
    nbytes, reads = answer(INSPECT, make_checkpoint(folder)).split()
    row(f"inspect reads, in {reads} reads", int(nbytes) / 1e6, "MB", "under 5 MB")


def bench_read(folder: Path) -> None:
    """The system's own reading of the file is the limit."""
    for source in (folder / "tensors.pth", folder / "tensors.safetensors"):
        small = source.with_stem("small")
        answer(MAKE_TENSORS, source, small)
        pairs = [(float(answer(READ, source, small)), run(["cat", str(source)])[0]) for _ in range(REPEATS)]
        ours, limit = (min(times) for times in zip(*pairs, strict=True))
        print(f"{f'read 1 GB of {source.name}':<44} {ours:6.2f} s  {ours / limit:5.2f} x cat")
        source.unlink()


def bench_convert(folder: Path) -> None:
    """A file copy and an import are the limit; timm's and torch's own routes are the peers."""
    source = make_checkpoint(folder)
    print(f"source: {source.stat().st_size / 1e9:.2f} GB")
    out = folder / "out"

    def fresh(*command: str, folder_first: bool = False) -> tuple[float, float]:
        out.unlink() if out.is_file() else shutil.rmtree(out, ignore_errors=True)
        if folder_first:
            out.mkdir()
        return run(list(command))

    routes = {
        "cp": lambda: fresh("cp", str(source), str(out)),
        "import timm": lambda: run(IMPORT_TIMM),
        "timmport convert": lambda: fresh(*TIMMPORT, "convert", str(source), "-o", str(out), "--to", MODEL),
        "timm: create_model(checkpoint_path), save": lambda: fresh(
            sys.executable, "-c", TIMMS_ROUTE, str(source), str(out)
        ),
        "torch.load, save_file": lambda: fresh(
            sys.executable, "-c", TORCHS_ROUTE, str(source), str(out / "model.safetensors"), folder_first=True
        ),
    }
    measured: dict[str, tuple[float, float]] = {}
    for _ in range(REPEATS):  # interleaved, so that noise hits all alike
        for name, route in routes.items():
            seconds, peak = route()
            old = measured.get(name, (float("inf"), float("inf")))
            measured[name] = min(old[0], seconds), min(old[1], peak)
    limit = measured["cp"][0] + measured["import timm"][0]
    for name, (seconds, peak) in measured.items():
        print(f"{name:<44} {seconds:6.2f} s  {seconds / limit:5.2f} x (cp + import timm)  peak {peak:5.2f} GB")
    extra = measured["timmport convert"][1] - measured["import timm"][1]
    print(f"{'peak above import timm':<44} {extra:6.2f} GB  (at most 0.4 GB)")


def make_checkpoint(folder: Path) -> Path:
    source = folder / "vit_huge_ddp.pth"
    if not source.exists():
        answer(MAKE_CHECKPOINT, source)
    return source


def answer(code: str, *args: Path) -> str:
    """What Python prints."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident gigabytes of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return seconds, usage.ru_maxrss * 1024 / 1e9


def best(measure) -> float:
    return min(measure() for _ in range(REPEATS * 2))


def row(name: str, value: float, unit: str, goal: str) -> None:
    print(f"{name:<44} {value:6.2f} {unit}   ({goal})")


if __name__ == "__main__":
    main()
