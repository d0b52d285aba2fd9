"""A child that opens hostile checkpoints under watch: python watched.py ROOT FILE...

It prints what became of each as JSON: `tensors` (hex by name), `refusal` (a ConverterError's text) or `crash`; and
`broken`: every import, execution, process, socket, and opening of a file outside that happened meanwhile. Memory is
limited to 2 GiB and each checkpoint to 10 seconds. With no FILE it breaks the rules itself, to prove that this is seen.
"""

import json
import os
import resource
import signal
import sys
from importlib import import_module

FORBIDDEN = {"compile", "ctypes", "exec", "import", "marshal", "os", "pickle", "shutil", "socket", "subprocess"}
current = ""
broken: list[str] = []


def watch(event, arguments):
    is_look = event in ("open", "os.listdir", "os.scandir")
    if (is_look and not is_within(arguments[0])) or (event.split(".")[0] in FORBIDDEN and not is_look):
        broken.append(f"{event} {arguments!r:.200}")


def is_within(path):
    """Whether this is the checkpoint, or lies in its folder when all links are followed."""
    if isinstance(path, int):
        return False
    real, home = os.path.realpath(path), os.path.realpath(current)
    return real == home or (os.path.isdir(home) and real.startswith(home + os.sep))


def give_up(*_):
    raise TimeoutError("10 seconds were not enough")


def run(path, open_checkpoint, refusal):
    try:
        found = open_checkpoint(path)
        return {"tensors": {name: bytes(tensor.read()).hex() for name, tensor in found.tensors.items()}}
    except refusal as error:
        return {"refusal": str(error)}
    except BaseException as error:
        return {"crash": f"{type(error).__name__}: {error}"}


def main(root, *files):
    global current
    sys.path.insert(0, root)
    for library in ("numpy", "google_crc32c"):
        import_module(library)
    readers = import_module("converters.readers")
    for module in (*readers.READERS, "wrappers"):
        import_module(f"converters.readers.{module}")
    for codec in ("cp437", "unicode_escape"):
        "".encode(codec)  # loads it
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    signal.signal(signal.SIGALRM, give_up)
    refusal = import_module("converters.errors").ConverterError
    sys.addaudithook(watch)
    results = {}
    for current in files:
        broken.clear()
        signal.alarm(10)
        results[current] = {**run(current, readers.open_checkpoint, refusal), "broken": list(broken)}
        signal.alarm(0)
    if not files:
        os.system("true")
        import colorsys  # noqa: F401

        open(os.devnull).close()
        results["watched"] = {"broken": list(broken)}
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
