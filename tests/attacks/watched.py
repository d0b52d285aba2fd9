"""A child that opens hostile checkpoints under watch: python watched.py ROOT FILE...

It prints what became of each as JSON: `tensors` (hex by name), `refusal` (a ConverterError's text) or `crash`; and
`broken`: every import, execution, process, socket, and opening of another file that happened meanwhile. Memory is
limited to 2 GiB and each file to 10 seconds. With no FILE it breaks the rules itself, to prove that this is seen.
"""

import json
import os
import resource
import signal
import sys
from importlib import import_module

root, *files = sys.argv[1:]
sys.path.insert(0, root)
FORBIDDEN = {"compile", "ctypes", "exec", "import", "marshal", "os", "pickle", "shutil", "socket", "subprocess"}
current = ""
broken: list[str] = []


def watch(event, arguments):
    if event.split(".")[0] in FORBIDDEN or (event == "open" and str(arguments[0]) != current):
        broken.append(f"{event} {arguments!r:.200}")


def give_up(*_):
    raise TimeoutError("10 seconds were not enough")


def run(path):
    try:
        found = open_checkpoint(path)
        return {"tensors": {name: bytes(tensor.read()).hex() for name, tensor in found.tensors.items()}}
    except ConverterError as error:
        return {"refusal": str(error)}
    except BaseException as error:
        return {"crash": f"{type(error).__name__}: {error}"}


import_module("numpy")
ConverterError = import_module("converters.errors").ConverterError
open_checkpoint = import_module("converters.readers").open_checkpoint
for module in (*import_module("converters.readers").READERS, "wrappers"):
    import_module(f"converters.readers.{module}")
for codec in ("cp437", "unicode_escape"):
    "".encode(codec)  # loads it
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
signal.signal(signal.SIGALRM, give_up)
sys.addaudithook(watch)
results = {}
for current in files:
    broken.clear()
    signal.alarm(10)
    results[current] = {**run(current), "broken": list(broken)}
    signal.alarm(0)
if not files:
    os.system("true")
    import colorsys  # noqa: F401

    open(os.devnull).close()
    results["watched"] = {"broken": list(broken)}
print(json.dumps(results))
